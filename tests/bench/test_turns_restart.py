"""The restart stage: what each arm has behind its pool, and whose shared memory is gone afterwards."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polder.bench.harness.arms import Arm
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan
from polder.bench.harness.progress import reporter_for
from polder.bench.stages import restart as turns_restart
from polder.bench.stages.restart import (
    RestartPlan,
    describe_restart,
    offload_file,
    restart_engine,
    run_restart,
)
from polder.bench.turns_plan import RESTART_ARMS
from polder.bench.workloads.models import MODEL_A
from polder.engines.vllm.tiers.disk import staged_pages
from polder.errors import EnvironmentFault
from tests.bench.fake_server import FakeEngine, serving
from tests.bench.test_turns_bench import sessions
from tests.bench.test_turns_runs import FakeArm

PLAN = RestartPlan(sessions=1)
ENGINE = EnginePlan(
    name="A", recipe=MODEL_A, model_path=Path("/models/A"), max_model_len=1024, core=0, share_bytes=1 << 20
)


def connector(engine: EnginePlan) -> Mapping[str, Any]:
    arguments = engine.extra_args
    return json.loads(arguments[arguments.index("--kv-transfer-config") + 1])  # type: ignore[no-any-return]


# ---------------------------------------------------------------- bytes and links


def test_the_native_arm_has_the_bytes_of_the_host_tier_and_its_staging_memory(tmp_path: Path) -> None:
    polder = restart_engine("polder-disk", ENGINE, PLAN, "emulated", tmp_path, "id")
    native = connector(restart_engine("native-fs", ENGINE, PLAN, "emulated", tmp_path, "id"))
    assert polder.tiers is not None
    assert native["kv_connector_extra_config"]["cpu_bytes_to_use"] == polder.tiers.host_bytes + PLAN.staged_bytes
    page_bytes = BLOCK_TOKENS * MODEL_A.kv_bytes_per_token
    assert PLAN.staged_bytes == staged_pages(page_bytes) * page_bytes == 96 << 20


def test_what_the_arms_do_not_have_alike_is_said() -> None:
    said = describe_restart(PLAN, "emulated")
    assert "host tier of 67108864 B and 100663296 B of staging memory" in said["polder-disk"]
    assert "CPU tier of 167772160 B" in said["native-fs"]
    assert not any("MB/s" in str(text) for text in describe_restart(PLAN, "none").values())


# ---------------------------------------------------------------- shared memory


class Started:
    """Stands for `_started`: engines that leave their region behind, as vLLM's do when they are killed."""

    def __init__(self, engine: FakeEngine, logs: Path) -> None:
        self._engine, self._logs = engine, logs
        self.ids: list[str] = []
        self.left_at_start: list[int] = []

    def __call__(self, arm: str, engine: EnginePlan, *_: Any) -> Arm:
        self.left_at_start.append(sum(offload_file(engine_id).exists() for engine_id in self.ids))
        if arm == "native-fs":
            self.ids.append(connector(engine)["engine_id"])
            self.leave(offload_file(self.ids[-1]))
        offload_file(f"beside-{arm}").touch()  # somebody else's, started meanwhile
        return FakeArm(arm, self._logs, self._engine)

    def leave(self, file: Path) -> None:
        file.touch()


def ran(arm: str, started: Started, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what is left in shared memory."""
    shared = folder / "shm"
    shared.mkdir(exist_ok=True)
    monkeypatch.setattr(turns_restart, "_SHARED", shared)
    monkeypatch.setattr(turns_restart, "_started", started)
    monkeypatch.setattr(turns_restart, "agents", sessions)
    monkeypatch.setattr(turns_restart, "SETTLE_S", 0.0)
    run_restart(
        arm, ENGINE, PLAN, "emulated",
        logs=folder, runtime=folder, workdir=folder, report=reporter_for(Console(quiet=True)),
    )  # fmt: skip
    return sorted(path.name for path in shared.iterdir())


@pytest.mark.parametrize("arm", RESTART_ARMS)
def test_only_an_arms_own_shared_memory_goes_with_it(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(FakeEngine(token_s=0.0001)) as engine:
        started = Started(engine, tmp_path)
        assert ran(arm, started, tmp_path, monkeypatch) == [f"vllm_offload_beside-{arm}.mmap"]
    assert len(set(started.ids)) == (2 if arm == "native-fs" else 0), "an engine never opens what another has left"
    assert started.left_at_start == [0, 0], "an engine has the memory to itself"


def test_shared_memory_that_cannot_be_removed_fails_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stuck(Started):
        def leave(self, file: Path) -> None:
            file.mkdir()  # unlink raises, also for root

    with serving(FakeEngine(token_s=0.0001)) as engine:
        assert len(ran("native-fs", Stuck(engine, tmp_path), tmp_path, monkeypatch)) == 3


def test_an_engine_that_never_gets_ready_leaves_no_shared_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Dead(Started):
        def __call__(self, arm: str, engine: EnginePlan, *more: Any) -> Arm:
            super().__call__(arm, engine, *more)
            raise EnvironmentFault("no engine")

    with serving(FakeEngine()) as engine, pytest.raises(EnvironmentFault, match="no engine"):
        ran("native-fs", Dead(engine, tmp_path), tmp_path, monkeypatch)
    assert [path.name for path in (tmp_path / "shm").iterdir()] == ["vllm_offload_beside-native-fs.mmap"]


def test_the_region_is_where_vllm_puts_it() -> None:
    pytest.importorskip("vllm")
    from vllm.config import KVTransferConfig
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

    engine = restart_engine("native-fs", ENGINE, PLAN, "none", Path("/disks"), "polder-test-region")
    engine_id = KVTransferConfig(**connector(engine)).engine_id
    assert engine_id == "polder-test-region"
    region = SharedOffloadRegion(engine_id=engine_id, num_chunks=1, rank=0, kv_bytes_per_chunk=4096, cpu_page_size=4096)
    try:
        assert offload_file(engine_id).exists()
    finally:
        region.cleanup()
    assert not offload_file(engine_id).exists()
