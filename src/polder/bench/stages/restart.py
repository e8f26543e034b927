"""What is left after a restart? Agents are stopped half-way, and go on with an arm that was started anew over the same
disks.

Each arm serves the first turns of every session, is ended, comes up again, and serves the other turns. Engine A is
alone, on both cores, with a small host tier over disks. Disks are emulated, and equally fast in all arms together.
Stock has nothing after the restart, vLLM's own tiers have files, Polder has its disk tier.
"""

from __future__ import annotations

import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from polder.bench.harness.arms import Arm, ArmGroup, ArmPool, ArmSpec
from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan, links_env
from polder.bench.harness.runs import Run
from polder.bench.native import offloading_args
from polder.bench.report.metrics import Metrics, arm_metrics, good
from polder.bench.workloads.agents import TURNS
from polder.bench.workloads.models import MODEL_A
from polder.engines.vllm.tiers.disk import staged_pages

__all__ = [
    "ARMS",
    "SUFFIXES",
    "TURNS_BEFORE",
    "empty_disks",
    "offload_file",
    "restart_arm",
    "restart_metrics",
    "served",
]

ARMS = ("stock", "native-fs", "polder-disk")
SUFFIXES = ("-before", "-restart")
TURNS_BEFORE = TURNS // 2
SETTLE_S = 4.0
"""After the last reply, for writes under way: every arm gets it."""
HOST_BYTES = 64 << 20
DISKS, DISK_BYTES, DISK_BYTES_PER_S = 4, 256 << 20, 75e6
"""The limit and the rate of each disk. Together they are slower than the emulated host link."""
_PAGE_BYTES = BLOCK_TOKENS * MODEL_A.kv_bytes_per_token
STAGED_BYTES = staged_pages(_PAGE_BYTES) * _PAGE_BYTES
"""Polder's memory for pages on their way from and to disk."""
NATIVE_BYTES = HOST_BYTES + STAGED_BYTES


def restart_arm(name: str, engine: EnginePlan, folder: Path, engine_id: str, host_bytes_per_s: float | None) -> ArmSpec:
    """Engine A as the arm serves it.

    `folder`: the arm's own, for what it keeps on disk. `engine_id`: for vLLM's file tier. `host_bytes_per_s`: of the
    emulated host link; None: links and disks are not emulated.
    """
    if name == "stock":
        return ArmSpec("stock", [engine])
    if name == "native-fs":
        options: dict[str, Any] = {"secondary_tiers": [{"type": "fs", "root_dir": str(folder.resolve() / "disk0")}]}
        if host_bytes_per_s:
            options |= {"link_bytes_per_s": host_bytes_per_s, "disk_bytes_per_s": DISKS * DISK_BYTES_PER_S}
        args = offloading_args("NativeTieringSpec", NATIVE_BYTES, engine_id=engine_id, **options)
        return ArmSpec("stock", [replace(engine, extra_args=args)])
    disks = [f"{folder.resolve() / f'disk{n}'}:{DISK_BYTES}B" for n in range(DISKS)]
    links = links_env({"host": host_bytes_per_s, "disk": DISK_BYTES_PER_S} if host_bytes_per_s else {})
    tiers = engine.of_fixed_size().with_keys(tiers=["host", "disk"], host=HOST_BYTES)
    return ArmSpec("polder", [replace(tiers, memory={"disks": disks}, extra_env=links)])


@contextmanager
def empty_disks(name: str, workdir: Path) -> Iterator[Path]:
    """A folder for what the arm keeps on disk, gone at the end."""
    folder = workdir / f"restart-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    for number in range(DISKS):
        (folder / f"disk{number}").mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def served(name: str, pool: ArmPool, engine: EnginePlan, folder: Path, host_bytes_per_s: float | None) -> Iterator[Arm]:
    """The arm, up until the block ends. Raises EnvironmentFault when an engine fails."""
    engine_id = f"polder-bench-{uuid.uuid4()}"  # its own: no engine opens, or loses, what is another's
    spec = restart_arm(name, engine, folder, engine_id, host_bytes_per_s)
    try:
        yield pool.get(ArmGroup(lambda _: spec, "-restart"), name)
        time.sleep(SETTLE_S)
    finally:
        pool.stop()
        with suppress(OSError):  # vLLM's shutdown kills its engine core before that unlinks the file
            offload_file(engine_id).unlink()


def restart_metrics(runs: Sequence[Run]) -> dict[str, Metrics]:
    """Metrics of engine A. `first_turn_hit_ratio` is that of the prompts that come first of their sessions."""
    firsts = [record for run in runs for record in _first_turns(good(run.records["A"]))]
    prompt = sum(record.prompt_tokens for record in firsts)
    hit = sum(record.cached_tokens for record in firsts) / prompt if prompt else 0.0
    return {"A": arm_metrics(runs)["A"] | {"first_turn_hit_ratio": hit}}


def offload_file(engine_id: str) -> Path:
    """The shared memory that vLLM's connector makes for an engine."""
    return Path("/dev/shm") / f"vllm_offload_{engine_id}.mmap"


def _first_turns(records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """A user's turns are due one after the other, so the first one due is the session's first."""
    firsts: dict[str, RequestRecord] = {}
    for record in sorted(records, key=lambda record: record.scheduled_s):
        firsts.setdefault(record.key.partition("t")[0], record)
    return list(firsts.values())
