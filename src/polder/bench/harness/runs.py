"""One run: the engines of one arm under their loads, and what was seen meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import ClosedLoop, Played, RequestRecord, Tally, Workload, greedy, measured_turns, play
from polder.bench.harness.machine import foreign_cpu_s, load_average
from polder.bench.harness.progress import Update
from polder.bench.harness.scrape import REPORTED, Samples, gained
from polder.bench.harness.timeline import Timeline, sampling

__all__ = ["Run", "ask", "play_on", "run_loads"]


class Run(Played, kw_only=True):
    """One run of one arm. Kept beside the result, so that reports can be made again."""

    arm: str
    load: str = ""
    """Which of a suite's loads, e.g. "x2"."""
    load_before: float
    load_after: float
    foreign_cpu_s: float = 0.0
    """CPU seconds that others took on this machine meanwhile."""
    timeline: Timeline
    samples: Samples
    """Engine -> sample of it -> what the run added to it, or for a gauge its value at the end."""

    def describe(self) -> dict[str, Any]:
        """What a result says of the run."""
        wakes = {engine: of.get(f"{REPORTED}wakes_total", 0.0) for engine, of in self.samples.items()}
        return {
            "arm": self.arm,
            **({"load": self.load} if self.load else {}),
            "wall_s": round(self.wall_s, 1),
            "client_cpu_s": round(self.client_cpu_s, 2),
            "load_before": self.load_before,
            "load_after": self.load_after,
            "foreign_cpu_s": round(self.foreign_cpu_s, 2),
            **({"wakes": wakes} if any(wakes.values()) else {}),
        }


async def play_on(arm: Arm, loads: Mapping[str, Workload], tally: Tally | None = None) -> Played:
    """Loads by engine, through the arm's gateway."""
    return await play({engine: (arm.url, load) for engine, load in loads.items()}, tally)


def ask(arm: Arm, engine: str, prompt: Sequence[int], output_tokens: int) -> RequestRecord:
    """One request by itself."""
    load = ClosedLoop(users=[[greedy(engine, "alone", prompt, output_tokens)]])
    return asyncio.run(play_on(arm, {engine: load})).records[engine][0]


async def run_loads(arm: Arm, loads: Mapping[str, Workload], update: Update) -> Run:
    """Each engine named under its load, with what its caches hold. Raises EnvironmentFault when an engine died."""
    samples_before = await asyncio.to_thread(arm.samples)
    load_before, foreign_before_s = load_average(), foreign_cpu_s()
    total = sum(map(measured_turns, loads.values()))
    async with sampling(arm.broker) as timeline:
        played = await play_on(arm, loads, Tally(on_end=lambda ended: update(ended, total)))
    foreign_s, load_after = foreign_cpu_s() - foreign_before_s, load_average()
    samples_after = await asyncio.to_thread(arm.samples)
    await asyncio.to_thread(arm.check)
    return Run(
        arm=arm.name,
        load_before=load_before,
        load_after=load_after,
        foreign_cpu_s=max(0.0, foreign_s),  # ticks are rounded
        timeline=timeline,
        samples={engine: gained(samples_before[engine], after) for engine, after in samples_after.items()},
        **msgspec.structs.asdict(played),
    )
