"""The plugin as users meet it: nothing configured, a budget of one's own, tensor parallelism, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from polder.bench.models import ensure_model
from tests.engines.harness import A32, ENVIRONMENT, MODELS, Broker, Engine, prompts, tokens_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
ASKED, LENGTHS = prompts(12, 150, seed=21), [4, 32] * 6


@pytest.fixture(scope="module")
def stock() -> Iterator[list[list[int]]]:
    engine = Engine.start("stock", num_gpu_blocks_override=160)
    yield tokens_of(engine.generate(ASKED, LENGTHS))
    engine.stop()


def test_with_nothing_configured_the_engine_is_stock(stock: list[list[int]]) -> None:
    engine = Engine.start("plain", settings={"POLDER_BROKER": ""}, num_gpu_blocks_override=160)
    try:
        with pytest.raises(Exception, match="polder"):
            engine.utility("polder_check")
        assert tokens_of(engine.generate(ASKED, LENGTHS)) == stock
    finally:
        engine.stop()


def test_a_budget_of_its_own_needs_no_broker_and_may_come_by_additional_config(stock: list[list[int]]) -> None:
    additional = {"polder": {"kv_budget": "80MiB", "page": "256KiB"}}
    engine = Engine.start("solo", settings={"POLDER_BROKER": ""}, additional_config=additional)
    try:
        assert tokens_of(engine.generate(ASKED, LENGTHS)) == stock
        counters = engine.utility("polder_check")
        assert counters["grows_total"] > 0, "it started at its floor and had to grow"
    finally:
        engine.stop()


def test_tensor_parallel_ranks_grow_move_and_shrink_together() -> None:
    """Two ranks, each with half of the heads: pages of both come and go in one unit."""
    two = {"tensor_parallel_size": 2, "max_model_len": 512}
    bind = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    reference = Engine.start("stock2", settings=bind | {"VLLM_PLUGINS": ""}, num_gpu_blocks_override=320, **two)
    expected = tokens_of(reference.generate(ASKED, LENGTHS))
    reference.stop()
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=16 * 20).start()
        engine = Engine.start("t", settings=bind | {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "t"}, **two)
        try:
            events = {
                14: lambda: broker.resize("t", 7),
                18: lambda: broker.resize("t", 20),
                24: lambda: broker.resize("t", 8),
            }
            assert tokens_of(engine.generate(ASKED, LENGTHS, events)) == expected
            counters = engine.utility("polder_check")
            assert counters["shrinks_total"] >= 2
            assert counters["migrated_blocks_total"] > 0
            device = broker.status().devices[0]
            assert device.pages_by_owner == {"t/kv": broker.engine("t").held_units * 16}
        finally:
            engine.stop()
            broker.stop()


def serve_and_fail(settings: dict[str, str], *arguments: str) -> str:
    """Starts `vllm serve` with settings that must be refused; what it printed."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(ensure_model(A32, MODELS)), "--port", "18999"]
    done = subprocess.run(
        [*command, "--enforce-eager", "--block-size", "32", "--dtype", "float32", *arguments],
        env={"PATH": "/usr/bin:/bin", "HOME": "/tmp", **ENVIRONMENT, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("settings", "arguments", "words"),
    [
        ({"POLDER_KV_BUDGET": "8MiB"}, ("--max-model-len", "1024"), "BudgetError"),
        ({"POLDER_KV_BUDGET": "512MiB", "POLDER_KV_FLOOR": "16MiB"}, ("--max-model-len", "1024"), "give at least"),
    ],
)
def test_plain_vllm_serve_refuses_with_what_to_change(
    settings: dict[str, str], arguments: tuple[str, ...], words: str
) -> None:
    assert words in serve_and_fail(settings, *arguments)


def test_a_missing_broker_is_named_at_the_start() -> None:
    assert "no broker answers on /nowhere/b" in serve_and_fail(
        {"POLDER_BROKER": "/nowhere/b"}, "--max-model-len", "1024"
    )
