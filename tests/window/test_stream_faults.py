"""A copy that fails is found out in time, and every block that it may have spoiled is named."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.engines.vllm.process import here
from polder.engines.vllm.rank import calls
from polder.engines.vllm.window import calls as window_calls
from polder.errors import EnvironmentFault, OutOfPages
from tests.conftest import examples
from tests.window.passes import PASSES, SHAPES, Pass, Shape, rank_of
from tests.window.rank import Rank

LAST_STORE = 9
"""Among the copies of a pass over 4 layers through 2 slots: 2 loads, then for each layer its store and the load that follows it."""


def name(rank: Rank) -> None:
    rank.named |= {*rank.stream.doubtful}


def settle(rank: Rank) -> bool:
    """As often as there may be failures to raise. Returns whether there were."""
    raised = False
    for _ in range(rank.window.copies.statistics().failed + 1):
        try:
            rank.stream.settle()
        except EnvironmentFault:
            name(rank)
            raised = True
    return raised


@examples(60)
@given(
    shape=SHAPES,
    passes=st.lists(PASSES, min_size=1, max_size=6),
    failing=st.sets(st.integers(1, 60), min_size=1, max_size=4),
)
def test_what_is_not_named_is_right_whatever_fails(shape: Shape, passes: list[Pass], failing: set[int]) -> None:
    with rank_of(shape).open() as rank:
        for nth in failing:
            rank.backend.fail_next("copy", nth)
        for one in passes:
            try:
                one.run(rank)
            except EnvironmentFault:
                name(rank)
            if one.settled:
                settle(rank)
                rank.check()
        settle(rank)
        rank.check()


@examples(50)
@given(shape=SHAPES, passes=st.lists(PASSES, min_size=2, max_size=6), nth=st.integers(1, 40))
def test_a_failure_is_raised_by_the_next_pass_that_computes_a_layer_at_the_latest(
    shape: Shape, passes: list[Pass], nth: int
) -> None:
    with rank_of(shape).open() as rank:
        rank.backend.fail_next("copy", nth)
        for one in passes:
            late = rank.backend.calls["copy"] >= nth
            began = False
            with contextlib.suppress(EnvironmentFault):
                began = one.run(rank) and (int(one.given_up * rank.layers) > 0 or one.half)
                assert not (late and began), "a pass ran to its end over an earlier one's failure"
                continue
            return
        assert settle(rank) == (rank.backend.calls["copy"] >= nth)


def a_pass_without_windowed_blocks(rank: Rank) -> None:
    for _ in range(3):
        assert not rank.run([0], [1])


def passes_that_never_begin_to_compute(rank: Rank) -> None:
    for _ in range(3):
        rank.run([rank.first + 1], [rank.first + 1], until=0)


def nothing(rank: Rank) -> None:
    pass


@pytest.mark.parametrize("between", [nothing, a_pass_without_windowed_blocks, passes_that_never_begin_to_compute])
@pytest.mark.parametrize("found_by", ["the next pass", "settle"])
def test_a_store_that_fails_last_is_blamed_on_its_own_block(found_by: str, between: Callable[[Rank], None]) -> None:
    with Rank(4, 2).open() as rank:
        spoiled = rank.first
        rank.backend.fail_next("copy", LAST_STORE)
        rank.run([], [spoiled])
        between(rank)
        find = rank.stream.settle if found_by == "settle" else partial(rank.run, [], [rank.first + 2])
        with pytest.raises(EnvironmentFault):
            find()
        assert spoiled in rank.stream.doubtful


def test_a_block_is_no_longer_doubtful_when_it_is_known_to_be_home() -> None:
    with Rank(4, 2).open() as rank:
        first = rank.first
        rank.run([], [first])
        rank.run([first + 1], [])
        rank.backend.fail_next("copy")
        with pytest.raises(EnvironmentFault):
            rank.run([first + 2], [first + 3])
        assert rank.stream.doubtful == [first + 2, first + 3]


def test_when_copies_work_again_so_does_the_next_pass_however_many_have_failed() -> None:
    with Rank(6, 2).open() as rank:
        for nth in range(1, 200):
            rank.backend.fail_next("copy", nth)
        for _ in range(5):
            with pytest.raises(EnvironmentFault):
                rank.run(rank.windowed[:3], rank.windowed[2:5])
            assert rank.stream.doubtful == rank.windowed[:5]
        rank.backend.forgive()
        rank.run([], rank.windowed)
        rank.run(rank.windowed, [])
        rank.stream.settle()
        rank.check()


def test_settle_raises_a_failure_once() -> None:
    with Rank(4, 2).open() as rank:
        rank.backend.fail_next("copy", LAST_STORE)
        rank.run([], [rank.first])
        with pytest.raises(EnvironmentFault):
            rank.stream.settle()
        rank.stream.settle()


@pytest.fixture
def bring_home(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """The workers' part of it: returns the error that the core is told."""

    def told(rank: Rank, sources: list[int], targets: list[int]) -> str:
        monkeypatch.setattr(here, "memory", rank.window.memory)
        monkeypatch.setattr(here, "window", rank.window)
        monkeypatch.setattr(calls, "rewrite_block_tables", lambda *_: None)
        return window_calls.bring_home(SimpleNamespace(model_runner=None), sources, targets)

    return told


def test_what_did_not_get_home_is_named_when_another_block_is_to_be_moved(bring_home: Callable[..., str]) -> None:
    with Rank(4, 2).open() as rank:
        rank.backend.fail_next("copy", LAST_STORE)
        rank.run([], [rank.first])
        assert "did not get home" in bring_home(rank, [rank.first + 1], [0])
        assert rank.window.take_doubtful() == [rank.first]
        assert bring_home(rank, [rank.first + 1], [0]) == ""
        rank.truth[:, 0] = rank.truth[:, rank.first + 1]
        rank.named = {rank.first}
        rank.check()


def test_ranks_compare_as_long_as_one_of_them_may_have_lost_something() -> None:
    with Rank(4, 2).open() as rank:
        rank.window.take_doubtful()
        assert rank.window.opened, "after every pass while units are windowed"
        rank.window.close(list(rank.donors))
        assert rank.window.opened, "and once more after that"
        rank.window.take_doubtful()
        assert not rank.window.opened


def test_a_move_that_fails_spoils_no_pass(bring_home: Callable[..., str]) -> None:
    with Rank(4, 2).open() as rank:
        rank.backend.fail_next("copy", 2)  # the first is settle's
        assert "injected" in bring_home(rank, rank.windowed[:2], [0, 1])
        assert not rank.window.take_doubtful()
        rank.run(rank.windowed, [])
        rank.check()


def test_closing_one_donor_tells_of_blocks_of_another() -> None:
    with Rank(4, 2, donors=2).open() as rank:
        rank.backend.fail_next("copy", LAST_STORE)
        rank.run([], [rank.first])
        assert not rank.window.settled()
        rank.window.close(list(rank.donors)[1:])
        assert rank.window.take_doubtful() == [rank.first]


@pytest.mark.parametrize("failing", [1, 2])
def test_an_opening_that_cannot_map_puts_the_donors_pages_back(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with Rank(4, 2).open() as rank:
        window, geometry = rank.window, rank.window.memory.geometry
        window.close(list(rank.donors))
        donors = geometry.slots(list(rank.donors))
        under = geometry.slots([unit for units in rank.donors.values() for unit in units])
        rank.span.unmap(donors)
        real, calls = rank.span.map, itertools.count(1)

        def map_or_fail(*arguments: Any) -> None:
            if next(calls) == failing:
                raise OutOfPages("no mapping is left")
            real(*arguments)

        monkeypatch.setattr(rank.span, "map", map_or_fail)
        with pytest.raises(OutOfPages):
            window.open(rank.donors)
        assert rank.span.mapped[donors].all()
        assert not rank.span.mapped[under].any()
        window.close(list(rank.donors))  # what the core asks of every rank changes nothing here
        rank.span.unmap(donors)
        window.open(rank.donors)
        assert rank.span.mapped[under].all()
