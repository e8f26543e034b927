"""What several legs, each a run of the same requests from empty caches, say beyond one: how much figures differ from
leg to leg, and whether answers do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.runs import Run
from polder.bench.report import metrics
from polder.bench.report.metrics import Floats, Interval, Metrics, good, interval_ends, tbts_ms, ttfts_ms

__all__ = ["HOW", "compare_legs", "leg_intervals"]

HOW = "95 %, bootstrap: legs resampled, and within each leg its requests (TTFT) or gaps (TBT)"
RATES = ("output_tokens_per_s", "requests_per_s", "computed_prompt_tokens_per_s", "hit_ratio", "makespan_s")


def leg_intervals(arm: Sequence[Run], baseline: Sequence[Run], *, name: str) -> dict[str, Interval]:
    """Intervals of the ratio `name` ("ARM/BASELINE"), of each engine and of "all". With one leg there are none of
    rates."""
    found: dict[str, Interval] = {}
    rng = np.random.default_rng(0)
    for engine in (*arm[0].records, "all"):
        over, under = ([_records(run, engine) for run in runs] for runs in (arm, baseline))
        for metric, values in (("ttft", ttfts_ms), ("tbt", tbts_ms)):
            legs = [[values(good(of)) for of in side] for side in (over, under)]
            if all(len(leg) for side in legs for leg in side):
                a, b = (_draws(side, partial(_quantiles, rng=rng), rng) for side in legs)
                ends = interval_ends(a / b)
                found |= {
                    f"{name}:{engine}.{metric}_p{q}_ms": end for q, end in zip(metrics.QUANTILES, ends, strict=True)
                }
        if len(arm) > 1 and len(baseline) > 1:
            a, b = (_draws([_rates(of) for of in side], _means, rng) for side in (over, under))
            for number, metric in enumerate(RATES):
                if np.all(b[:, number] > 0):
                    found[f"{name}:{engine}.{metric}"] = interval_ends(a[:, [number]] / b[:, [number]])[0]
    return found


def compare_legs(legs: Sequence[Run], first: Run) -> Metrics:
    """How many answers of `legs` are not, token by token, those of `first`. Requests share steps in other ways in each
    leg, so plain vLLM in half precision differs from itself too."""
    expected = {record.key: record for records in first.records.values() for record in good(records)}
    pairs = [
        (record.output_ids, expected[record.key].output_ids)
        for leg in legs
        for records in leg.records.values()
        for record in good(records)
        if record.key in expected
    ]
    return {
        "answers_compared": float(len(pairs)),
        "answers_different": float(sum(ours != theirs for ours, theirs in pairs)),
        "tokens_compared": float(sum(len(theirs) for _, theirs in pairs)),
    }


def _records(run: Run, engine: str) -> list[RequestRecord]:
    return [record for name, of in run.records.items() if engine in (name, "all") for record in of]


def _rates(records: Sequence[RequestRecord]) -> Floats:
    found = metrics.engine_metrics([records])
    return np.array([found[rate] for rate in RATES])


def _quantiles(legs: Sequence[Floats], rng: np.random.Generator) -> Floats:
    """Those of a resample of each leg's values."""
    quantiles: Floats = np.percentile(np.concatenate([rng.choice(leg, len(leg)) for leg in legs]), metrics.QUANTILES)
    return quantiles


def _means(legs: Sequence[Floats]) -> Floats:
    means: Floats = np.mean(legs, axis=0)
    return means


def _draws(legs: Sequence[Floats], statistic: Callable[[Sequence[Floats]], Floats], rng: np.random.Generator) -> Floats:
    """The statistic of `metrics.RESAMPLES` resamples of legs, a row for each."""
    numbers = rng.integers(len(legs), size=(metrics.RESAMPLES, len(legs)))
    return np.array([statistic([legs[number] for number in row]) for row in numbers])
