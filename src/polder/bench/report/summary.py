"""Figures of an arm over all of its runs, and the intervals of the ratios of two arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from polder.bench.harness.control import WEIGHT_COUNTERS
from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.runs import Run
from polder.bench.harness.scrape import TIER_HITS, summed
from polder.bench.report.metrics import (
    Floats,
    Interval,
    Metrics,
    RunRecords,
    engine_metrics,
    merged,
    percentile,
    quantile_ratio_intervals,
    tbts_ms,
    ttfts_ms,
)
from polder.bench.report.result import BenchResult, without_nan

__all__ = ["agent_metrics", "arm_metrics", "exhausted_loads", "exhausted_seconds", "ratio_intervals", "weight_metrics"]

QUANTILES = (50, 90, 99)
EXHAUSTED_PART = 0.05
"""A load exhausts stock's pools when its contexts do not fit them for more than this part of the time with work."""


def arm_metrics(runs: Sequence[Run]) -> dict[str, Metrics]:
    """Metrics of each engine that had requests and of "all", with give-backs and recalls where a broker was watched."""
    engines = [engine for engine in runs[0].records if any(run.records.get(engine) for run in runs)]
    records = {e: [RunRecords(records=run.records[e], preemptions=run.preemptions[e]) for run in runs] for e in engines}
    found = {engine: engine_metrics(of_engine) for engine, of_engine in records.items()}
    found["all"] = engine_metrics(merged(records))
    if any(run.timeline.samples for run in runs):
        for name in found:
            of = engines if name == "all" else [name]
            ms = [ms for run in runs for engine in of for ms in run.timeline.giveback_ms.get(engine, [])]
            found[name] |= {
                "givebacks": float(len(ms)),
                "giveback_p50_ms": percentile(ms, 50),
                "giveback_p99_ms": percentile(ms, 99),
                "giveback_max_ms": max(ms, default=float("nan")),
            }
        found["all"]["recalls"] = float(sum(run.timeline.recalls for run in runs))
        found["all"]["overdue_recalls"] = float(sum(run.timeline.overdue for run in runs))
    return {engine: without_nan(metrics) for engine, metrics in found.items()}


def agent_metrics(runs: Sequence[Run], ideal: float | None) -> dict[str, Metrics]:
    """As `arm_metrics`, with each engine's own counters, and the hit ratio of engine A split by who served it.

    `ideal`: the hit ratio of A with a cache without limit; None: A is load only, so B alone is reported.
    """
    found = arm_metrics(runs)
    counters = {engine: summed([run.samples.get(engine, {}) for run in runs]) for engine in ("A", "B")}
    for engine, of in counters.items():
        found[engine]["counters"] = of
    if ideal is None:
        return {"B": found["B"]}
    hit, prompt = found["A"]["hit_ratio"], sum(r.prompt_tokens for run in runs for r in run.records["A"] if r.measured)
    assert isinstance(hit, float)
    tier = min(counters["A"].get(TIER_HITS, 0.0) / prompt if prompt else 0.0, hit)
    by_tier = {"own": hit - tier, "tiers": tier, "computed": 1.0 - hit}
    found["A"] |= {"hit_ratio_of_ideal": hit / ideal, "tier_hit_ratio": tier, "hit_ratio_by_tier": by_tier}
    return found


def weight_metrics(runs: Sequence[Run], pool_tokens: Mapping[str, int], name: str) -> Metrics:
    """What moved of the weights of one engine or of "all", and the part of the time in which stock's pool is too small.

    `pool_tokens`: engine -> tokens that stock's pool holds. Engines without requests count in "all" too.
    """
    times = [
        exhausted_seconds(run.records[engine], tokens)
        for run in runs
        for engine, tokens in pool_tokens.items()
        if name in (engine, "all") and run.records.get(engine)
    ]
    busy_s, exhausted_s = (sum(pair[i] for pair in times) for i in (0, 1))
    gains = [gain for run in runs for engine, gain in run.weights.items() if name in (engine, "all")]
    moved = {metric: sum(gain[metric] for gain in gains) for metric in WEIGHT_COUNTERS} if gains else {}
    return {"kv_exhausted_part": exhausted_s / busy_s if busy_s else 0.0, **moved}


def exhausted_seconds(records: Sequence[RequestRecord], pool_tokens: int) -> tuple[float, float]:
    """(time with requests, part of it in which their contexts together are more than `pool_tokens`), in seconds.

    It counts what was asked for, not what the engine held: the same question to all arms, without any sampling.
    """
    changes = sorted(
        (at_s, sign * (record.prompt_tokens + len(record.token_s)))
        for record in records
        if not record.error
        for at_s, sign in ((record.sent_s, 1), (record.end_s, -1))
    )
    busy_s = exhausted_s = 0.0
    wanted = 0
    for (at_s, tokens), (until_s, _) in pairwise(changes):
        wanted += tokens
        busy_s += (until_s - at_s) * (wanted > 0)
        exhausted_s += (until_s - at_s) * (wanted > pool_tokens)
    return busy_s, exhausted_s


def exhausted_loads(result: BenchResult, loads: Sequence[str]) -> list[str]:
    """Those of `loads` ("x2", ...) at which stock had more contexts to serve than its pools hold, or had to preempt."""
    parts = {load: result.figure(f"stock-{load}:all.kv_exhausted_part") for load in loads}
    preempted = {load: result.figure(f"stock-{load}:all.preemptions") for load in loads}
    return [load for load in loads if (parts[load] or 0) > EXHAUSTED_PART or (preempted[load] or 0) > 0]


def ratio_intervals(
    arm: Sequence[Run], baseline: Sequence[Run], *, name: str, engines: Sequence[str]
) -> dict[str, Interval]:
    """95 % intervals of `name` ("ARM/BASELINE") for percentiles of TTFT (requests resampled) and TBT (gaps resampled).

    The engine "all" stands for all engines together.
    """
    intervals: dict[str, Interval] = {}
    for engine in engines:
        for metric, values in (("ttft", ttfts_ms), ("tbt", tbts_ms)):
            over, under = (_pooled(runs, engine, values) for runs in (arm, baseline))
            if len(over) and len(under):
                found = quantile_ratio_intervals(over, under, quantiles=QUANTILES)
                keys = (f"{name}:{engine}.{metric}_p{q}_ms" for q in QUANTILES)
                intervals |= dict(zip(keys, found, strict=True))
    return intervals


def _pooled(runs: Sequence[Run], engine: str, values: object) -> Floats:
    assert callable(values)
    of_runs = [
        values(RunRecords(records=records).good)
        for run in runs
        for name, records in run.records.items()
        if engine in (name, "all")
    ]
    return np.concatenate(of_runs) if of_runs else np.empty(0)
