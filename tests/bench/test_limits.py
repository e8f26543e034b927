"""Limits: a check fails by the figure that is out of bounds, and is left out when its stage was not run."""

from __future__ import annotations

import pytest

from polder.bench.report import limits
from polder.bench.report.limits import Check, Limit, check, judge
from polder.bench.report.result import Arms, BenchResult

INTERVALS = {"polder/stock:A.ttft_p50_ms": [0.99, 1.009], "polder/stock:A.busy_output_tokens_per_s": [0.995, 1.0]}


def passed(of: Check, intervals: dict[str, list[float]] = INTERVALS, **polder: float) -> bool | None:
    """None: the check was left out."""
    stock = {"ttft_p50_ms": 100.0, "busy_output_tokens_per_s": 10.0}
    arms: Arms = {
        "stock": {"A": dict(stock)},
        "polder": {"A": stock | polder},
        "polder-equality": {"all": dict(polder)},
    }
    result = BenchResult(bench="x", conditions={"intervals": intervals}, arms=arms, ratios={}, checks={})
    return next((verdict.passed for verdict in judge([of], result)), None)


@pytest.mark.parametrize(("relation", "holds"), [("<", False), ("<=", True), ("==", True), (">=", True), (">", False)])
def test_every_relation_at_its_bound(relation: str, holds: bool) -> None:
    limit = Limit("polder/stock:A.ttft_p50_ms", relation, 1.0)  # type: ignore[arg-type]
    assert passed(Check("x", (limit,))) is holds


def test_a_check_of_a_stage_that_was_not_run_is_left_out_and_a_later_figure_that_is_missing_fails_it() -> None:
    there, missing = "polder:A.ttft_p50_ms > 0", "polder:A.giveback_p99_ms < 200"
    assert passed(check("x", there)) is True
    assert passed(check("x", missing, there)) is None
    assert passed(check("x", there, missing)) is False


@pytest.mark.parametrize(
    ("ttft", "speed", "within"),
    [([0.99, 1.009], [0.995, 1.0], True), ([0.99, 1.02], [0.995, 1.0], False), ([0.99, 1.0], [0.98, 1.0], False)],
)
def test_a_tax_counts_the_whole_interval(ttft: list[float], speed: list[float], within: bool) -> None:
    intervals = {"polder/stock:A.ttft_p50_ms": ttft, "polder/stock:A.busy_output_tokens_per_s": speed}
    tax = limits.within_one_percent("tax", "polder", "stock", "A")
    assert passed(tax, intervals) is within
    assert passed(tax, {}) is None


@pytest.mark.parametrize(
    ("change", "equal"),
    [({}, True), ({"answers_different": 1.0}, False), ({"failed_requests": 2.0}, False), ({"sleeps": 0.0}, False)],
)
def test_equal_answers_while_nothing_happened_show_nothing(change: dict[str, float], equal: bool) -> None:
    none = limits.none_different("tokens_equal", "polder-equality", "sleeps")
    figures = {"answers_compared": 9.0, "answers_different": 0.0, "failed_requests": 0.0, "sleeps": 2.0}
    assert passed(none, **(figures | change)) is equal


def test_figures_of_several() -> None:
    slow, none = "polder/stock:A.ttft_p50_ms", "polder/stock:B.ttft_p50_ms"
    assert passed(check("x", Limit(limits.first_of(none, slow), "<=", 1.1)), ttft_p50_ms=120.0) is False
    assert passed(check("x", Limit(limits.highest([none, slow]), "<=", 1.1)), ttft_p50_ms=120.0) is False
    assert passed(check("x", Limit(limits.combined("mean", max, slow, none), "<=", 1.1))) is None
    over = limits.combined("more", lambda of: of[0] - of[1], "polder:A.ttft_p50_ms", "stock:A.ttft_p50_ms")
    assert passed(check("x", Limit(over, "<=", 20)), ttft_p50_ms=120.0) is True
    assert passed(limits.failed_requests(), failed_requests=1.0) is False
    assert passed(limits.failed_requests()) is None
