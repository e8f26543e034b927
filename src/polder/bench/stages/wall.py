"""The same steps, really read: pages written to a store on emulated disks and read back as planned, with the clock
running.

Emulated disks are slow on purpose. They take the time that the model says, the real reads beneath them far less; a step
for which that was not so is counted as late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.bench.report.metrics import Metrics
from polder.bench.sparse.arms import Layout
from polder.bench.sparse.placements import plan_reads
from polder.diskstore.config import DiskConfig, StoreConfig
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.io import Arena
from polder.diskstore.keys import Keys
from polder.diskstore.model import DiskModel, page_speeds
from polder.diskstore.schedule import exact
from polder.diskstore.store import DiskStore
from polder.emulation.disks import Clock, EmulatedDisk, EmulatedEngine
from polder.errors import EnvironmentFault, IntegrityError
from polder.swarm.activations import Profile
from polder.swarm.cost import cheapest_runs, step_seconds

__all__ = ["LATENCY_S", "WallStep", "store_config", "wall_metrics", "wall_steps"]

LATENCY_S = 80e-6
"""Of the emulated disks, once a step; the model has none."""
TIMEOUT_S = 60.0
"""The disks are emulated: only a loaded machine makes the real reads late."""
_WRITTEN_AT_ONCE = 256
"""Pages."""
_ODD = np.uint64(0x9E3779B97F4A7C15)

Words = npt.NDArray[np.uint64]


class WallStep(NamedTuple):
    wall_s: float
    """Of the read: look-up, the disks, checksums."""
    modelled_s: float
    """By polder.swarm.cost, which knows nothing of emulated disks."""
    late_s: float
    """By how much the real reads took longer than the emulated disks: above 0 the wall time says nothing about the
    disks."""
    planned_bytes: int
    read_bytes: int
    """That the store asked the disks for."""
    missed_units: int
    """That the store did not vouch for, or that hold something else."""


def wall_steps(
    layout: Layout, steps: Profile, disks: Sequence[DiskModel], *, folder: Path, clock: Clock
) -> list[WallStep]:
    """Each step (of blocks), alone on the disks. `folder` is empty; its disks' directories stay there.

    Raises EnvironmentFault when the pages cannot be written.
    """
    emulated = [EmulatedDisk(replace(disk, latency_s=LATENCY_S), clock=clock) for disk in disks]
    engine = EmulatedEngine(ThreadEngine(), emulated)
    pages = layout.pages or layout  # as they are stored
    parts = pages.unit_bytes // layout.unit_bytes
    held = np.bincount(pages.placement.disk_of[pages.placement.disk_of >= 0], minlength=len(disks))
    # A fiftieth and some MiB are more than index and log take.
    limits = held * pages.unit_bytes * 51 // 50 + (8 << 20)
    store = DiskStore(store_config(folder, limits, page_bytes=pages.unit_bytes, parts=parts), engine=engine)
    try:
        keys = _write(store, pages)
        page_at = _pages_at(pages, len(disks))
        speeds, masks = page_speeds(disks, layout.unit_bytes), layout.placement.masks()
        wanted = [layout.units(blocks) for blocks in steps]
        plans = [plan_reads(layout.placement, units, exact(masks[units], speeds)) for units in wanted]
        plans = [cheapest_runs(plan, disks, layout.unit_bytes) for plan in plans]
        arena = Arena(max(int(plan.run_slots.sum()) for plan in plans), layout.unit_bytes)
        words = arena.bytes.view(np.uint64)
        ends = np.array([0, words.shape[1] - 1])
        arena.bytes[:] = 0  # the kernel gives the memory now, not while a read is timed
        found = []
        for plan in plans:
            on, slots = (np.concatenate(both) for both in zip((plan.disks, plan.slots), plan.gaps(), strict=True))
            page, part = page_at[on, slots // parts], slots % parts
            before, addresses = _served(emulated), arena.addresses[: len(page)]
            started = clock.now()
            distinct, row = np.unique(page, return_inverse=True)
            ok = store.read(store.lookup(keys[distinct]).rows(row), addresses, on, part if parts > 1 else None)
            wall_s = clock.now() - started
            # What lies between the ends is covered by the store's checksum.
            right = ok & (words[: len(ok), ends] == _content(page, part[:, None] * words.shape[1] + ends)).all(axis=1)
            found.append(
                WallStep(
                    wall_s=wall_s,
                    modelled_s=step_seconds(plan, disks, layout.unit_bytes),
                    late_s=engine.steps[-1].late_s,
                    planned_bytes=int(plan.run_slots.sum()) * layout.unit_bytes,
                    read_bytes=_served(emulated) - before,
                    missed_units=int((~right).sum()),
                )
            )
        return found
    finally:
        store.close()


def _served(disks: Sequence[EmulatedDisk]) -> int:
    return sum(disk.served_bytes for disk in disks)


def wall_metrics(steps: Sequence[WallStep]) -> Metrics:
    """Times are of one step, on average. Late steps are in them."""
    of = dict(zip(WallStep._fields, np.array(steps, dtype=np.float64).T, strict=True))
    wall, modelled, on_time = of["wall_s"], of["modelled_s"], of["late_s"] == 0
    metrics: Metrics = {
        "steps": float(len(steps)),
        "wall_s": float(wall.mean()),
        "modelled_s": float(modelled.mean()),
        "wall_over_modelled": float(wall.sum() / modelled.sum()),
        "late_steps": float((~on_time).sum()),
        **{name: float(of[name].sum()) for name in ("late_s", "planned_bytes", "read_bytes", "missed_units")},
    }
    if on_time.any():
        metrics["wall_over_modelled_on_time"] = float(wall[on_time].sum() / modelled[on_time].sum())
    return metrics


def _pages_at(layout: Layout, disks: int) -> IntArray:
    """[disks, slots]: the page in each slot, -1 where there is none."""
    placement = layout.placement
    pages, copies = np.nonzero(placement.disk_of >= 0)
    at = np.full((disks, int(placement.slot_of.max()) + 1), -1, dtype=np.int64)
    at[placement.disk_of[pages, copies], placement.slot_of[pages, copies]] = pages
    return at


def store_config(folder: Path, limits_bytes: IntArray, *, page_bytes: int, parts: int) -> StoreConfig:
    """A store over a directory below `folder` for each disk, made here. `parts`: of a page."""
    disks = [DiskConfig(directory=folder / f"disk{n}", limit_bytes=int(of)) for n, of in enumerate(limits_bytes)]
    for disk in disks:
        disk.directory.mkdir(parents=True)
    return StoreConfig(
        disks=tuple(disks), page_bytes=page_bytes, parts=parts, namespace="polder-bench-disks", timeout_s=TIMEOUT_S
    )


def _write(store: DiskStore, layout: Layout) -> Keys:
    """Every copy of every page into its slot. [pages, 2] keys."""
    placement = layout.placement
    pages, copies = np.nonzero(placement.disk_of >= 0)
    disks, slots = placement.disk_of[pages, copies], placement.slot_of[pages, copies]
    order = np.lexsort((disks, slots))  # a fresh disk gives its slots in rising order
    pages, disks = pages[order], disks[order]
    keys = np.column_stack([np.arange(len(placement.disk_of), dtype=np.uint64)] * 2)
    arena = Arena(_WRITTEN_AT_ONCE, layout.unit_bytes)
    words = arena.bytes.view(np.uint64)
    for at in range(0, len(pages), _WRITTEN_AT_ONCE):
        some = pages[at : at + _WRITTEN_AT_ONCE]
        words[: len(some)] = _content(some, np.arange(words.shape[1]))
        accepted = store.write(keys[some], arena.addresses[: len(some)], disks[at : at + _WRITTEN_AT_ONCE])
        if not accepted.all():
            raise EnvironmentFault(
                f"{int((~accepted).sum())} of {len(some)} pages could not be written: is the disk full?"
            )
    there = store.lookup(keys).slots
    if not np.array_equal(there[pages, disks], slots[order]):
        raise IntegrityError("pages are in other slots than the layout says, so what is read at once would differ")
    return keys


def _content(pages: IntArray, at: IntArray) -> Words:
    """The words of each page at these places, [m] of all or [n, m] of each. No two pages have the same word at the same
    place."""
    return (pages.astype(np.uint64)[:, None] << np.uint64(20)) + at.astype(np.uint64) * _ODD
