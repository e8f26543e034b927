"""`polder bench disks`: measured on what was not clustered, layouts as in polder.swarm, bytes as planned, checks that can fail.

Times are modelled, or those of a clock that only sleepers move.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console

from polder.bench.disks import LEAST_GAIN, DisksBench
from polder.bench.disks_checks import disks_checks
from polder.bench.disks_plan import (
    ARMS,
    CO_ACTIVATED,
    DISKS,
    FULL_DISKS,
    QUICK_DISKS,
    REAL_SETS,
    SETS,
    DisksPlan,
    disks_of,
    engine_of,
    wall_engine_of,
)
from polder.bench.report.metrics import Metrics
from polder.bench.report.result import Arms, BenchResult, ratios_over, read_result
from polder.bench.sparse import arms as swarm
from polder.bench.sparse.arms import Layout
from polder.bench.stages.access_sets import DESCRIPTIONS, AccessSet, access_sets, turn_reads
from polder.bench.stages.layouts import PARTS, Layouts, metrics_of, modelled, together
from polder.bench.stages.live import LIVE_ARMS, LIVE_DISKS, LIVE_SETS, live_run, live_set
from polder.bench.stages.wall import LATENCY_S, WallStep, wall_metrics, wall_steps
from polder.emulation.disks import VirtualClock
from polder.sim.traces import Trace

TINY = DisksPlan(
    name="tiny",
    sets=("sticky", "sticky-64k", "random"),
    seeds=(5,),
    known_steps=40,
    measured_steps=8,
    synthetic_blocks=4096,
    wall_steps=3,
    wall_disks=("4", "4-slow"),
)


@pytest.fixture(scope="module")
def sticky() -> Layouts:
    return Layouts(access_sets("sticky", TINY)[0], replica_share=0.1)


# ---------------------------------------------------------------------- access sets


@pytest.mark.parametrize("name", SETS)
def test_measured_steps_come_after_the_known_ones_and_are_none_of_them(name: str) -> None:
    (of,) = access_sets(name, TINY)
    (whole,) = access_sets(name, replace(TINY, known_steps=48, measured_steps=0))
    assert (of.known.steps, of.measured.steps) == (40, 8)
    assert of.known.size == of.measured.size == whole.known.size
    assert np.array_equal(np.concatenate([of.known.items, of.measured.items]), whole.known.items)
    assert np.diff(of.measured.starts).min() > 0
    assert of.page_bytes == 64 << 10


def test_a_turn_reads_the_leading_blocks_that_earlier_turns_have_written() -> None:
    prompts = [[0, 1, 2], [0, 3], [0, 1, 2, 4], [0, 1, 5, 4], [0, 3, 6]]
    trace = Trace(
        name="hand-made",
        block_tokens=512,
        times_s=np.arange(5.0),
        starts=np.cumsum([0, *map(len, prompts)]),
        blocks=np.concatenate(prompts),
    )
    # Block 0 is in every prompt and stays in memory; block 4 follows one that nobody has written.
    assert [reads.tolist() for reads in turn_reads(trace)] == [[], [], [1, 2], [1], [3]]


def test_every_set_is_described_and_synthetic_ones_have_an_instance_for_each_seed() -> None:
    assert set(DESCRIPTIONS) == set(SETS) >= set(REAL_SETS)
    one, other = access_sets("random", replace(TINY, seeds=(1, 2)))
    assert not np.array_equal(one.measured.items, other.measured.items)


# ---------------------------------------------------------------------- layouts


def same(one: Layout, other: Layout) -> bool:
    return one.unit_bytes == other.unit_bytes and all(
        np.array_equal(a, b)
        for a, b in (
            (one.unit_of, other.unit_of),
            (one.placement.disk_of, other.placement.disk_of),
            (one.placement.slot_of, other.placement.slot_of),
        )
    )


@pytest.mark.parametrize("disks", ["1", "4-slow"])
def test_layouts_are_those_of_swarm_arms(sticky: Layouts, disks: str) -> None:
    models = disks_of(disks)
    config = sticky.config(models)
    assert set(ARMS) == set(swarm.ARMS)
    for arm in ARMS:
        assert same(sticky.build(arm, models), swarm.ARMS[arm](config)), arm
    theirs = swarm.stages(config)
    ours = sticky.stages(models)
    assert list(ours) == list(theirs)
    assert all(same(ours[name], theirs[name]) for name in ours)


def test_wanted_bytes_over_io_time_are_the_bandwidth_and_no_layout_beats_the_bound(sticky: Layouts) -> None:
    for disks in DISKS:
        models = disks_of(disks)
        for arm in ARMS:
            run = modelled(sticky.build(arm, models), sticky.of, models, arm=arm)
            found = metrics_of(run, run)
            assert found["wanted_bytes"] / found["io_time_s"] == pytest.approx(found["bandwidth_bytes_per_s"])
            assert found["over_bound"] >= 1 - 1e-9


def test_runs_of_several_seeds_are_one_run_of_all_their_steps(sticky: Layouts) -> None:
    models = disks_of("4")
    run = modelled(sticky.build("hash", models), sticky.of, models, arm="hash")
    both = together([run, run])
    assert len(both.seconds) == 2 * len(run.seconds)
    assert both.over_bound == pytest.approx(run.over_bound)
    once, twice = metrics_of(run, run), metrics_of(both, both)
    assert {name: twice[name] for name in once if "p99" not in name} == pytest.approx(
        {name: value for name, value in once.items() if "p99" not in name}
    )


# ---------------------------------------------------------------------- really read


@pytest.mark.parametrize("disks", TINY.wall_disks)
@pytest.mark.parametrize("arm", TINY.wall_arms)
def test_what_is_read_is_what_was_planned_and_takes_what_was_modelled(
    sticky: Layouts, arm: str, disks: str, tmp_path: Path
) -> None:
    models = disks_of(disks, TINY.wall_model(disks))
    layout, steps = sticky.build(arm, models), sticky.of.measured.part(0, 3)
    found = wall_steps(layout, steps, models, folder=tmp_path, clock=VirtualClock())
    units = [len(layout.units(blocks)) for blocks in steps]
    assert [step.planned_bytes for step in found] == [count * layout.unit_bytes for count in units]
    assert [step.read_bytes for step in found] == [step.planned_bytes for step in found]
    assert not any(step.missed_units or step.late_s for step in found)
    assert [step.wall_s for step in found] == pytest.approx([step.modelled_s + LATENCY_S for step in found])
    # Disks slower by a factor, in bytes and requests alike, take longer by that factor.
    fast = disks_of(disks)
    run = modelled(sticky.build(arm, fast), AccessSet(**(vars(sticky.of) | {"measured": steps})), fast, arm=arm)
    slowed = fast[-1].bytes_per_s / models[-1].bytes_per_s
    assert [step.modelled_s for step in found] == pytest.approx((slowed * run.seconds).tolist())


def test_late_steps_are_counted_and_counted_in() -> None:
    on_time = WallStep(wall_s=1.01, modelled_s=1.0, late_s=0.0, planned_bytes=5, read_bytes=5, missed_units=0)
    found = wall_metrics([on_time, replace(on_time, wall_s=2.0, late_s=1.0)])
    assert found["wall_over_modelled"] == pytest.approx(3.01 / 2)
    assert found["wall_over_modelled_on_time"] == pytest.approx(1.01)
    assert (found["late_steps"], found["steps"], found["late_s"]) == (1.0, 2.0, 1.0)


# ---------------------------------------------------------------------- a whole run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[BenchResult, Path, str]:
    folder = tmp_path_factory.mktemp("disks")
    text = io.StringIO()
    console = Console(file=text, width=100)
    bench = DisksBench(TINY, workdir=folder / "work", console=console, clock=VirtualClock())
    result = bench.run(folder / "disks.json", folder / "disks.html")
    return result, folder, text.getvalue()


def test_the_file_has_every_arm_set_and_disk_and_holds_together(run: tuple[BenchResult, Path, str]) -> None:
    result, folder, _ = run
    assert msgspec.json.encode(read_result(folder / "disks.json")) == msgspec.json.encode(result)
    assert result.bench == "disks"
    for arm in ARMS:
        for name in TINY.sets:
            for disks in DISKS:
                of = result.arms[arm][engine_of(name, disks)]
                assert {"io_time_s", "bandwidth_bytes_per_s", "over_bound", "requests", "amplification"} <= of.keys()
                if arm != "polder":
                    key = f"polder/{arm}:{engine_of(name, disks)}.io_time_s"
                    assert result.ratios[key] == pytest.approx(
                        result.arms["polder"][engine_of(name, disks)]["io_time_s"] / of["io_time_s"]
                    )
    for arm in TINY.wall_arms:
        for disks in TINY.wall_disks:
            assert result.arms[arm][wall_engine_of(CO_ACTIVATED, disks)]["missed_units"] == 0
    assert not list((folder / "work").iterdir()), "pages are removed"


def test_the_shares_of_the_gain_are_all_of_it(run: tuple[BenchResult, Path, str]) -> None:
    arms = run[0].arms
    for name in TINY.sets:
        for disks in DISKS:
            if disks == "1":
                continue
            engine = engine_of(name, disks)
            of = arms["stage-parts"][engine]
            assert math.prod(of[f"{part}_factor"] for part in PARTS) == pytest.approx(of["gain"])
            if of["gain"] >= LEAST_GAIN:
                assert sum(of[f"{part}_share"] for part in PARTS) == pytest.approx(1.0)
            assert arms["stage-striped"][engine]["io_time_s"] == arms["fixed-blocks"][engine]["io_time_s"]
            assert of["io_time_s"] == pytest.approx(arms["polder"][engine]["io_time_s"])


def test_one_disk_and_random_sets_cost_nothing(run: tuple[BenchResult, Path, str]) -> None:
    checks = run[0].checks
    assert checks["one_disk_no_worse_than_the_plain_store"]
    assert checks["random_no_worse_than_hash_by_2_percent"]
    assert checks["bytes_read_as_planned"]
    assert checks["wall_within_5_percent_of_modelled"]


def test_console_and_page_show_tables_and_checks(run: tuple[BenchResult, Path, str]) -> None:
    result, folder, text = run
    page = (folder / "disks.html").read_text()
    assert "<svg" in page
    for shown in (text, page):
        assert all(name in shown for name in (*result.checks, *ARMS, *TINY.sets))


def test_stages_and_arms_can_be_chosen(tmp_path: Path) -> None:
    plan = replace(TINY, sets=("random",)).only(stages=["model"], arms=["polder", "hash"])
    result = DisksBench(plan, workdir=tmp_path, console=Console(file=io.StringIO())).run(tmp_path / "disks.json")
    assert set(result.arms) == {"hash", "polder"}
    assert set(result.checks) == {"one_disk_no_worse_than_the_plain_store", "random_no_worse_than_hash_by_2_percent"}
    assert QUICK_DISKS.only().arms == FULL_DISKS.only().arms == ARMS


# ---------------------------------------------------------------------- checks

GOOD = {
    "io_time_s": 1.0,
    "bandwidth_bytes_per_s": 9.0,
    "over_bound": 1.01,
    "over_even": 1.0,
    "over_whole_page_bound": 1.0,
}
WALL = {
    "wall_over_modelled": 1.01,
    "late_steps": 0.0,
    "steps": 10.0,
    "planned_bytes": 5.0,
    "read_bytes": 5.0,
    "missed_units": 0.0,
}


def checked(ours: dict[str, float], wall: dict[str, float]) -> dict[str, bool]:
    found: Arms = {
        "polder": {
            **{engine_of(name, disks): GOOD | ours for name in SETS for disks in DISKS},
            wall_engine_of(CO_ACTIVATED, "4"): WALL | wall,
        }
    }
    ratios: dict[str, float] = {}
    for arm in ARMS[:-1]:
        slow = 1.0 if arm in ("hash", "sequential") else 3.0
        theirs = {"io_time_s": slow, "bandwidth_bytes_per_s": 9.0 / slow}
        if arm == "polder-pages":
            theirs = GOOD | ours
        found[arm] = {engine_of(name, disks): theirs for name in SETS for disks in DISKS}
        ratios |= ratios_over(found, arm="polder", baseline=arm)
    return {check.name: check.passed for check in disks_checks(found, ratios)}


def test_checks_pass_and_each_can_fail() -> None:
    good = checked({}, {})
    assert all(good.values())
    assert len(good) == 4 + 4 + 8 + 1 + 1 + 2

    def failed(ours: dict[str, float], wall: dict[str, float]) -> set[str]:
        return {name for name, passed in checked(ours, wall).items() if not passed}

    assert failed({"over_bound": 1.03}, {}) == {name for name in good if name.startswith("over_bound")}
    assert failed({"over_even": 1.03}, {}) == {name for name in good if name.startswith("parts_over_even")}
    assert failed({"io_time_s": 1.01}, {}) == {"one_disk_no_worse_than_the_plain_store"}
    assert "random_no_worse_than_hash_by_2_percent" in failed({"io_time_s": 1.03}, {})
    assert failed({"io_time_s": 1.3}, {}) >= {name for name in good if name.startswith("io_time")}
    assert failed({"bandwidth_bytes_per_s": 8.0}, {}) == {name for name in good if name.startswith("bandwidth")}
    assert failed({}, {"wall_over_modelled": 1.06}) == {"wall_within_5_percent_of_modelled"}
    assert failed({}, {"wall_over_modelled": 0.94}) == {"wall_within_5_percent_of_modelled"}
    assert failed({}, {"read_bytes": 4.0}) == {"bytes_read_as_planned"}
    assert failed({}, {"missed_units": 1.0}) == {"bytes_read_as_planned"}


def test_an_entry_store_at_work_is_checked_for_loss_and_for_what_upkeep_wins() -> None:
    good: Metrics = {"lost": 0.0, "steps": 9.0, "packed": 2.0, "io_time_packed_s": 1.0, "io_time_last_s": 1.0}
    worse = {"live-no-packing": {"io_time_packed_s": 2.0}, "live-packed-once": {"io_time_last_s": 2.0}}

    def failed(ours: dict[str, float]) -> set[str]:
        arms: Arms = {
            arm: {engine_of(name, LIVE_DISKS): good | worse.get(arm, {}) for name in LIVE_SETS} for arm in LIVE_ARMS
        }
        for engine in arms["live"]:
            arms["live"][engine] = good | ours
        return {check.name for check in disks_checks(arms, {}) if not check.passed}

    assert failed({}) == set()
    assert failed({"lost": 1.0}) == {"live_no_entry_lost"}
    assert failed({"packed": 1.0}) == failed({"io_time_last_s": 3.0}) == {"live_packs_again_what_has_aged"}
    assert failed({"io_time_packed_s": 2.0}) == {f"live_packing_shortens_steps_of_{name}" for name in LIVE_SETS}


def test_an_entry_store_at_work_packs_twice_where_reading_changes(tmp_path: Path) -> None:
    plan = replace(TINY, known_steps=160)
    found = live_run("live", live_set("drift", plan), plan, folder=tmp_path)
    assert found["packed"] == 2
    assert found["lost"] == 0
    assert found["io_time_last_s"] < found["io_time_first_s"]
