"""One run: the engines of one arm under their loads, and what was seen meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from polder.bench.harness.arms import Arm
from polder.bench.harness.control import WeightCounts
from polder.bench.harness.driver import (
    ClosedLoop,
    Played,
    RequestRecord,
    Tally,
    Workload,
    greedy,
    measured_turns,
    play,
)
from polder.bench.harness.machine import cpu_time, load_average
from polder.bench.harness.progress import Stage, following
from polder.bench.harness.scrape import PREEMPTIONS, gained
from polder.bench.harness.timeline import Timeline, sampling

__all__ = ["Run", "ask", "play_on", "run_loads"]


class Run(msgspec.Struct, kw_only=True):
    """One run of one arm. Kept beside the result, so that reports can be made again."""

    arm: str
    load: str = ""
    """Which of a suite's loads, e.g. "x2"."""
    started_at: float
    """perf_counter() seconds; the timeline's clock."""
    wall_s: float
    client_cpu_s: float
    load_before: float
    load_after: float
    foreign_cpu_s: float = 0.0
    """CPU seconds that others took on this machine meanwhile."""
    records: dict[str, list[RequestRecord]]
    """Engine -> requests, also those that are load only."""
    preemptions: dict[str, float]
    timeline: Timeline
    samples: dict[str, dict[str, float]] = {}
    """Engine -> sample of its /metrics -> what the run added to it, or for a gauge its value at the end."""
    weights: WeightCounts = {}
    """Engine -> metric -> what the run added; empty where weights cannot move."""

    def describe(self) -> dict[str, Any]:
        """What a result says of the run."""
        wakes = {engine: counts["wakes"] for engine, counts in self.weights.items()}
        return {
            "arm": self.arm,
            **({"load": self.load} if self.load else {}),
            "wall_s": round(self.wall_s, 1),
            "client_cpu_s": round(self.client_cpu_s, 2),
            "load_before": self.load_before,
            "load_after": self.load_after,
            "foreign_cpu_s": round(self.foreign_cpu_s, 2),
            **({"wakes": wakes} if wakes else {}),
        }


async def play_on(arm: Arm, loads: Mapping[str, Workload], tally: Tally | None = None) -> Played:
    """Loads by engine, through the arm's gateway."""
    return await play({engine: (arm.url, load) for engine, load in loads.items()}, tally)


def ask(arm: Arm, engine: str, prompt: Sequence[int], output_tokens: int) -> RequestRecord:
    """One request by itself."""
    load = ClosedLoop(users=[[greedy(engine, "alone", prompt, output_tokens)]])
    return asyncio.run(play_on(arm, {engine: load})).records[engine][0]


async def run_loads(arm: Arm, loads: Mapping[str, Workload], stage: Stage) -> Run:
    """Each engine named under its load, with what its caches hold. Raises EnvironmentFault when an engine died."""
    samples_before = await asyncio.to_thread(arm.samples)
    load_before, cpu_before = load_average(), cpu_time()
    tally, total = Tally(), sum(map(measured_turns, loads.values()))
    async with sampling(arm.broker) as timeline, following(stage, lambda: (tally.ended, total)):
        played = await play_on(arm, loads, tally)
    foreign_cpu_s = cpu_time().foreign_since(cpu_before)
    samples_after = await asyncio.to_thread(arm.samples)
    await asyncio.to_thread(arm.check)
    samples = {engine: gained(samples_before[engine], after) for engine, after in samples_after.items()}
    return Run(
        arm=arm.name,
        started_at=played.started_at,
        wall_s=played.wall_s,
        client_cpu_s=played.client_cpu_s,
        load_before=load_before,
        load_after=load_average(),
        foreign_cpu_s=foreign_cpu_s,
        records=played.records,
        preemptions={engine: of.pop(PREEMPTIONS, 0.0) for engine, of in samples.items()},
        timeline=timeline,
        samples=samples,
    )
