"""From the runs of an arm of `polder bench turns` to its figures and their intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.runs import Run, arm_metrics
from polder.bench.harness.scrape import summed
from polder.bench.report.metrics import (
    Floats,
    Metrics,
    RunRecords,
    quantile_ratio_interval,
    tbts_ms,
    ttfts_ms,
)
from polder.bench.turns_equality import TIER_HITS

__all__ = ["ratio_intervals", "turns_metrics"]

QUANTILES = (50, 90, 99)
_Values = Callable[[Sequence[RequestRecord]], Floats]


def turns_metrics(runs: Sequence[Run], *, ideal_hit_ratio: float) -> dict[str, Metrics]:
    """As `arm_metrics`, with the hit ratio split by who served, and each engine's own counters under "counters"."""
    found = arm_metrics(runs, ideal_hit_ratio=ideal_hit_ratio)
    for engine in ("A", "B"):
        counters = summed([run.samples.get(engine, {}) for run in runs])
        prompt = sum(r.prompt_tokens for run in runs for r in RunRecords(records=run.records[engine]).counted)
        hit, tier = found[engine]["hit_ratio"], counters.get(TIER_HITS, 0.0) / prompt if prompt else 0.0
        assert isinstance(hit, float)
        if engine == "A":  # of B, unmeasured load is in the counters too
            tier = min(tier, hit)
            found[engine]["tier_hit_ratio"] = tier
            found[engine]["hit_ratio_by_tier"] = {"own": hit - tier, "tiers": tier, "computed": 1.0 - hit}
        found[engine]["counters"] = counters
    return found


def ratio_intervals(
    arm: Sequence[Run], baseline: Sequence[Run], *, name: str, engines: Sequence[str] = ("A", "B")
) -> dict[str, tuple[float, float]]:
    """95 % intervals of `name` ("ARM/BASELINE") for TTFT and TBT percentiles, by resampling requests (TTFT) or gaps (TBT)."""
    intervals: dict[str, tuple[float, float]] = {}
    for engine in engines:
        for metric, values in (("ttft", ttfts_ms), ("tbt", tbts_ms)):
            over, under = (_pooled(runs, engine, values) for runs in (arm, baseline))
            for q in QUANTILES if metric == "ttft" else (99,):
                if len(over) and len(under):
                    key = f"{name}:{engine}.{metric}_p{q}_ms"
                    intervals[key] = quantile_ratio_interval(over, under, q=q, resamples=1000)
    return intervals


def _pooled(runs: Sequence[Run], engine: str, values: _Values) -> Floats:
    of_runs = [values(RunRecords(records=run.records[engine]).good) for run in runs]
    return np.concatenate(of_runs) if of_runs else np.empty(0)
