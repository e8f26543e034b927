"""Figures from the records of requests, of one arm over all of its runs, and intervals of two arms' ratios.

Definitions:

- TTFT: first token's arrival minus the moment the request was due. First turns of a user's first session are left out.
- TBT: time between two tokens of one request, all requests together; `tbt_worst10_ms` is the mean over requests of the
  mean of a request's slowest tenth of intervals (Mooncake, FAST 2025).
- Rates are over the time from the run's start to the end of the last measured request.
- Goodput: requests per second that had TTFT <= 500 ms and a slowest tenth <= 100 ms.
- Hit ratio: prompt tokens taken from a cache over all prompt tokens.
- Load that is not measured counts nowhere; of a failed request only that it failed, and the time until its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.runs import Run
from polder.bench.harness.scrape import PREEMPTIONS, REPORTED, TIER_HITS, summed

__all__ = [
    *("WEIGHT_COUNTERS", "Interval", "Metric", "Metrics", "agent_metrics", "arm_metrics", "busy_seconds"),
    "engine_metrics",
    *(
        "exhausted_seconds",
        "good",
        "interval_ends",
        "paired_interval",
        "percentile",
        "quantile_intervals",
        "ratio_intervals",
    ),
    *("tbts_ms", "ttfts_ms", "weight_metrics", "without_nan"),
]

SLO_TTFT_MS, SLO_TBT_MS = 500.0, 100.0
QUANTILES = (50, 90, 99)
CONFIDENCE = 0.95
RESAMPLES = 1000
"""For intervals of percentiles."""
WEIGHT_COUNTERS = {
    "wakes": f"{REPORTED}wakes_total",
    "sleeps": f"{REPORTED}sleeps_total",
    "wake_seconds": f"{REPORTED}wake_seconds_total",
    "layers_loaded": f"{REPORTED}weights_loads_total",
    "weights_loaded_bytes": f"{REPORTED}weights_loaded_bytes_total",
    "weights_stall_seconds": f"{REPORTED}weights_stall_seconds_total",
}
"""Metric -> sample. `wake_seconds`: from a request to mapped pages."""

Metric = float | dict[str, float]
Metrics = dict[str, Metric]
Interval = tuple[float, float]
"""(low, high), 95 %."""
Floats = npt.NDArray[np.float64]
Records = Sequence[RequestRecord]


def good(records: Records) -> list[RequestRecord]:
    """Measured and answered in full."""
    return [record for record in records if record.measured and not record.error]


def ttfts_ms(records: Records) -> Floats:
    """TTFT of every answered request but the cold starts."""
    return np.array([(r.token_s[0] - r.scheduled_s) * 1e3 for r in records if r.token_s and not r.cold_start])


def tbts_ms(records: Records) -> Floats:
    """All times between two tokens of one request."""
    return np.concatenate([np.diff(record.token_s) * 1e3 for record in records]) if records else np.empty(0)


def percentile(values: Sequence[float] | Floats, q: float) -> float:
    """Interpolates between neighbours; nan when there are no values."""
    return float(np.percentile(values, q)) if len(values) else math.nan


def without_nan(metrics: Mapping[str, Metric]) -> Metrics:
    """Leaves out what could not be measured: JSON has no NaN."""
    return {name: value for name, value in metrics.items() if isinstance(value, dict) or math.isfinite(value)}


def busy_seconds(records: Records) -> float:
    """Time during which at least one request was in the engine: the union of [sent, end]."""
    total, until = 0.0, -math.inf
    for sent_s, end_s in sorted((record.sent_s, record.end_s) for record in records):
        total += max(0.0, end_s - max(sent_s, until))
        until = max(until, end_s)
    return total


def engine_metrics(runs: Sequence[Records], preemptions: float = 0.0, tier_tokens: float = 0.0) -> Metrics:
    """Metrics of one engine over all runs of an arm: percentiles of the pooled requests, sums over summed time.

    `tier_tokens`: prompt tokens that tiers served, of all requests.
    """
    counted = [[record for record in run if record.measured] for run in runs]
    answered = [record for run in counted for record in good(run)]
    span_s = sum(max((record.end_s for record in run), default=0.0) for run in counted)
    ttft, tbt = ttfts_ms(answered), tbts_ms(answered)
    latency = [(r.end_s - r.scheduled_s) * 1e3 for r in answered]
    worst = [_slowest_tenth_ms(record) for record in answered if len(record.token_s) > 1]
    prompt = sum(record.prompt_tokens for record in answered)
    cached = sum(record.cached_tokens for record in answered)
    within, hit = sum(map(_within_slo, answered)), _ratio(cached, prompt)
    tier = min(_ratio(tier_tokens, sum(record.prompt_tokens for run in counted for record in run)), hit)
    return {
        "requests": float(len(answered)),
        "failed_requests": float(sum(bool(record.error) for run in counted for record in run)),
        "preemptions": preemptions,
        **{f"ttft_p{q}_ms": percentile(ttft, q) for q in QUANTILES},
        "ttft_mean_ms": float(np.mean(ttft)) if len(ttft) else math.nan,
        **{f"tbt_p{q}_ms": percentile(tbt, q) for q in (50, 99)},
        "tbt_worst10_ms": float(np.mean(worst)) if worst else math.nan,
        **{f"latency_p{q}_ms": percentile(latency, q) for q in (50, 99)},
        "output_tokens_per_s": _ratio(sum(len(record.token_s) for record in answered), span_s),
        "prompt_tokens_per_s": _ratio(prompt, span_s),
        "computed_prompt_tokens_per_s": _ratio(prompt - cached, span_s),
        "requests_per_s": _ratio(len(answered), span_s),
        "goodput_requests_per_s": _ratio(within, span_s),
        "slo_ratio": _ratio(within, sum(map(len, counted))),
        "makespan_s": _ratio(span_s, len(runs)),
        "hit_ratio": hit,
        "tier_hit_ratio": tier,
        "hit_ratio_by_tier": {"own": hit - tier, "tiers": tier, "computed": 1.0 - hit},
    }


def _slowest_tenth_ms(record: RequestRecord) -> float:
    intervals = np.sort(np.diff(record.token_s))
    return float(intervals[-max(1, len(intervals) // 10) :].mean() * 1e3)


def _within_slo(record: RequestRecord) -> bool:
    ttft_ms = (record.token_s[0] - record.scheduled_s) * 1e3
    return ttft_ms <= SLO_TTFT_MS and (len(record.token_s) < 2 or _slowest_tenth_ms(record) <= SLO_TBT_MS)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


# ---------------------------------------------------------------------- of an arm


def arm_metrics(runs: Sequence[Run]) -> dict[str, Metrics]:
    """Metrics of each engine that had requests and of "all", with give-backs and recalls where a broker was watched.

    The hit ratio is split by who served it. An engine by itself also has `counters`, what was scraped from it in all runs.
    """
    used = [engine for engine in runs[0].records if any(run.records.get(engine) for run in runs)]
    counters = {engine: summed([run.samples.get(engine, {}) for run in runs]) for engine in used}
    found: dict[str, Metrics] = {}
    for name in (*used, "all"):
        engines = used if name == "all" else [name]
        records = [[record for engine in engines for record in run.records[engine]] for run in runs]
        of_tiers, preemptions = (sum(counters[e].get(key, 0.0) for e in engines) for key in (TIER_HITS, PREEMPTIONS))
        found[name] = engine_metrics(records, preemptions, of_tiers)
        if any(run.timeline.samples for run in runs):
            ms = [ms for run in runs for engine in engines for ms in run.timeline.giveback_ms.get(engine, [])]
            found[name] |= {
                "givebacks": float(len(ms)),
                "giveback_p50_ms": percentile(ms, 50),
                "giveback_p99_ms": percentile(ms, 99),
                "giveback_max_ms": max(ms, default=math.nan),
            }
    if any(run.timeline.samples for run in runs):
        found["all"]["recalls"] = float(sum(run.timeline.recalls for run in runs))
        found["all"]["overdue_recalls"] = float(sum(run.timeline.overdue for run in runs))
    for engine in used:
        found[engine]["counters"] = {n: of for n, of in counters[engine].items() if not n.startswith(REPORTED)}
    return {name: without_nan(metrics) for name, metrics in found.items()}


def agent_metrics(runs: Sequence[Run], ideal: float | None) -> dict[str, Metrics]:
    """As `arm_metrics`, for engines named A and B. `ideal`: the hit ratio of A with a cache without limit; None: A is
    load only, so B alone is reported."""
    found = arm_metrics(runs)
    if ideal is None:
        return {"B": found["B"]}
    found["A"]["hit_ratio_of_ideal"] = cast("float", found["A"]["hit_ratio"]) / ideal
    return found


def weight_metrics(runs: Sequence[Run], pool_tokens: Mapping[str, int], name: str) -> Metrics:
    """What moved of the weights of one engine or of "all", and the part of the time in which stock's pool is too small.

    `pool_tokens`: engine -> tokens that stock's pool holds. Engines without requests count in "all" too.
    """
    engines = [engine for engine in pool_tokens if name in (engine, "all")]
    times = [exhausted_seconds(run.records.get(engine, ()), pool_tokens[engine]) for run in runs for engine in engines]
    busy_s, exhausted_s = (sum(column) for column in zip(*times, strict=True))
    counts = summed([run.samples.get(engine, {}) for run in runs for engine in engines])
    moved = {metric: counts[sample] for metric, sample in WEIGHT_COUNTERS.items() if sample in counts}
    return {"kv_exhausted_part": _ratio(exhausted_s, busy_s), **moved}


def exhausted_seconds(records: Records, pool_tokens: int) -> tuple[float, float]:
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


# ---------------------------------------------------------------------- intervals, by bootstrap


def ratio_intervals(arm: Sequence[Run], baseline: Sequence[Run], *, name: str) -> dict[str, Interval]:
    """Intervals of `name` ("ARM/BASELINE") for percentiles of TTFT (requests resampled) and TBT (gaps resampled), of
    each engine and of "all"."""
    intervals: dict[str, Interval] = {}
    for engine in (*arm[0].records, "all"):
        for metric, values in (("ttft", ttfts_ms), ("tbt", tbts_ms)):
            over, under = (
                values([r for run in runs for e, of in run.records.items() if engine in (e, "all") for r in good(of)])
                for runs in (arm, baseline)
            )
            if len(over) and len(under):
                found = quantile_intervals(over, under, QUANTILES)
                keys = (f"{name}:{engine}.{metric}_p{q}_ms" for q in QUANTILES)
                intervals |= dict(zip(keys, found, strict=True))
    return intervals


def quantile_intervals(arm: Floats, baseline: Floats, quantiles: Sequence[int]) -> list[Interval]:
    """(low, high) of the ratio of two arms' percentiles, for each quantile, by resampling the values of each arm.

    It shows how much a figure depends on the few requests in its tail. Requests of one run are not independent, so the
    true interval is wider.
    """
    rng = np.random.default_rng(0)
    over, under = (_draws(of, lambda drawn: np.percentile(drawn, quantiles), rng, RESAMPLES) for of in (arm, baseline))
    return interval_ends(over / under)


def paired_interval(ratios: Sequence[float]) -> Interval:
    """(low, high) of the geometric mean of paired ratios, by resampling the pairs."""
    means = _draws(np.log(ratios), np.mean, np.random.default_rng(0), 10 * RESAMPLES)
    return interval_ends(np.exp(means)[:, None])[0]


def _draws(values: Floats, statistic: Callable[[Floats], Any], rng: np.random.Generator, count: int) -> Floats:
    """The statistic of so many resamples."""
    return np.array([statistic(rng.choice(values, len(values))) for _ in range(count)])


def interval_ends(draws: Floats) -> list[Interval]:
    """The interval of each column."""
    low, high = np.percentile(draws, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))
