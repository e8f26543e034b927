"""The restart stage of `polder bench turns`: agents on a small host tier and disks, stopped half-way and started anew.

Each arm serves the first turns of every session, is ended, and comes up again over the same disks. Stock has nothing then,
vLLM's own tiers have files, Polder has its disk tier. Engine A is alone, on both cores; disks are emulated, and as fast in all
arms together.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from polder.bench.arms import Arm, PolderArm, StockArm
from polder.bench.driver import RequestRecord
from polder.bench.engine_plan import EnginePlan, TierPlan
from polder.bench.machine import two_cores
from polder.bench.metrics import Metrics, RunRecords, engine_metrics
from polder.bench.progress import Reporter
from polder.bench.result import without_nan
from polder.bench.runs import Run, run_loads, run_on
from polder.bench.scrape import summed
from polder.bench.turns_plan import LINKS_BYTES_PER_S, Links
from polder.bench.workload import agents, parted

__all__ = ["RESTART_SUFFIXES", "RestartPlan", "describe_restart", "restart_engine", "restart_metrics", "run_restart"]

RESTART_SUFFIXES = ("-before", "-restart")
TURNS = 16
"""Of each session of tiny-agent-v1."""
_SHARED, _VLLMS_REGION = Path("/dev/shm"), "vllm_offload_*.mmap"
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


def restart_engine(arm: str, engine: EnginePlan, plan: RestartPlan, links: Links, folder: Path) -> EnginePlan:
    """Engine A as `arm` serves it; `folder` is the arm's own, and holds what it keeps on disk."""
    core, *more = dict.fromkeys(two_cores())
    engine = replace(engine, core=core, more_cores=tuple(more))
    emulated = links == "emulated"
    if arm == "stock":
        return engine
    if arm == "native-fs":
        return replace(engine, extra_args=("--kv-transfer-config", _native_config(plan, folder, emulated=emulated)))
    disks = tuple(f"{folder.resolve() / f'disk{n}'}:{plan.disk_bytes}B" for n in range(plan.disks))
    rates = f"host={LINKS_BYTES_PER_S['host'] / 1e6:g}MB/s,disk={plan.disk_bytes_per_s / 1e6:g}MB/s"
    return replace(
        engine,
        sizing="fixed",
        tiers=TierPlan(store_to=("host", "disk"), host_bytes=plan.host_bytes, disks=disks),
        extra_env={"POLDER_LINKS": rates} if emulated else {},
    )


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
    of_arm = restart_engine(arm, engine, plan, links, folder)
    shared = set(_SHARED.glob(_VLLMS_REGION))
    before, after = parted(agents(model="A", users=plan.users, sessions=plan.sessions), plan.turns_before, TURNS)
    try:
        up = _started(arm, of_arm, logs, runtime)
        try:
            with report.stage(f"restart, {arm}: the first {plan.turns_before} turns of each session") as stage:
                first = asyncio.run(run_loads(up, {"A": before}, stage))
            time.sleep(SETTLE_S)
        finally:
            up.stop()
        up = _started(arm, of_arm, logs, runtime)
        try:
            with report.stage(f"restart, {arm}: the other turns, after a restart") as stage:
                second = asyncio.run(run_on(up, {"A": after}, stage))
        finally:
            up.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for left in (
            set(_SHARED.glob(_VLLMS_REGION)) - shared
        ):  # vLLM's shutdown kills its engine core before that unlinks it
            left.unlink(missing_ok=True)
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
    rate = plan.disk_bytes_per_s
    return {
        "stock": "engine A's pool alone",
        "native-fs": f"CPU tier of {plan.host_bytes} B, vLLM's file tier over one folder without a limit"
        + (f", at {plan.disks * rate / 1e6:g} MB/s each way" if links == "emulated" else ""),
        "polder-disk": f"host tier of {plan.host_bytes} B, {plan.disks} disks of {plan.disk_bytes} B"
        + (f", each at {rate / 1e6:g} MB/s" if links == "emulated" else ""),
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


def _native_config(plan: RestartPlan, folder: Path, *, emulated: bool) -> str:
    extra: dict[str, object] = {
        "spec_name": "NativeTieringSpec",
        "spec_module_path": "polder.bench.native_fs",
        "cpu_bytes_to_use": plan.host_bytes,
        "offload_prompt_only": False,
        "secondary_tiers": [{"type": "fs", "root_dir": str(folder.resolve() / "disk0")}],
    }
    if emulated:
        extra["link_bytes_per_s"] = LINKS_BYTES_PER_S["host"]
        extra["disk_bytes_per_s"] = plan.disks * plan.disk_bytes_per_s
    return json.dumps(
        {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
    )
