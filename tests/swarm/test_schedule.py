"""The exact schedule is the best there is, the paper's is no better, and both read every page once, from a disk that has it."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from polder.errors import ConfigError
from polder.swarm.activations import FloatArray, IntArray
from polder.swarm.cost import PM9A3, DiskModel, bound_seconds, step_seconds, whole_page_bound_seconds
from polder.swarm.placement import Placement
from polder.swarm.schedule import bound, exact, greedy, plan_reads, to_read


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


@settings(deadline=None, max_examples=200)
@given(batches())
def test_every_page_is_read_once_from_a_disk_that_has_it_and_exact_is_never_slower(
    batch: tuple[IntArray, FloatArray],
) -> None:
    masks, speeds = batch
    best, papers = exact(masks, speeds), greedy(masks, speeds)
    for chosen in (best, papers):
        assert len(chosen) == len(masks)
        assert (masks >> chosen & 1 == 1).all()
    assert bound(masks, speeds) - 1e-9 <= seconds(best, speeds) <= seconds(papers, speeds) + 1e-9


@settings(deadline=None, max_examples=200)
@given(batches(max_disks=3, max_pages=24))
def test_no_choice_of_copies_is_done_sooner(batch: tuple[IntArray, FloatArray]) -> None:
    masks, speeds = batch
    masks = masks[:8]
    ways = itertools.product(*([disk for disk in range(len(speeds)) if mask >> disk & 1] for mask in masks.tolist()))
    least = min(seconds(np.array(way), speeds) for way in ways)
    assert seconds(exact(masks, speeds), speeds) == pytest.approx(least)


@settings(deadline=None, max_examples=200)
@given(batches())
def test_on_equal_disks_the_best_is_the_formula_rounded_up(batch: tuple[IntArray, FloatArray]) -> None:
    masks, speeds = batch
    equal = np.ones(len(speeds))
    formula = max(
        sum(1 for mask in masks.tolist() if mask & ~chosen == 0) / chosen.bit_count()
        for chosen in range(1, 1 << len(speeds))
    )
    assert bound(masks, equal) == pytest.approx(formula)
    assert seconds(exact(masks, equal), equal) == math.ceil(formula - 1e-9)


@settings(deadline=None, max_examples=200)
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


def test_what_is_wanted_is_read_once_and_never_what_is_resident() -> None:
    resident = np.zeros(10, dtype=np.bool_)
    resident[[2, 7]] = True
    assert to_read(np.array([5, 2, 9, 5, 7, 1, 9]), resident).tolist() == [5, 9, 1]


@settings(deadline=None)
@given(st.data(), st.integers(2, 6), st.integers(0, 2))
def test_runs_are_of_adjacent_slots_and_cover_what_is_read(data: st.DataObject, disks: int, gap: int) -> None:
    table = np.array(
        data.draw(st.lists(st.permutations(range(disks)).map(lambda order: order[:2]), min_size=1, max_size=40)),
        dtype=np.int64,
    )
    copies = data.draw(st.lists(st.booleans(), min_size=len(table), max_size=len(table)))
    table[~np.array(copies), 1] = -1
    placement = Placement.of(table, disks=disks)
    placement.check_integrity()
    in_use = np.ones(disks, dtype=np.bool_)
    in_use[data.draw(st.integers(0, disks - 1))] = False
    pages = np.array(data.draw(st.lists(st.integers(0, len(table) - 1), unique=True)), dtype=np.int64)
    plan = plan_reads(placement, pages, exact(placement.masks(in_use)[pages], np.ones(disks)), gap_slots=gap)
    assert sorted([*plan.pages.tolist(), *plan.lost.tolist()]) == sorted(pages.tolist())
    assert in_use[plan.disks].all()
    assert all(not in_use[table[page][table[page] >= 0]].any() for page in plan.lost.tolist())
    for page, disk, slot in zip(plan.pages.tolist(), plan.disks.tolist(), plan.slots.tolist(), strict=True):
        copy = table[page].tolist().index(disk)
        assert placement.slot_of[page, copy] == slot
    for run in range(plan.runs):
        part = slice(int(plan.run_starts[run]), int(plan.run_starts[run + 1]))
        assert (plan.disks[part] == plan.run_disks[run]).all()
        assert (np.diff(plan.slots[part]) <= gap + 1).all()
        assert plan.run_slots[run] == plan.slots[part][-1] - plan.slots[part][0] + 1
        end = part.stop
        if end < len(plan.pages):  # runs are as long as they can be
            assert plan.disks[end] != plan.disks[end - 1] or plan.slots[end] - plan.slots[end - 1] > gap + 1


def test_the_time_of_a_step_is_that_of_its_slowest_disk() -> None:
    placement = Placement.of(np.array([0, 0, 0, 1]), disks=2)
    plan = plan_reads(placement, np.arange(4), np.array([0, 0, 0, 1]))
    disks = [DiskModel(bytes_per_s=1000.0, requests_per_s=100.0), DiskModel(bytes_per_s=100.0, requests_per_s=1.0)]
    assert step_seconds(plan, disks, 10) == 1.0  # the one request of disk 1
    assert step_seconds(plan, [disks[0]] * 2, 10) == pytest.approx(0.03)  # one run of three slots
    assert step_seconds(plan, disks, 10, host_s_per_request=2.0) == 4.0
    assert bound_seconds(40, disks) == pytest.approx(40 / 1100)
    assert whole_page_bound_seconds(9, [PM9A3] * 8, 65536) == pytest.approx(2 * 65536 / 6.9e9)


def test_more_disks_than_can_be_looked_at_are_refused() -> None:
    with pytest.raises(ConfigError, match="17 disks; at most 16"):
        exact(np.ones(1, dtype=np.int64), np.ones(17))
