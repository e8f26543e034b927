"""One run: the engines of one arm under their loads, and what was seen meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

import msgspec

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import RequestRecord, Tally, Workload, measured_turns, play
from polder.bench.harness.machine import cpu_time, load_average
from polder.bench.harness.progress import Stage, following
from polder.bench.harness.scrape import gained
from polder.bench.harness.timeline import Timeline, sampling
from polder.bench.report.metrics import Metrics, RunRecords, engine_metrics, merged, percentile
from polder.bench.report.result import without_nan

__all__ = ["Run", "arm_metrics", "run_loads", "run_on", "run_once"]


class Run(msgspec.Struct, kw_only=True):
    """One run of one arm. Kept beside the result, so that reports can be made again."""

    arm: str
    started_at: float
    """perf_counter() seconds; the timeline's clock."""
    wall_s: float
    client_cpu_s: float
    load_before: float
    load_after: float
    foreign_cpu_s: float = 0.0
    """CPU seconds that others took on this machine meanwhile."""
    records: dict[str, list[RequestRecord]]
    """Engine -> requests, load included that is not measured."""
    preemptions: dict[str, float]
    timeline: Timeline
    samples: dict[str, dict[str, float]] = {}
    """Engine -> sample of its /metrics -> what the run added to it, or for a gauge its value at the end."""


async def run_once(arm: Arm, load_a: Workload, load_b: Workload, stage: Stage) -> Run:
    """Engine A under `load_a` and engine B under `load_b`, from empty prefix caches."""
    return await run_loads(arm, {"A": load_a, "B": load_b}, stage)


async def run_loads(arm: Arm, loads: Mapping[str, Workload], stage: Stage) -> Run:
    """Each engine named under its load, from empty prefix caches."""
    await asyncio.to_thread(arm.reset_prefix_caches)
    return await run_on(arm, loads, stage)


async def run_on(arm: Arm, loads: Mapping[str, Workload], stage: Stage) -> Run:
    """Each engine named under its load, with what its caches hold."""
    before, samples_before = await asyncio.to_thread(arm.preemptions), await asyncio.to_thread(arm.samples)
    load_before, cpu_before = load_average(), cpu_time()
    tally = Tally()
    total = sum(map(measured_turns, loads.values()))
    async with sampling(arm.broker) as timeline, following(stage, lambda: (tally.ended, total)):
        played = await play({engine: (arm.endpoint, load) for engine, load in loads.items()}, tally)
    foreign_cpu_s = cpu_time().foreign_since(cpu_before)
    after, samples_after = await asyncio.to_thread(arm.preemptions), await asyncio.to_thread(arm.samples)
    await asyncio.to_thread(arm.check)
    return Run(
        arm=arm.name,
        started_at=played.started_at,
        wall_s=played.wall_s,
        client_cpu_s=played.client_cpu_s,
        load_before=load_before,
        load_after=load_average(),
        foreign_cpu_s=foreign_cpu_s,
        records=played.records,
        preemptions={engine: after[engine] - before[engine] for engine in after},
        timeline=timeline,
        samples={engine: gained(samples_before[engine], samples_after[engine]) for engine in samples_after},
    )


def arm_metrics(runs: Sequence[Run], *, ideal_hit_ratio: float) -> dict[str, Metrics]:
    """Metrics of an arm's engines and of "all", over its runs."""
    by_engine = {
        engine: [RunRecords(records=run.records[engine], preemptions=run.preemptions[engine]) for run in runs]
        for engine in ("A", "B")
    }
    found = {engine: engine_metrics(records) for engine, records in by_engine.items()}
    found["all"] = engine_metrics(merged(by_engine))
    hit = found["A"]["hit_ratio"]
    assert isinstance(hit, float)
    found["A"]["hit_ratio_of_ideal"] = hit / ideal_hit_ratio
    if any(run.timeline.samples for run in runs):
        for engine in by_engine:
            givebacks = [ms for run in runs for ms in run.timeline.giveback_ms.get(engine, [])]
            found[engine] |= {
                "givebacks": float(len(givebacks)),
                "giveback_p50_ms": percentile(givebacks, 50),
                "giveback_p99_ms": percentile(givebacks, 99),
                "giveback_max_ms": max(givebacks, default=float("nan")),
            }
        found["all"] |= {
            "recalls": float(sum(run.timeline.recalls for run in runs)),
            "overdue_recalls": float(sum(run.timeline.overdue for run in runs)),
        }
    return {engine: without_nan(metrics) for engine, metrics in found.items()}
