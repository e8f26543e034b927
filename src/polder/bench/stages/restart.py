"""The restart stage of `polder bench turns`: agents on a small host tier and disks, stopped half-way and started anew.

Each arm serves the first turns of every session, is ended, and comes up again over the same disks. Stock has nothing then,
vLLM's own tiers have files, Polder has its disk tier. Engine A is alone, on both cores; disks are emulated, and as fast in all
arms together.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polder.bench.harness.arms import Arm, PolderArm, StockArm
from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan, TierPlan
from polder.bench.harness.machine import two_cores
from polder.bench.harness.progress import Reporter
from polder.bench.harness.runs import Run, run_loads, run_on
from polder.bench.harness.scrape import summed
from polder.bench.report.metrics import Metrics, RunRecords, engine_metrics
from polder.bench.report.result import without_nan
from polder.bench.turns_plan import LINKS_BYTES_PER_S, Links
from polder.bench.workloads.agents import agents, parted
from polder.bench.workloads.models import MODEL_A
from polder.engines.vllm.tiers.disk import staged_pages

__all__ = [
    *("RESTART_SUFFIXES", "RestartPlan", "describe_restart", "offload_file", "restart_engine", "restart_metrics"),
    "run_restart",
]

RESTART_SUFFIXES = ("-before", "-restart")
TURNS = 16
"""Of each session of tiny-agent-v1."""
_SHARED = Path("/dev/shm")
SETTLE_S = 4.0
"""After the last reply, for writes under way: every arm gets it."""


@dataclass(frozen=True, kw_only=True)
class RestartPlan:
    sessions: int
    users: int = 16
    turns_before: int = 8
    """Of each session; the others come after the restart."""
    host_bytes: int = 64 << 20
    disks: int = 4
    disk_bytes: int = 256 << 20
    """Limit of each."""
    disk_bytes_per_s: float = 75e6
    """Of each: together less than the emulated host link."""

    @property
    def staged_bytes(self) -> int:
        """Polder's memory for pages on their way from and to disk."""
        page_bytes = BLOCK_TOKENS * MODEL_A.kv_bytes_per_token
        return staged_pages(page_bytes) * page_bytes

    @property
    def native_bytes(self) -> int:
        """CPU tier of the native arm: Polder's host tier and that memory."""
        return self.host_bytes + self.staged_bytes


def restart_engine(
    arm: str, engine: EnginePlan, plan: RestartPlan, links: Links, folder: Path, engine_id: str
) -> EnginePlan:
    """Engine A as `arm` serves it; `folder` is the arm's own, and holds what it keeps on disk. `engine_id`: of vLLM's connector."""
    core, *more = dict.fromkeys(two_cores())
    engine = replace(engine, core=core, more_cores=tuple(more))
    if arm == "stock":
        return engine
    if arm == "native-fs":
        return replace(engine, extra_args=("--kv-transfer-config", _native_config(plan, links, folder, engine_id)))
    disks = tuple(f"{folder.resolve() / f'disk{n}'}:{plan.disk_bytes}B" for n in range(plan.disks))
    rates = f"host={LINKS_BYTES_PER_S['host'] / 1e6:g}MB/s,disk={plan.disk_bytes_per_s / 1e6:g}MB/s"
    return replace(
        engine,
        sizing="fixed",
        tiers=TierPlan(store_to=("host", "disk"), host_bytes=plan.host_bytes, disks=disks),
        extra_env={"POLDER_LINKS": rates} if links == "emulated" else {},
    )


def offload_file(engine_id: str) -> Path:
    """The shared memory that vLLM's connector makes for an engine."""
    return _SHARED / f"vllm_offload_{engine_id}.mmap"


def run_restart(
    arm: str,
    engine: EnginePlan,
    plan: RestartPlan,
    links: Links,
    *,
    logs: Path,
    runtime: Path,
    workdir: Path,
    report: Reporter,
) -> tuple[Run, Run]:
    """(run before, run after the restart) of one arm, on empty disks. Raises EnvironmentFault when an engine fails."""
    folder = workdir / f"restart-{arm}"
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(plan.disks):
        (folder / f"disk{number}").mkdir(parents=True)
    before, after = parted(agents(model="A", users=plan.users, sessions=plan.sessions), plan.turns_before, TURNS)

    @contextlib.contextmanager
    def served() -> Iterator[Arm]:
        engine_id = f"polder-bench-{uuid.uuid4()}"  # its own: no engine opens, or loses, what is another's
        try:
            up = _started(arm, restart_engine(arm, engine, plan, links, folder, engine_id), logs, runtime)
            try:
                yield up
            finally:
                up.stop()
        finally:
            with contextlib.suppress(OSError):  # vLLM's shutdown kills its engine core before that unlinks it
                offload_file(engine_id).unlink()

    try:
        with served() as up:
            with report.stage(f"restart, {arm}: the first {plan.turns_before} turns of each session") as stage:
                first = asyncio.run(run_loads(up, {"A": before}, stage))
            time.sleep(SETTLE_S)
        with served() as up, report.stage(f"restart, {arm}: the other turns, after a restart") as stage:
            second = asyncio.run(run_on(up, {"A": after}, stage))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    first.arm, second.arm = f"{arm}-before", f"{arm}-restart"
    return first, second


def restart_metrics(runs: Sequence[Run]) -> dict[str, Metrics]:
    """Of engine A; `first_turn_hit_ratio`: of the prompts that come first of their sessions."""
    records = [RunRecords(records=run.records["A"], preemptions=run.preemptions["A"]) for run in runs]
    found = without_nan(engine_metrics(records))
    firsts = [record for run in records for record in _first_turns(run.good)]
    prompt = sum(record.prompt_tokens for record in firsts)
    found["first_turn_hit_ratio"] = sum(record.cached_tokens for record in firsts) / prompt if prompt else 0.0
    found["counters"] = summed([run.samples.get("A", {}) for run in runs])
    return {"A": found}


def describe_restart(plan: RestartPlan, links: Links) -> dict[str, Any]:
    native = (
        f"CPU tier of {plan.native_bytes} B = polder-disk's host tier and staging memory together, vLLM's file tier over one "
        "folder without a limit"
    )
    polder = (
        f"host tier of {plan.host_bytes} B and {plan.staged_bytes} B of staging memory, "
        f"{plan.disks} disks of {plan.disk_bytes} B"
    )
    if links == "emulated":
        rate, host = plan.disk_bytes_per_s / 1e6, LINKS_BYTES_PER_S["host"] / 1e6
        native += f", at {plan.disks * rate:g} MB/s each way; the CPU tier is behind a link of {host:g} MB/s, and files behind it"
        polder += f", each at {rate:g} MB/s; the host tier is behind a link of {host:g} MB/s, and so is what is loaded from disk"
    return {
        "stock": "engine A's pool alone",
        "native-fs": native,
        "polder-disk": polder,
        "turns_before": plan.turns_before,
        "sessions": plan.sessions,
        "settled_s": SETTLE_S,
    }


def _started(arm: str, engine: EnginePlan, logs: Path, runtime: Path) -> Arm:
    name = f"{arm}-restart"
    up: Arm = (
        PolderArm([engine], logs, runtime, name=name) if arm == "polder-disk" else StockArm([engine], logs, name=name)
    )
    try:
        up.start()
        up.wait_ready()
    except BaseException:
        up.stop()
        raise
    return up


def _first_turns(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    firsts: dict[str, RequestRecord] = {}
    for record in records:
        session, _, turn = record.key.partition("t")
        known = firsts.get(session)
        if known is None or int(turn) < int(known.key.partition("t")[2]):
            firsts[session] = record
    return list(firsts.values())


def _native_config(plan: RestartPlan, links: Links, folder: Path, engine_id: str) -> str:
    extra: dict[str, object] = {
        "spec_name": "NativeTieringSpec",
        "spec_module_path": "polder.bench.native.fs",
        "cpu_bytes_to_use": plan.native_bytes,
        "offload_prompt_only": False,
        "secondary_tiers": [{"type": "fs", "root_dir": str(folder.resolve() / "disk0")}],
    }
    if links == "emulated":
        extra["link_bytes_per_s"] = LINKS_BYTES_PER_S["host"]
        extra["disk_bytes_per_s"] = plan.disks * plan.disk_bytes_per_s
    return json.dumps(
        {
            "kv_connector": "OffloadingConnector",
            "engine_id": engine_id,
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
    )
