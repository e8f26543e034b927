"""The exact schedule is the best there is, the paper's is no better, and both read every page once, from a disk that has it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from polder.arrays import FloatArray, IntArray
from polder.diskstore.schedule import exact, greedy
from polder.errors import ConfigError
from tests.conftest import examples


@st.composite
def batches(draw: st.DrawFn, max_disks: int = 8, max_pages: int = 120) -> tuple[IntArray, FloatArray]:
    """Masks of pages and speeds of disks; all copies of some batches are on few disks."""
    disks = draw(st.integers(1, max_disks))
    speeds = draw(st.lists(st.sampled_from([0.25, 0.5, 1.0, 1.0, 3.0]), min_size=disks, max_size=disks))
    masks = draw(st.lists(st.integers(1, (1 << disks) - 1), min_size=1, max_size=8))
    repeats = draw(st.lists(st.integers(1, max_pages // 8), min_size=len(masks), max_size=len(masks)))
    pages = np.repeat(np.array(masks, dtype=np.int64), repeats)
    return np.random.default_rng(draw(st.integers(0, 9))).permutation(pages), np.array(speeds)


def seconds(chosen: IntArray, speeds: FloatArray) -> float:
    return float((np.bincount(chosen, minlength=len(speeds)) / speeds).max())


@examples(100)
@given(batches())
def test_every_page_is_read_once_from_a_disk_that_has_it_and_exact_is_never_slower(
    batch: tuple[IntArray, FloatArray],
) -> None:
    masks, speeds = batch
    best, papers = exact(masks, speeds), greedy(masks, speeds)
    for chosen in (best, papers):
        assert len(chosen) == len(masks)
        assert (masks >> chosen & 1 == 1).all()
    assert seconds(best, speeds) <= seconds(papers, speeds) + 1e-9


@examples(100)
@given(batches(max_disks=3, max_pages=24))
def test_no_choice_of_copies_is_done_sooner(batch: tuple[IntArray, FloatArray]) -> None:
    masks, speeds = batch
    masks = masks[:8]
    ways = itertools.product(*([disk for disk in range(len(speeds)) if mask >> disk & 1] for mask in masks.tolist()))
    least = min(seconds(np.array(way), speeds) for way in ways)
    assert seconds(exact(masks, speeds), speeds) == pytest.approx(least)


@examples(100)
@given(batches())
def test_on_equal_disks_the_best_is_the_formula_rounded_up(batch: tuple[IntArray, FloatArray]) -> None:
    masks, speeds = batch
    equal = np.ones(len(speeds))
    formula = max(
        sum(1 for mask in masks.tolist() if mask & ~chosen == 0) / chosen.bit_count()
        for chosen in range(1, 1 << len(speeds))
    )
    assert seconds(exact(masks, equal), equal) == math.ceil(formula - 1e-9)


@examples(100)
@given(batches())
def test_on_unequal_disks_the_best_is_the_least_time_with_room_in_every_set(
    batch: tuple[IntArray, FloatArray],
) -> None:
    masks, speeds = batch

    def room(time: float) -> bool:
        quota = np.floor(time * speeds + 1e-9).astype(int).tolist()
        return all(
            sum(1 for mask in masks.tolist() if mask & ~chosen == 0)
            <= sum(quota[disk] for disk in range(len(quota)) if chosen >> disk & 1)
            for chosen in range(1, 1 << len(speeds))
        )

    assume(len(speeds) <= 5)
    time = seconds(exact(masks, speeds), speeds)
    assert room(time)
    assert not room(time - 1e-6)


def test_greedy_depends_on_the_order_and_exact_does_not() -> None:
    """Sorted by mask, with every page on two disks, greedy fills the first disks first."""
    rng = np.random.default_rng(0)
    first = rng.integers(0, 8, 800)
    masks = (1 << first) | (1 << (first + rng.integers(1, 8, 800)) % 8)
    speeds = np.ones(8)
    assert seconds(greedy(masks, speeds), speeds) <= 1.02 * 100
    assert seconds(greedy(np.sort(masks), speeds), speeds) > 1.15 * 100
    assert seconds(exact(np.sort(masks), speeds), speeds) == seconds(exact(masks, speeds), speeds) == 100


def test_what_no_disk_has_is_lost_and_the_rest_is_read() -> None:
    masks = np.array([1, 0, 2, 0])
    for choose in (exact, greedy):
        assert choose(masks, np.ones(2)).tolist() == [0, -1, 1, -1]
        assert choose(masks[1:2], np.ones(2)).tolist() == [-1]
        assert choose(masks[:0], np.ones(2)).tolist() == []


def test_more_disks_than_can_be_looked_at_are_refused() -> None:
    with pytest.raises(ConfigError, match="17 disks; at most 16"):
        exact(np.ones(1, dtype=np.int64), np.ones(17))
