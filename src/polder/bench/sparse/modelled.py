"""Runs steps on a layout and modelled disks: how long they take, compared with bounds that no layout can beat."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from polder.arrays import FloatArray, IntArray
from polder.bench.sparse.arms import Layout
from polder.bench.sparse.placements import plan_reads
from polder.diskstore.model import DiskModel, page_speeds
from polder.diskstore.schedule import exact
from polder.swarm.activations import Profile
from polder.swarm.cost import cheapest_runs, disk_seconds, step_seconds
from polder.swarm.reads import ReadPlan

__all__ = ["HOST_S_PER_REQUEST", "Modelled", "bound_seconds", "run_steps", "whole_page_bound_seconds"]

HOST_S_PER_REQUEST = 5e-6
"""What the host needs for a request: 4 to 11 us were measured."""


class Modelled(NamedTuple):
    """What steps take, [steps] each."""

    seconds: FloatArray
    with_host_s: FloatArray
    """Where the host needs its time for each request, too."""
    bound_s: FloatArray
    """The same bytes with all disks at full bandwidth until the end."""
    even_s: FloatArray
    """The same requests if all disks ended at the same moment."""
    whole_page_bound_s: FloatArray
    """The same pages, none split, if every disk had a copy of each."""
    wanted_bytes: FloatArray
    read_bytes: FloatArray
    """Without gaps."""
    requests: FloatArray

    def figures(self) -> dict[str, float]:
        """Times, requests and bytes are of one step, on average."""
        total_s, wanted = self.seconds.sum(), self.wanted_bytes.sum()
        found = {
            "io_time_s": self.seconds.mean(),
            "io_time_p99_s": np.percentile(self.seconds, 99),
            "io_time_with_host_s": self.with_host_s.mean(),
            "bandwidth_bytes_per_s": wanted / total_s,
            "over_bound": total_s / self.bound_s.sum(),
            "over_even": total_s / self.even_s.sum(),
            "over_whole_page_bound": total_s / self.whole_page_bound_s.sum(),
            "amplification": self.read_bytes.sum() / wanted,
            "requests": self.requests.mean(),
            "wanted_bytes": self.wanted_bytes.mean(),
        }
        return {name: float(value) for name, value in found.items()}


def run_steps(
    layout: Layout,
    profile: Profile,
    disks: Sequence[DiskModel],
    *,
    block_bytes: int,
    choose: Callable[[IntArray, FloatArray], IntArray] = exact,
    host_s_per_request: float = HOST_S_PER_REQUEST,
) -> Modelled:
    """Runs each step of a profile of blocks alone on the disks. `choose`: `exact` or `greedy` of
    diskstore/schedule.py."""
    size, speeds, masks = layout.unit_bytes, page_speeds(disks, layout.unit_bytes), layout.placement.masks()
    rows = []
    for blocks in profile:
        units = layout.units(blocks)
        reads = plan_reads(layout.placement, units, choose(masks[units], speeds))
        plan, of_host = (
            cheapest_runs(reads, disks, size, host_s_per_request=host_s) for host_s in (0.0, host_s_per_request)
        )
        rows.append(
            (
                step_seconds(plan, disks, size),
                step_seconds(of_host, disks, size, host_s_per_request=host_s_per_request),
                bound_seconds(len(units) * size, disks),
                even_seconds(plan, disks, size),
                whole_page_bound_seconds(len(units), disks, size),
                len(blocks) * block_bytes,
                len(units) * size,
                plan.runs,
            )
        )
    return Modelled(*np.array(rows, dtype=np.float64).T)


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
