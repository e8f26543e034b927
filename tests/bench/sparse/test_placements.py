"""The reads of a step are of adjacent slots, each page once; a step takes as long as its slowest disk."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from polder.bench.sparse.arms import cluster_per_disk, cluster_striped, hashed, sequential, striped
from polder.bench.sparse.medoids import Clusters
from polder.bench.sparse.modelled import bound_seconds, whole_page_bound_seconds
from polder.bench.sparse.placements import Placement, plan_reads
from polder.diskstore.model import PM9A3, DiskModel
from polder.diskstore.schedule import exact
from polder.swarm.cost import step_seconds


@settings(deadline=None)
@given(st.data(), st.integers(2, 6))
def test_runs_are_of_adjacent_slots_and_cover_what_is_read(data: st.DataObject, disks: int) -> None:
    table = np.array(
        data.draw(st.lists(st.permutations(range(disks)).map(lambda order: order[:2]), min_size=1, max_size=40)),
        dtype=np.int64,
    )
    copies = data.draw(st.lists(st.booleans(), min_size=len(table), max_size=len(table)))
    table[~np.array(copies), 1] = -1
    placement = Placement.of(table, disks=disks)
    placement.check_integrity()
    pages = np.array(data.draw(st.lists(st.integers(0, len(table) - 1), unique=True)), dtype=np.int64)
    plan = plan_reads(placement, pages, exact(placement.masks()[pages], np.ones(disks)))
    assert sorted(plan.pages.tolist()) == sorted(pages.tolist())
    for page, disk, slot in zip(plan.pages.tolist(), plan.disks.tolist(), plan.slots.tolist(), strict=True):
        copy = table[page].tolist().index(disk)
        assert placement.slot_of[page, copy] == slot
    for run in range(plan.runs):
        part = slice(int(plan.run_starts[run]), int(plan.run_starts[run + 1]))
        assert (plan.disks[part] == plan.run_disks[run]).all()
        assert (np.diff(plan.slots[part]) == 1).all()
        assert plan.run_slots[run] == plan.slots[part][-1] - plan.slots[part][0] + 1
        end = part.stop
        if end < len(plan.pages):  # runs are as long as they can be
            assert plan.disks[end] != plan.disks[end - 1] or plan.slots[end] - plan.slots[end - 1] > 1


def test_the_time_of_a_step_is_that_of_its_slowest_disk() -> None:
    placement = Placement.of(np.array([0, 0, 0, 1]), disks=2)
    plan = plan_reads(placement, np.arange(4), np.array([0, 0, 0, 1]))
    disks = [DiskModel(bytes_per_s=1000.0, requests_per_s=100.0), DiskModel(bytes_per_s=100.0, requests_per_s=1.0)]
    assert step_seconds(plan, disks, 10) == 1.0  # the one request of disk 1
    assert step_seconds(plan, [disks[0]] * 2, 10) == pytest.approx(0.03)  # one run of three slots
    assert step_seconds(plan, disks, 10, host_s_per_request=2.0) == 4.0
    assert bound_seconds(40, disks) == pytest.approx(40 / 1100)
    assert whole_page_bound_seconds(9, [PM9A3] * 8, 65536) == pytest.approx(2 * 65536 / 6.9e9)


# ---------------------------------------------------------------- reference placements


def test_references_are_as_their_names_say() -> None:
    assert sequential(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert striped(8, 3, chunk_units=2).tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    by_hash = np.bincount(hashed(10_000, np.array([0.5, 1.0, 1.0])), minlength=3)
    assert by_hash == pytest.approx([2000, 4000, 4000], rel=0.1)


CLUSTERS = Clusters(starts=np.array([0, 4, 6]), members=np.array([5, 1, 2, 7, 3, 2]))


def test_swarms_pointer_goes_on_from_cluster_to_cluster() -> None:
    table, order = cluster_striped(CLUSTERS, 3, blocks=9)
    # Written: 5 1 2 7 | 3 2 | 0 4 6 8, to disks 0 1 2 0 | 1 2 | 0 1 2 0; block 2 is on disk 2 already.
    assert table[:, 0].tolist() == [0, 1, 2, 1, 1, 0, 2, 0, 0]
    assert order.tolist() == [5, 1, 2, 7, 3, 0, 4, 6, 8]
    table, _ = cluster_striped(CLUSTERS, 4, blocks=9)
    assert table[2].tolist() == [2, 1]
    Placement.of(table, disks=4).check_integrity()


def test_a_cluster_lies_on_one_disk() -> None:
    disk_of = cluster_per_disk(CLUSTERS, np.ones(2), blocks=9)
    assert disk_of[[5, 1, 2, 7]].tolist() == [0] * 4
    assert disk_of[3] == 1


def test_slots_follow_the_order_given() -> None:
    placement = Placement.of(np.array([0, 1, 0, 1, 0]), disks=2, order=np.array([4, 3, 2, 1, 0]))
    assert placement.slot_of[:, 0].tolist() == [2, 1, 1, 0, 0]
