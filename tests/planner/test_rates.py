"""Rates are what was measured last, weighted by time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.planner.rates import LinkRate, PrefillRate


def test_a_link_is_unknown_until_its_first_transfer() -> None:
    link = LinkRate()
    assert link.bytes_per_s is None
    assert link.seconds(100) is None
    link.observe(1000, 0.001, now=3.0)
    assert link.seconds(2000) == pytest.approx(0.002)
    assert link.measured_at == 3.0


def test_transfers_of_nothing_or_of_no_time_say_nothing() -> None:
    link = LinkRate()
    for size, seconds in ((0, 1.0), (-1, 1.0), (100, 0.0), (100, -1.0)):
        link.observe(size, seconds, now=1.0)
    assert link.bytes_per_s is None
    assert link.measured_at == float("-inf")


def test_short_transfers_change_a_rate_little_and_long_ones_replace_it() -> None:
    link = LinkRate(memory_s=0.5)
    link.observe(1000, 0.4, now=0.0)
    before = link.bytes_per_s
    assert before is not None
    link.observe(1, 0.004, now=0.0)
    assert link.bytes_per_s == pytest.approx(before, rel=0.02)
    link.observe(10**6, 1.0, now=0.0)
    assert link.bytes_per_s == pytest.approx(10**6)


def test_a_link_that_becomes_slow_is_noticed() -> None:
    link = LinkRate(memory_s=0.5)
    for _ in range(100):
        link.observe(10**9, 0.1, now=0.0)
    assert link.bytes_per_s == pytest.approx(1e10)
    for _ in range(40):  # 4 s, with a memory of half a second
        link.observe(10**7, 0.1, now=0.0)
    assert link.bytes_per_s == pytest.approx(1e8, rel=0.1)


def test_a_rate_stays_between_the_slowest_and_the_fastest_transfer() -> None:
    link = LinkRate()
    for size in (10, 1000, 50, 700, 30):
        link.observe(size, 0.1, now=0.0)
        assert link.bytes_per_s is not None
        assert 100 <= link.bytes_per_s <= 10_000


def test_prefill_is_unknown_until_a_large_step() -> None:
    prefill = PrefillRate(least_tokens=64)
    prefill.observe(63, 1.0)
    prefill.observe(100, 0.0)
    prefill.observe(0, 0.01)
    assert prefill.seconds(100) is None


def test_without_small_steps_prefill_is_the_quotient() -> None:
    prefill = PrefillRate(least_tokens=64)
    prefill.observe(100, 0.01)
    assert prefill.seconds(1000) == pytest.approx(0.1)


@given(
    token_s=st.floats(1e-6, 1e-2),
    fixed_in_tokens=st.floats(0, 500),
    steps=st.lists(st.integers(1, 4096), min_size=1, max_size=60),
)
def test_a_fixed_cost_of_steps_is_not_charged_to_tokens(
    token_s: float, fixed_in_tokens: float, steps: list[int]
) -> None:
    prefill = PrefillRate(least_tokens=64)
    for tokens in (8, *steps, 512):
        prefill.observe(tokens, (fixed_in_tokens + tokens) * token_s)
    assert prefill.seconds_per_token == pytest.approx(token_s, rel=1e-6)


def test_prefill_stays_above_nothing_when_large_steps_seem_no_slower() -> None:
    prefill = PrefillRate(least_tokens=64)
    prefill.observe(10, 0.5)
    prefill.observe(100, 0.1)
    assert prefill.seconds_per_token == pytest.approx(0.0001)


def test_prefill_forgets_old_steps() -> None:
    prefill = PrefillRate(weight=0.5)
    prefill.observe(100, 1.0)
    for _ in range(20):
        prefill.observe(100, 0.1)
    assert prefill.seconds(100) == pytest.approx(0.1, rel=1e-3)
