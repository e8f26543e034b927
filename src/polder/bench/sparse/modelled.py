"""Runs steps on a layout and modelled disks: how long they take, compared with bounds that no layout can beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from polder.arrays import FloatArray, IntArray
from polder.bench.sparse.arms import Layout
from polder.bench.sparse.placements import plan_reads
from polder.diskstore.model import DiskModel, page_speeds
from polder.diskstore.schedule import exact
from polder.swarm.activations import Profile
from polder.swarm.cost import cheapest_runs, disk_seconds, step_seconds
from polder.swarm.reads import ReadPlan

__all__ = ["Modelled", "bound_seconds", "run_steps", "whole_page_bound_seconds"]


@dataclass(frozen=True, kw_only=True)
class Modelled:
    seconds: FloatArray
    """[steps]"""
    bound_s: FloatArray
    """[steps] the same bytes with all disks at full bandwidth until the end."""
    even_s: FloatArray
    """[steps] the same requests if all disks ended at the same moment."""
    whole_page_bound_s: FloatArray
    """[steps] the same pages, none split, if every disk had a copy of each."""
    useful_bytes: int
    read_bytes: int
    requests: int

    @property
    def over_bound(self) -> float:
        return float(self.seconds.sum() / self.bound_s.sum())

    @property
    def over_even(self) -> float:
        return float(self.seconds.sum() / self.even_s.sum())

    @property
    def over_whole_page_bound(self) -> float:
        return float(self.seconds.sum() / self.whole_page_bound_s.sum())

    @property
    def useful_bytes_per_s(self) -> float:
        return self.useful_bytes / float(self.seconds.sum())

    @property
    def amplification(self) -> float:
        """Bytes read for each wanted byte, without gaps."""
        return self.read_bytes / self.useful_bytes


def run_steps(
    layout: Layout,
    profile: Profile,
    disks: Sequence[DiskModel],
    *,
    block_bytes: int,
    choose: Callable[[IntArray, FloatArray], IntArray] = exact,
    host_s_per_request: float = 0.0,
) -> Modelled:
    """Runs each step of a profile of blocks alone on the disks. `choose`: `exact` or `greedy` of
    diskstore/schedule.py."""
    speeds = page_speeds(disks, layout.unit_bytes)
    masks = layout.placement.masks()
    seconds, bounds, even, whole = (np.zeros(profile.steps) for _ in range(4))
    read = requests = 0
    for step, blocks in enumerate(profile):
        units = layout.units(blocks)
        plan = cheapest_runs(
            plan_reads(layout.placement, units, choose(masks[units], speeds)),
            disks,
            layout.unit_bytes,
            host_s_per_request=host_s_per_request,
        )
        seconds[step] = step_seconds(plan, disks, layout.unit_bytes, host_s_per_request=host_s_per_request)
        even[step] = even_seconds(plan, disks, layout.unit_bytes)
        bounds[step] = bound_seconds(len(units) * layout.unit_bytes, disks)
        whole[step] = whole_page_bound_seconds(len(units), disks, layout.unit_bytes)
        read += len(units) * layout.unit_bytes
        requests += plan.runs
    return Modelled(
        seconds=seconds,
        bound_s=bounds,
        even_s=even,
        whole_page_bound_s=whole,
        useful_bytes=len(profile.items) * block_bytes,
        read_bytes=read,
        requests=requests,
    )


def even_seconds(plan: ReadPlan, disks: Sequence[DiskModel], page_bytes: int) -> float:
    """The time of the same requests if all disks ended at the same moment: the best that balance can reach."""
    speeds = page_speeds(disks, page_bytes)
    return float(disk_seconds(plan, disks, page_bytes) @ (speeds / speeds.sum()))


def whole_page_bound_seconds(pages: int, disks: Sequence[DiskModel], page_bytes: int) -> float:
    """The time to read so many whole pages with the best schedule, if every disk had every page."""
    everywhere = np.full(pages, (1 << len(disks)) - 1, dtype=np.int64)
    speeds = page_speeds(disks, page_bytes)
    return float((np.bincount(exact(everywhere, speeds), minlength=len(disks)) / speeds).max())


def bound_seconds(size_bytes: float, disks: Sequence[DiskModel]) -> float:
    """The time to read so many bytes with all disks at full bandwidth until the end."""
    return size_bytes / sum(disk.bytes_per_s for disk in disks)
