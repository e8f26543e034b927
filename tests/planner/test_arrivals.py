"""The next burst is expected a period after the last began."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.planner.arrivals import Arrivals


def test_nothing_is_expected_before_two_bursts() -> None:
    arrivals = Arrivals()
    assert arrivals.next_use_s(0.0) == math.inf
    arrivals.note(1.0)
    assert arrivals.next_use_s(100.0) == math.inf


def test_requests_of_one_burst_count_once() -> None:
    arrivals = Arrivals(quiet_s=0.5)
    for at in (0.0, 0.1, 0.2, 10.0, 10.3):
        arrivals.note(at)
    assert arrivals.next_use_s(12.0) == pytest.approx(8.0)
    assert arrivals.next_use_s(99.0) == 0.0


@given(period=st.floats(1.0, 100.0), bursts=st.integers(2, 20))
def test_a_steady_period_is_found(period: float, bursts: int) -> None:
    arrivals = Arrivals()
    for k in range(bursts):
        arrivals.note(k * period)
    assert arrivals.next_use_s((bursts - 1) * period) == pytest.approx(period)
