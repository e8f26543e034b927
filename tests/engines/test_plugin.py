"""The plugin as users meet it: nothing configured, a budget of one's own, tensor parallelism, and what it refuses."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from polder.bench.workloads.models import ensure_model
from polder.serve.process import ManagedProcess, ProcessSpec
from tests.engines.answers import varied
from tests.engines.conftest import Stock
from tests.engines.harness import A32, ENVIRONMENT, MODELS, TINY, Broker, Engine, prompts, tokens_of

pytestmark = pytest.mark.engine
ASKED, LENGTHS = prompts(12, 150, seed=21), [4, 32] * 6


@pytest.fixture(scope="module")
def expected(stock: Stock) -> list[list[int]]:
    return stock(A32, ASKED, LENGTHS)


def test_with_nothing_configured_the_engine_is_stock(expected: list[list[int]]) -> None:
    engine = Engine.start("plain", settings={"POLDER_BROKER": ""}, num_gpu_blocks_override=160)
    try:
        with pytest.raises(Exception, match="polder"):
            engine.utility("polder_check")
        assert tokens_of(engine.generate(ASKED, LENGTHS)) == expected
    finally:
        engine.stop()


def test_a_budget_of_its_own_needs_no_broker_and_may_come_by_additional_config(expected: list[list[int]]) -> None:
    additional = {"polder": {"kv_budget": "80MiB", "page": "256KiB"}}
    engine = Engine.start("solo", settings={"POLDER_BROKER": ""}, additional_config=additional)
    try:
        assert tokens_of(engine.generate(ASKED, LENGTHS)) == expected
        counters = engine.utility("polder_check")
        assert counters["grows_total"] > 0, "it started at its floor and had to grow"
    finally:
        engine.stop()


def test_tensor_parallel_ranks_grow_move_and_shrink_together() -> None:
    """Two ranks of the V2 runner, each with half of the heads: pages of both come and go in one unit."""
    two = {"tensor_parallel_size": 2, "max_model_len": 512, "max_num_seqs": 16}
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    reference = Engine.start("stock2", TINY, bind | {"VLLM_PLUGINS": ""}, num_gpu_blocks_override=320, **two)
    asked = prompts(8, 150, seed=2, vocabulary=TINY.vocab)
    expected = varied(tokens_of(reference.generate(asked, LENGTHS[:8])))
    reference.stop()
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=4 * 20).start()
        settings = bind | {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "t"}
        engine = Engine.start("t", TINY, settings, like="v2,async,warmup", **two)
        try:
            events = {
                12: lambda: broker.resize("t", 5),
                16: lambda: broker.resize("t", 20),
                22: lambda: broker.resize("t", 5),
            }
            assert tokens_of(engine.generate(asked, LENGTHS[:8], events)) == expected
            counters = engine.utility("polder_check")
            assert counters["shrinks_total"] >= 2
            assert counters["migrated_blocks_total"] > 0
            device = broker.status().devices[0]
            assert device.pages_by_owner == {"t/kv": broker.engine("t").held_units * 4}
        finally:
            engine.stop()
            broker.stop()


def test_plain_vllm_serve_refuses_with_what_to_change(tmp_path: Path, short_dir: Path) -> None:
    """Two at a time: most of it is imports. They end with this process, whatever ends it."""
    wrong = {
        "no broker answers on /nowhere/b": {"POLDER_BROKER": "/nowhere/b"},
    }
    vllm, model = str(Path(sys.executable).with_name("vllm")), str(ensure_model(A32, MODELS))
    options = [
        "--port",
        "18999",
        "--enforce-eager",
        "--block-size",
        "32",
        "--dtype",
        "float32",
        "--max-model-len",
        "1024",
    ]
    own = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "VLLM_RPC_BASE_PATH": str(short_dir), **ENVIRONMENT}
    started: dict[str, ManagedProcess] = {}
    try:
        for words, settings in wrong.items():
            variables = [f"{name}={value}" for name, value in (own | settings).items()]
            spec = ProcessSpec(
                name=words,
                argv=("env", "-i", *variables, vllm, "serve", model, *options),
                log_path=tmp_path / f"{len(started)}.log",
            )
            started[words] = ManagedProcess(spec)
            started[words].start()
        for words, process in started.items():
            assert process.wait(240), "it serves, or hangs"
            assert process.returncode != 0
            assert process.spec.log_path is not None
            assert words in process.spec.log_path.read_text()
    finally:
        for process in started.values():
            process.stop(grace_s=1.0)
