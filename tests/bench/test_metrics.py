"""Metrics of records written by hand."""

from __future__ import annotations

import math
from statistics import geometric_mean

import numpy as np
import pytest

from polder.bench.harness.driver import RequestRecord
from polder.bench.report.metrics import (
    busy_seconds,
    engine_metrics,
    paired_interval,
    percentile,
    quantile_intervals,
    ttfts_ms,
)


def record(
    key: str = "r", *, due: float = 0.0, tokens: tuple[float, ...] = (0.1, 0.2), **more: object
) -> RequestRecord:
    fields = {"sent_s": due, "token_s": list(tokens), "end_s": tokens[-1] if tokens else due} | more
    return RequestRecord(key=key, scheduled_s=due, **fields)  # type: ignore[arg-type]


def test_ttft_is_from_the_moment_a_request_was_due_not_sent() -> None:
    assert ttfts_ms([record(due=1.0, sent_s=1.4, tokens=(1.5,))]) == pytest.approx([500])


def test_cold_starts_are_left_out_of_ttft_only() -> None:
    found = engine_metrics([[record(cold_start=True, tokens=(9.0, 9.1)), record()]])
    assert found["ttft_p99_ms"] == pytest.approx(100)
    assert found["requests"] == 2
    assert found["tbt_p50_ms"] == pytest.approx(100)


def test_load_that_is_not_measured_does_not_count() -> None:
    found = engine_metrics([[record(), record(measured=False, tokens=(50.0,), error="late")]])
    assert found["requests"] == 1
    assert found["failed_requests"] == 0
    assert found["makespan_s"] == pytest.approx(0.2)


def test_failed_requests_are_counted_and_nothing_else_of_them() -> None:
    failed = record(error="HTTP 500", tokens=(), end_s=4.0, prompt_tokens=1000)
    found = engine_metrics([[record(prompt_tokens=10, cached_tokens=5), failed]])
    assert found["failed_requests"] == 1
    assert found["hit_ratio"] == 0.5
    assert found["makespan_s"] == 4.0, "a failure lasts until its end"
    assert found["slo_ratio"] == 0.5, "a failed request missed its SLO"


def test_hit_ratio_is_in_tokens_and_tiers_sum_to_one() -> None:
    cold, warm = record(prompt_tokens=300, cached_tokens=0), record(prompt_tokens=100, cached_tokens=100)
    found = engine_metrics([[cold, warm]])
    assert found["hit_ratio"] == 0.25
    assert found["hit_ratio_by_tier"] == {"own": 0.25, "tiers": 0.0, "computed": 0.75}


def test_rates_are_over_the_summed_time_of_the_runs() -> None:
    one = [record(tokens=(1.0, 2.0), prompt_tokens=40, cached_tokens=10)]
    two = [record(tokens=(1.0, 3.0, 8.0), prompt_tokens=40, cached_tokens=20)]
    found = engine_metrics([one, two], preemptions=2)
    assert found["output_tokens_per_s"] == pytest.approx(5 / 10)
    assert found["computed_prompt_tokens_per_s"] == pytest.approx(50 / 10)
    assert found["requests_per_s"] == pytest.approx(2 / 10)
    assert found["makespan_s"] == pytest.approx(5)
    assert found["preemptions"] == 2


def test_slowest_tenth_of_each_request() -> None:
    steady = tuple(0.01 * i for i in range(1, 22))
    jerky = (*steady[:-1], steady[-2] + 0.5)
    found = engine_metrics([[record(tokens=jerky)]])
    assert found["tbt_worst10_ms"] == pytest.approx((500 + 10) / 2)
    assert found["tbt_p50_ms"] == pytest.approx(10)


@pytest.mark.parametrize(
    ("first", "gap", "within"), [(0.5, 0.1, True), (0.51, 0.1, False), (0.5, 0.11, False), (0.1, 0.0, True)]
)
def test_goodput_needs_both_limits(first: float, gap: float, within: bool) -> None:
    found = engine_metrics([[record(tokens=(first, first + gap - 1e-9))]])
    assert found["slo_ratio"] == float(within)


def test_a_run_without_requests_has_no_percentiles_and_no_rates() -> None:
    found = engine_metrics([[]])
    assert math.isnan(found["ttft_p99_ms"])  # type: ignore[arg-type]
    assert found["requests_per_s"] == 0


def test_busy_seconds_is_a_union() -> None:
    spans = [(0.0, 2.0), (1.0, 1.5), (1.9, 3.0), (10.0, 11.0)]
    assert busy_seconds([record(due=s, tokens=(e,)) for s, e in spans]) == pytest.approx(4.0)


def test_paired_interval_holds_the_mean_and_narrows_with_more_pairs() -> None:
    rng = np.random.default_rng(1)
    few = np.exp(rng.normal(0.02, 0.03, 8)).tolist()
    many = np.exp(rng.normal(0.02, 0.03, 200)).tolist()
    low, high = paired_interval(few)
    assert low < geometric_mean(few) < high
    low_many, high_many = paired_interval(many)
    assert high_many - low_many < (high - low) / 2
    assert low_many < math.exp(0.02) < high_many
    assert paired_interval(few) == (low, high), "seeded"


def test_quantile_ratio_interval_holds_the_ratio() -> None:
    rng = np.random.default_rng(2)
    ((low, high),) = quantile_intervals(rng.exponential(1.0, 500), rng.exponential(4.0, 500), [90])
    assert low < 0.25 < high < 0.4


def test_percentile_of_nothing_is_nan() -> None:
    assert math.isnan(percentile([], 99))
    assert percentile([1.0, 3.0], 50) == 2.0
