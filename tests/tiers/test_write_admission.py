"""What deserves the disks' endurance: what is read again is written, what is not is not, and the budget holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.arrays import UintArray
from polder.errors import ConfigError
from polder.tiers.disk.admission import WriteAdmission, WriteBudget
from tests.conftest import examples

DAY_S = 86400.0


def numbers(name: int, count: int) -> UintArray:
    return np.random.default_rng(name).integers(0, 2**63, count, dtype=np.uint64)


def admission(**options: float) -> WriteAdmission:
    return WriteAdmission(remembered=1 << 14, **options)  # type: ignore[arg-type]


def test_before_anything_is_known_everything_is_written() -> None:
    mine = admission()
    mine.asked(numbers(1, 100), 0.0)
    assert mine.judge(numbers(1, 100), 0.0).all()
    assert mine.judge(numbers(2, 10), 0.0).all()


def test_where_nothing_is_ever_read_again_writing_stops() -> None:
    mine, written = admission(), 0
    for request in range(400):
        blocks = numbers(request, 30)
        mine.asked(blocks[:20], float(request))
        mine.computed(blocks, float(request))
        wanted = mine.judge(blocks, float(request))
        written += int(wanted.sum())
        assert request < 60 or not wanted.any()
    assert written < 2000, "the trial, of 12000"


def test_what_agents_read_turn_after_turn_is_all_written() -> None:
    mine, refused, now = admission(), 0, 0.0
    for conversation in range(60):
        blocks = numbers(conversation, 200)
        for turn in range(20):
            now += 2.0
            known = 10 * turn
            mine.asked(blocks[: known + 8], now)
            mine.computed(blocks[: known + 10], now)
            refused += int((~mine.judge(blocks[known : known + 10], now)).sum())
    assert refused == 0


def test_a_second_use_is_written_even_where_most_are_never_used_again() -> None:
    mine = admission()
    for request in range(300):
        mine.asked(numbers(request, 20), float(request))
    now = 300.0
    assert not mine.judge(numbers(299, 20), now).any()
    mine.asked(numbers(299, 20), now)
    assert mine.judge(numbers(299, 20), now).all()


def test_chats_and_agents_together_are_told_apart() -> None:
    mine, now = admission(), 0.0
    wanted_of_chats = wanted_of_agents = 0
    for round_ in range(300):
        now += 1.0
        chat, agent = numbers(10_000 + round_, 20), numbers(round_ // 30, 300)
        mine.asked(chat, now)
        at = 10 * (round_ % 30)
        mine.asked(agent[: at + 10], now)
        if round_ >= 100:
            wanted_of_chats += int(mine.judge(chat, now).sum())
            wanted_of_agents += int(mine.judge(agent[at : at + 10], now).sum()) if at > 100 else 10
    assert wanted_of_chats < 0.02 * 4000, "those whose keys were overwritten"
    assert wanted_of_agents > 0.95 * 2000


def test_a_wrong_no_is_corrected_by_what_was_not_written() -> None:
    mine = admission()
    for request in range(100):
        mine.asked(numbers(request, 20), float(request))
    assert not mine.judge(numbers(99, 20), 100.0).any()
    for request in range(100, 300):  # from now on each comes back once, 15 s later
        mine.asked(numbers(request, 20), float(request))
        if request >= 115:
            mine.asked(numbers(request - 15, 20), float(request))
    assert mine.judge(numbers(299, 20), 300.0).all()


def test_what_comes_back_after_a_page_has_left_the_disk_does_not_count() -> None:
    mine = admission()
    mine.lifetime_s = 30.0
    for request in range(600):
        mine.asked(numbers(request, 20), float(request))
        if request >= 100:
            mine.asked(numbers(request - 100, 20), float(request))
    assert not mine.judge(numbers(599, 20), 600.0).any()
    mine.lifetime_s = 1000.0
    mine.asked(numbers(1000, 1), 615.0)
    assert mine.judge(numbers(599, 20), 615.0).all()


def test_a_share_outside_0_to_1_and_a_negative_budget_are_refused() -> None:
    with pytest.raises(ConfigError, match="least_reuse"):
        admission(least_reuse=1.5)
    with pytest.raises(ConfigError, match="budget"):
        WriteBudget(-1)


@examples(100)
@given(
    per_day=st.integers(0, 10_000_000),
    steps=st.lists(
        st.tuples(st.floats(0.0, 20_000.0), st.integers(1, 400), st.booleans(), st.booleans()), min_size=1, max_size=80
    ),
)
def test_no_day_has_more_writes_than_the_budget_however_late_they_are(
    per_day: int, steps: list[tuple[float, int, bool, bool]]
) -> None:
    budget, now, block = WriteBudget(per_day), 0.0, 1000
    waiting: list[int] = []
    written: list[tuple[float, int]] = []
    for wait, count, late, unused in steps:
        now += wait
        for size in waiting:  # granted in a step before, carried out now
            written.append((now, size))
            budget.settle(size, now)
        waiting = []
        granted = budget.take(count, block, now) * block
        if unused:
            budget.settle(granted, now, unused_bytes=granted)
        elif late:
            waiting.append(granted)
        else:
            written.append((now, granted))
            budget.settle(granted, now)
    for start, _ in written:
        for window in (1.0, 3600.0, DAY_S):
            total = sum(size for at, size in written if start <= at < start + window)
            assert total <= per_day / 24 + per_day * 23 / 24 * window / DAY_S + 1


def test_without_a_budget_there_is_no_limit_and_with_one_the_hours_are_even() -> None:
    assert WriteBudget(None).take(10**9, 1 << 20, 0.0) == 10**9
    budget = WriteBudget(24_000_000)
    assert budget.take(5000, 1000, 0.0) == 1000
    assert budget.take(5000, 1000, 1.0) == 0, "what was granted is not settled"
    budget.settle(1_000_000, 1.0)
    assert 950 <= budget.take(5000, 1000, 3601.0) <= 1000
