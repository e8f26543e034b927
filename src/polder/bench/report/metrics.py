"""Figures from the records of requests. Pure functions.

Definitions:

- TTFT: first token's arrival minus the moment the request was due. First turns of a user's first session are left out.
- TBT: time between two tokens of one request, all requests together; `tbt_worst10_ms` is the mean over requests of the
  mean of a request's slowest tenth of intervals (Mooncake, FAST 2025).
- Rates are over the time from the run's start to the end of the last measured request.
- Goodput: requests per second that had TTFT <= 500 ms and a slowest tenth <= 100 ms.
- Hit ratio: prompt tokens taken from a cache over all prompt tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.bench.harness.driver import RequestRecord

__all__ = [
    *("SLO_TBT_MS", "SLO_TTFT_MS", "Floats", "Interval", "Metric", "Metrics", "RunRecords", "bootstrap_interval"),
    *("busy_seconds", "engine_metrics", "merged", "percentile", "quantile_ratio_intervals", "tbts_ms", "ttfts_ms"),
]

SLO_TTFT_MS = 500.0
SLO_TBT_MS = 100.0
MOST_DRAWN = 4_000_000
"""Values in memory while resampling."""

Metric = float | dict[str, float]
Metrics = dict[str, Metric]
Interval = tuple[float, float]
"""(low, high), 95 %."""
Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RunRecords:
    """The measured requests of one engine, or of several, in one run."""

    records: Sequence[RequestRecord]
    preemptions: float = 0.0

    @property
    def counted(self) -> list[RequestRecord]:
        return [record for record in self.records if record.measured]

    @property
    def good(self) -> list[RequestRecord]:
        """Measured and answered in full."""
        return [record for record in self.counted if not record.error]

    @property
    def span_s(self) -> float:
        """From the run's start to the end of its last measured request."""
        return max((record.end_s for record in self.counted), default=0.0)


def engine_metrics(runs: Sequence[RunRecords]) -> Metrics:
    """Metrics of one engine over all runs of an arm: percentiles of the pooled requests, sums over summed time."""
    good = [record for run in runs for record in run.good]
    span_s = sum(run.span_s for run in runs)
    ttft, tbt = ttfts_ms(good), tbts_ms(good)
    worst = [_slowest_tenth_ms(record) for record in good if len(record.token_s) > 1]
    prompt = sum(record.prompt_tokens for record in good)
    cached = sum(record.cached_tokens for record in good)
    hit = _ratio(cached, prompt)
    within = [record for record in good if _within_slo(record)]
    return {
        "requests": float(len(good)),
        "failed_requests": float(sum(bool(record.error) for run in runs for record in run.counted)),
        "preemptions": sum(run.preemptions for run in runs),
        "ttft_p50_ms": percentile(ttft, 50),
        "ttft_p90_ms": percentile(ttft, 90),
        "ttft_p99_ms": percentile(ttft, 99),
        "ttft_mean_ms": float(np.mean(ttft)) if len(ttft) else math.nan,
        "tbt_p50_ms": percentile(tbt, 50),
        "tbt_p99_ms": percentile(tbt, 99),
        "tbt_worst10_ms": float(np.mean(worst)) if worst else math.nan,
        "latency_p50_ms": percentile([(r.end_s - r.scheduled_s) * 1e3 for r in good], 50),
        "latency_p99_ms": percentile([(r.end_s - r.scheduled_s) * 1e3 for r in good], 99),
        "output_tokens_per_s": _ratio(sum(len(record.token_s) for record in good), span_s),
        "prompt_tokens_per_s": _ratio(prompt, span_s),
        "computed_prompt_tokens_per_s": _ratio(prompt - cached, span_s),
        "requests_per_s": _ratio(len(good), span_s),
        "goodput_requests_per_s": _ratio(len(within), span_s),
        "slo_ratio": _ratio(len(within), sum(len(run.counted) for run in runs)),
        "makespan_s": _ratio(span_s, len(runs)),
        "hit_ratio": hit,
        "hit_ratio_by_tier": {"own": hit, "computed": 1.0 - hit},
    }


def ttfts_ms(records: Sequence[RequestRecord]) -> Floats:
    """TTFT of every answered request but the cold starts."""
    return np.array([(r.token_s[0] - r.scheduled_s) * 1e3 for r in records if r.token_s and not r.cold_start])


def percentile(values: Sequence[float] | Floats, q: float) -> float:
    """Interpolates between neighbours; nan when there are no values."""
    return float(np.percentile(values, q)) if len(values) else math.nan


def busy_seconds(records: Sequence[RequestRecord]) -> float:
    """Time during which at least one request was in the engine: the union of [sent, end]."""
    total, until = 0.0, -math.inf
    for sent_s, end_s in sorted((record.sent_s, record.end_s) for record in records):
        total += max(0.0, end_s - max(sent_s, until))
        until = max(until, end_s)
    return total


def bootstrap_interval(
    ratios: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """(low, geometric mean, high) of paired ratios, by resampling the pairs (percentile bootstrap)."""
    logs = np.log(np.asarray(ratios, dtype=np.float64))
    draws = np.random.default_rng(seed).choice(logs, size=(resamples, len(logs))).mean(axis=1)
    low, high = np.percentile(draws, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(np.exp(low)), float(np.exp(logs.mean())), float(np.exp(high))


def quantile_ratio_intervals(
    arm: Sequence[float] | Floats,
    baseline: Sequence[float] | Floats,
    *,
    quantiles: Sequence[int],
    confidence: float = 0.95,
    resamples: int = 1_000,
    seed: int = 0,
) -> list[Interval]:
    """(low, high) of the ratio of two arms' percentiles, for each quantile, by resampling the values of each arm.

    It shows how much a figure depends on the few requests in its tail. Requests of one run are not independent, so the
    true interval is wider.
    """
    rng = np.random.default_rng(seed)

    def draws(values: Sequence[float] | Floats) -> Floats:
        """[resamples, quantiles]"""
        sample = np.asarray(values, dtype=np.float64)
        at_once = max(1, MOST_DRAWN // len(sample))
        parts = [min(at_once, resamples - done) for done in range(0, resamples, at_once)]
        found = [np.percentile(rng.choice(sample, (rows, len(sample))), quantiles, axis=1).T for rows in parts]
        return np.concatenate(found)

    ratios = draws(arm) / draws(baseline)
    low, high = np.percentile(ratios, [50 * (1 - confidence), 50 * (1 + confidence)], axis=0)
    return [(float(a), float(b)) for a, b in zip(low, high, strict=True)]


def merged(runs: Mapping[str, Sequence[RunRecords]]) -> list[RunRecords]:
    """All engines of each run as one."""
    return [
        RunRecords(
            records=[record for run in engines for record in run.records],
            preemptions=sum(run.preemptions for run in engines),
        )
        for engines in zip(*runs.values(), strict=True)
    ]


def tbts_ms(records: Sequence[RequestRecord]) -> Floats:
    """All times between two tokens of one request."""
    return np.concatenate([np.diff(record.token_s) * 1e3 for record in records]) if records else np.empty(0)


def _slowest_tenth_ms(record: RequestRecord) -> float:
    intervals = np.sort(np.diff(record.token_s))
    return float(intervals[-max(1, len(intervals) // 10) :].mean() * 1e3)


def _within_slo(record: RequestRecord) -> bool:
    ttft_ms = (record.token_s[0] - record.scheduled_s) * 1e3
    return ttft_ms <= SLO_TTFT_MS and (len(record.token_s) < 2 or _slowest_tenth_ms(record) <= SLO_TBT_MS)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
