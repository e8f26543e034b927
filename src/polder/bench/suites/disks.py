"""`polder bench disks`: pages of KV on several disks. What does a layout cost or save, and how near is it to the
physical bound?

Layouts are made from the first part of an access set and measured on the rest. Disk times are modelled, so they are the
same on every machine; in the wall stage the same steps are really read, from a store on emulated disks. Starts no
engine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import ClassVar, Self

from polder.bench.harness.machine import load_average
from polder.bench.harness.runs import Run
from polder.bench.report import limits, plots
from polder.bench.report.html import Plot
from polder.bench.report.limits import Check, Figure, Limit, check
from polder.bench.report.metrics import Metrics
from polder.bench.report.result import BenchResult
from polder.bench.report.tables import Table, arm_tables, figures, same
from polder.bench.sparse.arms import PARTS
from polder.bench.sparse.modelled import HOST_S_PER_REQUEST
from polder.bench.stages.access_sets import DESCRIPTIONS, DISKS, SetSizes, access_sets, disks_of
from polder.bench.stages.layouts import REPLICA_SHARE, Layouts, describe_sets, layout_of
from polder.bench.stages.live import LIVE_ARMS, LIVE_DISKS, LIVE_SETS, live_run, live_set
from polder.bench.stages.wall import LATENCY_S, wall_metrics, wall_steps
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.diskstore.model import PM9A3, DiskModel
from polder.emulation.disks import Clock, RealClock

__all__ = [
    "HOST_S_PER_REQUEST",
    "LATENCY_S",
    "REPLICA_SHARE",
    "DisksPlan",
    "DisksSuite",
]  # its words name the first three

ARMS = (
    *("sequential", "hash", "raid0", "cluster-per-disk", "no-cluster", "fixed-blocks", "swarm"),
    *("polder-pages", "polder"),
)
"""polder.bench.sparse.arms says what each is. `swarm` is read by the paper's own schedule, the others by the exact
one."""
SETS = tuple(DESCRIPTIONS)
CO_ACTIVATED = "sticky"
"""What is compared with the paper's figures: entries of 4 KiB, a tenth of them read by a step, clusters of about
ten."""
MOST = "8"
"""As many disks as the paper had."""
WALL_ARMS = ("hash", "fixed-blocks", "polder-pages", "polder")
WALL_BYTES_PER_S = 100e6
"""All emulated disks together, were none of them slow: looking 3,300 entries up and summing them takes the host 4 ms."""
BY_DISKS = {"I/O time of a step, ms": ("io_time_s", 1e3), "over the bound": ("over_bound", 1.0)}
ON_MOST = {
    "read / wanted": ("amplification", 1.0),
    "requests of a step": ("requests", 1.0),
    "stored, MiB": ("stored_bytes", 2**-20),
}
"""Heading of a table -> (metric, scale)."""
COMPARED = ("io_time_s", "io_time_with_host_s", "bandwidth_bytes_per_s")
BASELINES = ("no-cluster", "fixed-blocks", "cluster-per-disk")
"""The paper's kinds of baseline; its means over them, sections 1 and 8: I/O time 2.41 times lower, bandwidth 2.72 times
higher."""


@dataclass(frozen=True, kw_only=True)
class DisksPlan(Plan, SetSizes):
    choices: ClassVar[Mapping[str, StageArms]] = {
        "model": StageArms(known=ARMS),
        "shares": StageArms(),
        "wall": StageArms(known=WALL_ARMS),
        "live": StageArms(),
    }
    stages: tuple[str, ...] = ("model", "shares", "wall", "live")
    orders: Mapping[str, tuple[str, ...]]
    sets: tuple[str, ...]
    wall_steps: int
    """The first of the measured steps, really read."""
    wall_disks: tuple[str, ...]

    def only(self, *, stages: Sequence[str] = (), arms: Sequence[str] = ()) -> Self:
        """With arms named, the live stage, whose arms are its own, runs only where it is named."""
        plan = super().only(stages=stages, arms=arms)
        kept = tuple(stage for stage in plan.stages if not arms or stage in stages or stage != "live")
        return replace(plan, stages=kept)

    def wall_model(self, disks: str) -> DiskModel:
        """The modelled disk, slowed in bytes and requests alike, so that the real reads are never what takes the
        time."""
        return PM9A3.slowed(WALL_BYTES_PER_S / len(DISKS[disks]) / PM9A3.bytes_per_s)


class DisksSuite(Suite[DisksPlan]):
    """Pages of KV on several disks: plain stores, the layouts of Swarm, and Polder's. Needs no engine."""

    name = "disks"
    full = DisksPlan(
        name="full",
        orders={"model": ARMS, "wall": WALL_ARMS},
        sets=SETS,
        seeds=(5, 6, 7),
        measured_steps=120,
        wall_steps=30,
        wall_disks=("4", "4-slow", "8", "8-slow"),
    )
    quick = replace(
        full,
        name="quick",
        help="One seed, fewer sets and steps.",
        sets=tuple(name for name in SETS if name != "groups"),
        seeds=(5,),
        measured_steps=40,
        wall_steps=10,
        wall_disks=("4", "4-slow"),
    )
    baselines: ClassVar = {"polder": ARMS[:-1]}
    clock: Clock = RealClock()
    """Clock of the wall stage."""

    # ------------------------------------------------------------------ stages

    def model(self) -> None:
        """All layouts of each access set on all disks, modelled; the stage `shares` is part of it."""
        plan = self.plan
        arms = plan.orders["model"] if "model" in plan.stages else ()
        for name in plan.sets:
            with self.stage(f"layouts, modelled: {name}") as update:
                sets = access_sets(name, plan)
                self.conditions.setdefault("sets", {})[name] = {"what": DESCRIPTIONS[name], **describe_sets(sets)}
                for number, disks in enumerate(DISKS, start=1):
                    layouts = Layouts(sets, disks_of(disks))
                    found = {arm: layouts.metrics(arm) for arm in arms}
                    if "shares" in plan.stages and len(DISKS[disks]) > 1:
                        found |= layouts.parts()
                    self._add(found, f"{name}-{disks}")
                    update(number, len(DISKS))

    def shares(self) -> None:
        if "model" not in self.plan.stages:
            self.model()

    def wall(self) -> None:
        plan = self.plan
        of = access_sets(CO_ACTIVATED, plan)[0]
        steps = of.measured.part(0, plan.wall_steps)
        runs = list(itertools.product(plan.wall_disks, plan.orders["wall"]))
        with self.stage("layouts, really read from emulated disks") as update:
            for number, (disks, arm) in enumerate(runs, start=1):
                models = disks_of(disks, plan.wall_model(disks))
                self.conditions.setdefault("wall_load_before_each", []).append(load_average())
                with TemporaryDirectory(dir=self.workdir) as folder:
                    layout = layout_of(of, arm, models)
                    found = wall_steps(layout, steps, models, folder=Path(folder), clock=self.clock)
                self._add({arm: wall_metrics(found)}, f"wall-{CO_ACTIVATED}-{disks}")
                update(number, len(runs))

    def live(self) -> None:
        plan, runs = self.plan, list(itertools.product(LIVE_SETS, LIVE_ARMS))
        with self.stage("an entry store at work") as update:
            for number, (name, arm) in enumerate(runs, start=1):
                with TemporaryDirectory(dir=self.workdir) as folder:
                    found = live_run(arm, live_set(name, plan), plan.known_steps, Path(folder))
                self._add({arm: found}, f"{name}-{LIVE_DISKS}")
                update(number, len(runs))

    def _add(self, found: Mapping[str, Metrics], engine: str) -> None:
        for arm, metrics in found.items():
            self.arms.setdefault(arm, {})[engine] = metrics

    def ratios(self) -> dict[str, float]:
        return {key: ratio for key, ratio in super().ratios().items() if key.rpartition(".")[2] in COMPARED}

    # ------------------------------------------------------------------ limits and report

    @classmethod
    def checks(cls, result: BenchResult) -> Iterator[Check]:
        for disks in ("4", "8", "4-slow", "8-slow"):
            label, engine = disks.replace("-", "_"), f"{CO_ACTIVATED}-{disks}"
            yield check(f"over_bound_at_most_1_02_on_{label}", f"polder-pages:{engine}.over_bound <= 1.02")
            yield check(f"parts_over_even_at_most_1_02_on_{label}", f"polder:{engine}.over_even <= 1.02")
        of, why = f"{CO_ACTIVATED}-{MOST}", f"on {MOST} disks"
        lower = {b: f"{b}/polder:{of}.io_time_s" for b in BASELINES}
        higher = {b: f"polder/{b}:{of}.bandwidth_bytes_per_s" for b in BASELINES}
        for name, bound, gains in (
            ("io_time_at_least_2_41_times_lower", 2.41, lower),
            ("bandwidth_at_least_2_72_times_higher", 2.72, higher),
        ):
            mean = limits.combined("mean gain", fmean, *gains.values())
            yield check(f"{name}_as_the_paper_counts", Limit(mean, ">=", bound, why))
            for baseline, gain in gains.items():
                yield check(f"{name}_than_{baseline.replace('-', '_')}", Limit(gain, ">=", bound, why))
        plain = limits.highest(
            f"polder/{store}:{name}-1.io_time_s" for name in SETS for store in ("sequential", "hash")
        )
        yield check("one_disk_no_worse_than_the_plain_store", Limit(plain, "<=", 1 + 1e-6))
        random = limits.highest(f"polder/hash:random-{disks}.io_time_s" for disks in DISKS)
        yield check("random_no_worse_than_hash_by_2_percent", Limit(random, "<=", 1.02))
        yield check("wall_within_5_percent_of_modelled", Limit(_furthest_wall, "<=", 0.05))
        yield check("bytes_read_as_planned", Limit(_unplanned, "<=", 0))
        yield check("live_no_entry_lost", Limit(limits.total("lost"), "<=", 0))
        for name in LIVE_SETS:
            shorter = f"live/live-no-packing:{name}-{LIVE_DISKS}.io_time_packed_s < 1"
            yield check(f"live_packing_shortens_steps_of_{name}", shorter)
        drift = f"drift-{LIVE_DISKS}"
        again = f"live/live-packed-once:{drift}.io_time_last_s <= 1"
        yield check("live_packs_again_what_has_aged", f"live:{drift}.packed > 1", again)

    @classmethod
    def tables(cls, result: BenchResult) -> Iterator[Table]:
        arms, disks = same(ARMS), same(DISKS)
        for name, (what, (metric, scale)) in itertools.product(SETS, BY_DISKS.items()):
            at = lambda arm, d, n=name, m=metric: f"{arm}:{n}-{d}.{m}"  # noqa: E731
            yield from figures(result, f"{name}, by disks: {what}", arms, disks, at, scale=scale)
        for what, (metric, scale) in ON_MOST.items():
            on = lambda arm, name, m=metric: f"{arm}:{name}-{MOST}.{m}"  # noqa: E731
            yield from figures(result, f"{what}, on {MOST} disks", arms, same(SETS), on, scale=scale)
        gains = {"gain": "gain", **{f"{p} {what}": f"{p}_{what}" for what in ("factor", "share") for p in PARTS}}
        engines = same(f"{name}-{d}" for name in SETS for d in DISKS)
        title = "Striped successive pages over polder: the gain in I/O time, each part's factor, its share of the gain"
        yield from figures(result, title, engines, gains, lambda engine, metric: f"stage-parts:{engine}.{metric}")
        for name in LIVE_SETS:
            title = f"An entry store at work on {LIVE_DISKS} disks: {name}; times are of a step"
            yield from arm_tables(result, title, f"{' '.join(LIVE_ARMS)}:{name}-{LIVE_DISKS}", ())
        for d in DISKS:
            title = f"Really read from emulated disks: {CO_ACTIVATED}-{d}; times are of a step"
            yield from arm_tables(result, title, f"{' '.join(WALL_ARMS)}:wall-{CO_ACTIVATED}-{d}", ())

    @classmethod
    def plots(cls, result: BenchResult, runs: Sequence[Run]) -> Iterator[Plot]:
        sets = {name: f"{name}-{MOST}" for name in SETS if f"{name}-{MOST}" in result.arms.get("polder", {})}
        if sets:
            shown = {"I/O time over polder's (log scale)": "{arm}/polder:{point}.io_time_s"}
            yield plots.curves(result, f"I/O time of a step on {MOST} disks", "", shown, ARMS, sets)


def _walls(result: BenchResult, metric: str) -> dict[str, float]:
    """Figures of the wall stage by arm and disks."""
    keys = (f"{arm}:wall-{CO_ACTIVATED}-{disks}.{metric}" for disks in DISKS for arm in result.arms)
    return {key.rpartition(".")[0]: value for key in keys if (value := result.figure(key)) is not None}


def _furthest_wall(result: BenchResult) -> Figure | None:
    """How far the wall time is from the modelled one, at worst."""
    ratios = _walls(result, "wall_over_modelled")
    return max((Figure(abs(ratio - 1), f"off at {key}") for key, ratio in ratios.items()), default=None)


def _unplanned(result: BenchResult) -> Figure | None:
    """Bytes that were read and not planned or planned and not read, and units that were missed."""
    planned, read, missed = (_walls(result, name) for name in ("planned_bytes", "read_bytes", "missed_units"))
    wrong = sum(abs(planned[key] - read[key]) for key in planned) + sum(missed.values())
    return Figure(wrong, f"of {sum(planned.values()):.0f} bytes") if planned else None
