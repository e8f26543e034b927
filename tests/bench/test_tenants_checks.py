"""What `polder bench tenants` claims of its figures, and how it shows them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from polder.bench.report.result import Arms, BenchResult, ratios_over
from polder.bench.tenants_checks import exhausted_loads, tenants_checks
from polder.bench.tenants_conditions import describe_tenants
from polder.bench.tenants_plan import ARMS, QUICK_TENANTS
from polder.bench.tenants_report import render_tenants_html
from tests.bench.test_tenants import base


def metrics(**changed: float) -> dict[str, Any]:
    figures = {
        "output_tokens_per_s": 100.0,
        "ttft_p50_ms": 100.0,
        "ttft_p99_ms": 1000.0,
        "tbt_p50_ms": 20.0,
        "tbt_p99_ms": 100.0,
        "preemptions": 0.0,
        "kv_exhausted_part": 0.0,
        "failed_requests": 0.0,
    }
    return {"all": figures | changed}


def arms(**polder: float) -> Arms:
    full = {"output_tokens_per_s": 50.0, "kv_exhausted_part": 0.5, "ttft_p99_ms": 9000.0, "tbt_p99_ms": 400.0}
    better = {"output_tokens_per_s": 72.0, "ttft_p99_ms": 2000.0, "tbt_p99_ms": 200.0} | polder
    low = {"ttft_p50_ms": polder.get("low", 101.0)}
    better.pop("low", None)
    return {
        "stock-x0.5": metrics(),
        "stock-x2": metrics(**full),
        "stock": metrics(**full),
        "polder-x0.5": metrics(**low),
        "polder-x2": metrics(**better),
        "polder": metrics(**better),
    }


def ratios_of(found: Arms) -> dict[str, float]:
    pairs = [("polder", "stock"), ("polder-x0.5", "stock-x0.5"), ("polder-x2", "stock-x2")]
    pairs += [("polder-whole", "polder-streamed"), ("polder-streamed", "stock-resident")]
    pairs += [("polder-whole-link", "polder-streamed-link")]
    return {
        key: value
        for arm, baseline in pairs
        if {arm, baseline} <= found.keys()
        for key, value in ratios_over(found, arm=arm, baseline=baseline).items()
    }


LOADS = ["x0.5", "x2"]
PLAN = replace(QUICK_TENANTS, rates=(0.5, 2.0))


@pytest.mark.parametrize(
    ("polder", "missed"),
    [
        ({}, set()),
        ({"output_tokens_per_s": 69.0}, {"temporal_throughput_at_least_1_40"}),
        ({"ttft_p99_ms": 2260.0}, {"temporal_ttft_p99_at_most_0_25"}),
        ({"tbt_p99_ms": 221.0}, {"temporal_tbt_p99_at_most_0_55"}),
        ({"low": 103.0}, {"below_saturation_no_worse_by_2_percent_x0_5"}),
    ],
)
def test_checks_of_the_sweep(polder: dict[str, float], missed: set[str]) -> None:
    found = arms(**polder)
    checks = tenants_checks(found, ratios_of(found), {"polder/stock:all.ttft_p99_ms": (0.2, 0.3)}, LOADS)
    assert {check.name for check in checks if not check.passed} == missed
    assert len(checks) == 6, "what was not run is not claimed"
    assert not any(check.name.startswith("tokens") for check in checks)


def test_gains_are_judged_only_where_stocks_memory_is_exhausted() -> None:
    found = arms()
    assert exhausted_loads(found, LOADS) == ["x2"]
    found["stock-x0.5"]["all"]["preemptions"] = 1.0
    assert exhausted_loads(found, LOADS) == LOADS
    checks = {check.name: check for check in tenants_checks(found, ratios_of(found), {}, LOADS)}
    assert not checks["stock_exhausts_its_kv_at_some_rates_not_at_all"].passed
    found["stock-x0.5"]["all"]["preemptions"] = found["stock-x2"]["all"]["kv_exhausted_part"] = 0.0
    names = [check.name for check in tenants_checks(found, ratios_of(found), {}, LOADS)]
    assert "temporal_throughput_at_least_1_40" not in names


def comeback(whole_ms: float = 140.0, layers: float = 12.0) -> Arms:
    counts = {"wakes": 4.0, "layers_loaded_a_wake": layers, "bytes_loaded_a_wake": layers * (12 << 20)}
    times = {"ttft_32_p50_ms": 90.0, "ttft_128_p50_ms": 100.0, "failed_requests": 0.0}
    return {
        "stock-resident": {"T2": {"ttft_128_p50_ms": 60.0, "failed_requests": 0.0}},
        "polder-streamed": {"T2": {**times, **counts}},
        "polder-whole": {"T2": {**times, **counts, "ttft_128_p50_ms": 110.0}},
        "polder-streamed-link": {"T2": {**times, **counts}},
        "polder-whole-link": {"T2": {**times, **counts, "ttft_128_p50_ms": whole_ms}},
    }


@pytest.mark.parametrize(
    ("found", "missed"),
    [
        (comeback(), set()),
        (comeback(whole_ms=129.0), {"streamed_at_least_1_30_sooner_than_whole"}),
        (comeback(layers=0.0), {"reclaimed_model_had_lost_all_its_layers"}),
    ],
)
def test_checks_of_the_comeback(found: Arms, missed: set[str]) -> None:
    checks = tenants_checks(found, ratios_of(found), {}, LOADS)
    assert {check.name for check in checks if not check.passed} == missed


@pytest.mark.parametrize(
    ("change", "passed"), [({}, True), ({"answers_different": 1.0}, False), ({"wakes": 0.0}, False)]
)
def test_equal_tokens_without_any_wake_show_nothing(change: dict[str, float], passed: bool) -> None:
    counts: dict[str, Any] = {
        "answers_compared": 64.0,
        "answers_different": 0.0,
        "sleeps": 2.0,
        "wakes": 2.0,
        "layers_loaded": 24.0,
    }
    checks = tenants_checks({"polder-equality": {"all": counts | change}}, {}, {}, LOADS)
    assert {check.name: check.passed for check in checks} == {"tokens_equal": passed, "no_failed_requests": True}


def test_failed_requests_of_any_arm_are_missed_and_counted_once() -> None:
    found = arms()
    for name in ("stock-x2", "stock"):
        found[name]["all"]["failed_requests"] = 3.0
    check = {check.name: check for check in tenants_checks(found, ratios_of(found), {}, LOADS)}["no_failed_requests"]
    assert not check.passed
    assert check.detail == "3 failed"


def test_the_page_shows_the_whole_sweep_and_the_comeback() -> None:
    found = arms() | comeback()
    found["polder-spatial"] = metrics()
    ratios = ratios_of(found)
    checks = tenants_checks(found, ratios, {}, LOADS)
    conditions = describe_tenants(PLAN, base())
    assert conditions["budget"]["weights_part"] > 0.5
    result = BenchResult(
        bench="tenants", conditions=conditions, arms=found, ratios=ratios, checks={c.name: c.passed for c in checks}
    )
    page = render_tenants_html(result, checks)
    assert "<svg" in page
    for text in ("x0.5", "72 (x1.44)", "Two models at a time", "polder-streamed", *ARMS):
        assert text in page
    assert "$sections" not in page
