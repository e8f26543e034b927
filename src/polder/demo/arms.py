"""The same two engines in fixed halves (plain vLLM) and under one budget (`polder serve`), and one run of each."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import httpx

from polder.bench.harness.arms import Arm, ArmSpec
from polder.bench.harness.driver import RequestRecord, Tally, Workload
from polder.bench.harness.engines import EnginePlan, a_core_each
from polder.bench.harness.runs import play_on
from polder.bench.harness.timeline import MemorySample, Timeline, sampling
from polder.bench.workloads.checkpoints import SMOLLM2, ensure_checkpoint
from polder.bench.workloads.models import ModelRecipe
from polder.demo.load import CHAT, DOCS

__all__ = ["BUDGET_BYTES", "MODEL", "Seen", "make_arm", "play_watched"]

MODEL = ModelRecipe(
    name="SmolLM2-135M-Instruct",
    family="llama",
    layers=30,
    hidden=576,
    intermediate=1536,
    heads=9,
    kv_heads=3,
    vocab=49152,
    dtype="float32",
)
"""In float32 greedy tokens do not depend on which requests share a step, so the arms' answers can be compared."""
BUDGET_BYTES = 320 << 20
"""7,281 tokens. The readers' texts take about 6,000, and half of the budget holds 3,640."""
PAGE_BYTES = 96 << 10
"""Two blocks of one layer: with 2 MiB, 30 layers would change hands in steps of 60 MiB."""
LONGEST = {DOCS: 1024, CHAT: 512}
STOCK_LOOK_S = 1.0
"""An engine computes on the core that answers /metrics."""
_GAUGE = re.compile(r"^vllm:kv_cache_usage_perc\{[^}]*\} (\S+)", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Served(EnginePlan):
    """An engine that serves the downloaded model."""

    def model_path(self) -> Path:
        return ensure_checkpoint(SMOLLM2, self.models).resolve()


@dataclass(frozen=True, kw_only=True)
class Seen:
    """One run."""

    records: Mapping[str, list[RequestRecord]]
    """Model -> its requests."""
    memory: list[MemorySample]
    """`t_s` counts from the run's start."""
    wall_s: float
    timeline: Timeline
    """What the broker said; empty without one."""


def make_arm(name: str, folder: Path, runtime: Path) -> Arm:
    """ "stock" or "polder", not started. `runtime`: a short path for sockets."""
    engines = a_core_each(
        [
            Served(
                name=engine,
                recipe=MODEL,
                models=folder / "models",
                max_model_len=LONGEST[engine],
                share_bytes=BUDGET_BYTES // 2,
                memory={"page": PAGE_BYTES},
            )
            for engine in (DOCS, CHAT)
        ]
    )
    return ArmSpec("polder" if name == "polder" else "stock", engines).make(name, folder / "logs", runtime)


async def play_watched(arm: Arm, loads: Mapping[str, Workload], tally: Tally) -> Seen:
    """The loads on the arm, and who held its memory meanwhile. Raises EnvironmentFault when an engine died."""
    async with sampling(arm.broker) as timeline, _fixed_halves(arm) as halves:
        played = await play_on(arm, loads, tally)
    await asyncio.to_thread(arm.check)
    return Seen(
        records=played.records,
        memory=[_from_start(sample, played.started_at) for sample in timeline.samples or halves],
        wall_s=played.wall_s,
        timeline=timeline,
    )


@asynccontextmanager
async def _fixed_halves(arm: Arm) -> AsyncIterator[list[MemorySample]]:
    """Samples of an arm without a broker: each engine holds its half, and says how much of it running requests use."""
    samples: list[MemorySample] = []
    task = asyncio.create_task(_ask_engines(arm, samples)) if arm.broker is None else None
    try:
        yield samples
    finally:
        if task is not None:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task


async def _ask_engines(arm: Arm, samples: list[MemorySample]) -> None:
    sizes = {engine.name: BUDGET_BYTES // 2 for engine in arm.engines}
    async with httpx.AsyncClient(trust_env=False, timeout=30.0) as client:
        while True:
            texts = [(await client.get(f"{arm.urls[name]}/metrics")).text for name in sizes]
            busy = {
                name: int(size * float(found[1])) if (found := _GAUGE.search(text)) else 0
                for (name, size), text in zip(sizes.items(), texts, strict=True)
            }
            samples.append(MemorySample(t_s=perf_counter(), free_bytes=0, held_bytes=sizes, busy_bytes=busy))
            await asyncio.sleep(STOCK_LOOK_S)


def _from_start(sample: MemorySample, started_at: float) -> MemorySample:
    return MemorySample(
        t_s=sample.t_s - started_at,
        free_bytes=sample.free_bytes,
        held_bytes=sample.held_bytes,
        busy_bytes=sample.busy_bytes,
    )
