"""From the runs of an arm of `polder bench tenants` to its figures, engine by engine and for all of them together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import msgspec

from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.runs import Run
from polder.bench.harness.weights import COUNTERS, WeightCounts
from polder.bench.report.metrics import (
    Metrics,
    RunRecords,
    engine_metrics,
    merged,
    percentile,
    quantile_ratio_interval,
    tbts_ms,
    ttfts_ms,
)
from polder.bench.report.result import without_nan

__all__ = ["EXHAUSTED_PART", "TenantsRun", "exhausted_seconds", "ratio_intervals", "tenants_metrics"]

EXHAUSTED_PART = 0.05
"""A rate exhausts a pool when the contexts asked for at once do not fit it for longer than this part of the time with work."""
QUANTILES = (50, 99)


class TenantsRun(msgspec.Struct, kw_only=True):
    """One run, and what it made of the weights."""

    load: str
    """ "x2": the temporal stage at rate 2; "spatial"."""
    run: Run
    weights: WeightCounts
    """Engine -> metric -> what the run added; empty where weights cannot move."""


def tenants_metrics(runs: Sequence[TenantsRun], *, pool_tokens: Mapping[str, int]) -> dict[str, Metrics]:
    """Metrics of each engine that had requests, and of "all". `pool_tokens`: what stock's pool of each engine holds."""
    engines = [engine for engine in pool_tokens if any(run.run.records.get(engine) for run in runs)]
    records = {
        engine: [RunRecords(records=run.run.records[engine], preemptions=run.run.preemptions[engine]) for run in runs]
        for engine in engines
    }
    found = {engine: engine_metrics(of_engine) for engine, of_engine in records.items()}
    found["all"] = engine_metrics(merged(records))
    times = {
        engine: [exhausted_seconds(run.records, pool_tokens[engine]) for run in of_engine]
        for engine, of_engine in records.items()
    }
    for name, of in (*((engine, [engine]) for engine in engines), ("all", engines)):
        busy_s, exhausted_s = (sum(pair[i] for engine in of for pair in times[engine]) for i in (0, 1))
        found[name]["kv_exhausted_part"] = exhausted_s / busy_s if busy_s else 0.0
        givebacks = [ms for run in runs for engine in of for ms in run.run.timeline.giveback_ms.get(engine, [])]
        found[name]["giveback_p99_ms"] = percentile(givebacks, 99)
    for name in found:
        found[name] |= _weights(runs, name)
    return {engine: without_nan(metrics) for engine, metrics in found.items()}


def exhausted_seconds(records: Sequence[RequestRecord], pool_tokens: int) -> tuple[float, float]:
    """(time with requests, of it the time in which their contexts together are more than `pool_tokens`).

    What was asked for, not what the engine held: it is the same question to all arms, and costs no sampling.
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


def ratio_intervals(
    arm: Sequence[TenantsRun], baseline: Sequence[TenantsRun], *, name: str
) -> dict[str, tuple[float, float]]:
    """95 % intervals of `name` ("ARM/BASELINE"), all engines together, by resampling requests (TTFT) or gaps (TBT)."""
    over, under = _good(arm), _good(baseline)
    intervals: dict[str, tuple[float, float]] = {}
    for metric, values in (("ttft", ttfts_ms), ("tbt", tbts_ms)):
        ours, theirs = values(over), values(under)
        for q in QUANTILES if len(ours) and len(theirs) else ():
            intervals[f"{name}:all.{metric}_p{q}_ms"] = quantile_ratio_interval(ours, theirs, q=q, resamples=500)
    return intervals


def _good(runs: Sequence[TenantsRun]) -> list[RequestRecord]:
    return [r for run in runs for records in run.run.records.values() for r in RunRecords(records=records).good]


def _weights(runs: Sequence[TenantsRun], name: str) -> Metrics:
    """Of one engine, or summed over all that were up, those without requests too."""
    gains = [gain for run in runs for engine, gain in run.weights.items() if name in (engine, "all")]
    return {metric: sum(gain[metric] for gain in gains) for metric in COUNTERS} if gains else {}
