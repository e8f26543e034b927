"""`polder bench disks`: measured on steps that layouts were not made from, bytes as planned. Times are modelled, or virtual."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from polder.bench.sparse.arms import PARTS
from polder.bench.sparse.modelled import run_steps
from polder.bench.stages.access_sets import DESCRIPTIONS, DISKS, AccessSet, SetSizes, access_sets, disks_of, turn_reads
from polder.bench.stages.layouts import Layouts, layout_of
from polder.bench.stages.live import live_run, live_set
from polder.bench.stages.wall import LATENCY_S, WallStep, wall_metrics, wall_steps
from polder.bench.suites.disks import ARMS, WALL_ARMS, DisksSuite
from polder.emulation.disks import VirtualClock
from polder.sim.traces import Trace

TINY = SetSizes(seeds=(5,), known_steps=40, measured_steps=8, synthetic_blocks=4096)


@pytest.fixture(scope="module")
def sticky() -> AccessSet:
    return access_sets("sticky", TINY)[0]


@pytest.mark.parametrize("name", DESCRIPTIONS)
def test_measured_steps_come_after_the_known_ones_and_are_none_of_them(name: str) -> None:
    (of,) = access_sets(name, TINY)
    (whole,) = access_sets(name, replace(TINY, known_steps=48, measured_steps=0))
    known, all_steps = of.known.profile, whole.known.profile
    assert (known.steps, of.measured.steps) == (40, 8)
    assert known.size == of.measured.size == all_steps.size
    assert np.array_equal(np.concatenate([known.items, of.measured.items]), all_steps.items)
    assert np.diff(of.measured.starts).min() > 0
    assert of.known.page_bytes == 64 << 10


def test_synthetic_sets_have_an_instance_for_each_seed() -> None:
    one, other = access_sets("random", replace(TINY, seeds=(1, 2)))
    assert not np.array_equal(one.measured.items, other.measured.items)


def test_a_turn_reads_the_leading_blocks_that_earlier_turns_have_written() -> None:
    prompts = [[0, 1, 2], [0, 3], [0, 1, 2, 4], [0, 1, 5, 4], [0, 3, 6]]
    starts = np.cumsum([0, *map(len, prompts)])
    trace = Trace(
        name="hand-made", block_tokens=512, times_s=np.arange(5.0), starts=starts, blocks=np.concatenate(prompts)
    )
    # Block 0 is in every prompt and stays in memory; block 4 follows one that nobody has written.
    assert [reads.tolist() for reads in turn_reads(trace)] == [[], [], [1, 2], [1], [3]]


def test_wanted_bytes_over_io_time_are_the_bandwidth_and_no_layout_beats_the_bound(sticky: AccessSet) -> None:
    for disks in DISKS:
        for arm in ARMS:
            found = Layouts([sticky], disks_of(disks)).metrics(arm)
            assert found["wanted_bytes"] / found["io_time_s"] == pytest.approx(found["bandwidth_bytes_per_s"])
            assert found["over_bound"] >= 1 - 1e-9
            assert found["io_time_with_host_s"] >= found["io_time_s"]


def test_several_seeds_are_one_run_of_all_their_steps_and_parts_share_the_whole_gain(sticky: AccessSet) -> None:
    models = disks_of("4")
    once, twice = (Layouts([sticky] * n, models).metrics("hash") for n in (1, 2))
    assert {name: twice[name] for name in once if "p99" not in name} == pytest.approx(
        {name: value for name, value in once.items() if "p99" not in name}
    )
    layouts = Layouts([sticky], models)
    _, *later = PARTS
    parts = layouts.parts()["stage-parts"]
    assert np.prod([parts[f"{part}_factor"] for part in later]) == pytest.approx(parts["gain"])
    assert sum(parts[f"{part}_share"] for part in later) == pytest.approx(1.0)
    first, last = (layouts.metrics(arm)["io_time_s"] for arm in ("fixed-blocks", "polder"))
    assert parts["gain"] == pytest.approx(first / last)


@pytest.mark.parametrize("disks", ["4", "4-slow"])
@pytest.mark.parametrize("arm", WALL_ARMS)
def test_what_is_read_is_what_was_planned_and_takes_what_was_modelled(
    sticky: AccessSet, arm: str, disks: str, tmp_path: Path
) -> None:
    models = disks_of(disks, DisksSuite.quick.wall_model(disks))
    layout, steps = layout_of(sticky, arm, models), sticky.measured.part(0, 3)
    found = wall_steps(layout, steps, models, folder=tmp_path, clock=VirtualClock())
    units = [len(layout.units(blocks)) for blocks in steps]
    assert [step.planned_bytes for step in found] == [count * layout.unit_bytes for count in units]
    assert [step.read_bytes for step in found] == [step.planned_bytes for step in found]
    assert not any(step.missed_units or step.late_s for step in found)
    assert [step.wall_s for step in found] == pytest.approx([step.modelled_s + LATENCY_S for step in found])
    # Disks slower by a factor, in bytes and requests alike, take longer by that factor.
    fast = disks_of(disks)
    run = run_steps(layout_of(sticky, arm, fast), steps, fast, block_bytes=sticky.known.block_bytes)
    slowed = fast[-1].bytes_per_s / models[-1].bytes_per_s
    assert [step.modelled_s for step in found] == pytest.approx((slowed * run.seconds).tolist())


def test_late_steps_are_counted_and_counted_in() -> None:
    on_time = WallStep(wall_s=1.01, modelled_s=1.0, late_s=0.0, planned_bytes=5, read_bytes=5, missed_units=0)
    found = wall_metrics([on_time, on_time._replace(wall_s=2.0, late_s=1.0)])
    assert found["wall_over_modelled"] == pytest.approx(3.01 / 2)
    assert found["wall_over_modelled_on_time"] == pytest.approx(1.01)
    assert (found["late_steps"], found["steps"], found["late_s"]) == (1.0, 2.0, 1.0)


def test_an_entry_store_at_work_packs_twice_where_reading_changes(tmp_path: Path) -> None:
    sizes = replace(TINY, known_steps=160)
    found = live_run("live", live_set("drift", sizes), 160, tmp_path)
    assert (found["packed"], found["lost"]) == (2, 0)
    assert found["io_time_last_s"] < found["io_time_first_s"]
