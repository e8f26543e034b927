"""What several legs say: intervals hold what differs from leg to leg, and answers are compared by their keys."""

from __future__ import annotations

import pytest

from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.runs import Run
from polder.bench.harness.timeline import Timeline
from polder.bench.report import metrics
from polder.bench.report.legs import compare_legs, leg_intervals


def leg(ttft_s: float, *, engine: str = "chat", ids: tuple[int, ...] = (5, 6), requests: int = 20) -> Run:
    records = [
        RequestRecord(
            key=f"{number}",
            scheduled_s=float(number),
            sent_s=float(number),
            token_s=[number + ttft_s, number + 2 * ttft_s],
            end_s=number + 2 * ttft_s,
            output_ids=list(ids),
        )
        for number in range(requests)
    ]
    of = {"load_before": 0.0, "load_after": 0.0, "timeline": Timeline(), "samples": {}}
    return Run(arm="x", records={engine: records}, started_at=0.0, wall_s=1.0, client_cpu_s=0.0, **of)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def fewer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "RESAMPLES", 200)


def test_an_interval_holds_what_differs_from_leg_to_leg() -> None:
    """All requests of a leg take the same time: to resample requests alone would give an interval without width."""
    found = leg_intervals([leg(0.1), leg(0.2)], [leg(0.4), leg(0.4)], name="polder/stock")
    for engine in ("chat", "all"):
        assert found[f"polder/stock:{engine}.ttft_p99_ms"] == pytest.approx((0.25, 0.5))
        low, high = found[f"polder/stock:{engine}.makespan_s"]
        assert low == pytest.approx(19.2 / 19.8)
        assert high == pytest.approx(19.4 / 19.8)


def test_one_leg_says_nothing_of_rates_and_something_of_requests() -> None:
    found = leg_intervals([leg(0.1)], [leg(0.2)], name="polder/stock")
    assert found["polder/stock:chat.ttft_p50_ms"] == pytest.approx((0.5, 0.5))
    assert not [key for key in found if key.endswith("output_tokens_per_s")]


def test_answers_are_compared_token_by_token_with_those_of_the_same_request() -> None:
    first = leg(0.1, requests=3)
    same, other = leg(0.2, requests=3), leg(0.1, ids=(5, 7), requests=2)
    other.records["chat"][0].error = "failed"
    assert compare_legs([same, other], first) == {
        "answers_compared": 4.0,
        "answers_different": 1.0,
        "tokens_compared": 8.0,
    }
