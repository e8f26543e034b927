"""What a step's reads take on modelled disks, and the least that any layout could take.

A request takes max(1 / requests per second, bytes / bandwidth) of its disk, one after another, and a step ends with its last disk.
These are the emulated disks' own rules without their latency, which all layouts pay alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polder.errors import ConfigError
from polder.swarm.activations import FloatArray
from polder.swarm.schedule import ReadPlan, exact

__all__ = [
    "OPTANE_900P",
    "PM9A3",
    "DiskModel",
    "bound_seconds",
    "cheapest_runs",
    "disk_seconds",
    "even_seconds",
    "page_speeds",
    "step_seconds",
    "whole_page_bound_seconds",
]


_GAPS = (0, 1, 2, 4, 8, 15)
MOST_GAP_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class DiskModel:
    """Raises ConfigError for a speed that is not above 0."""

    bytes_per_s: float
    requests_per_s: float

    def __post_init__(self) -> None:
        if min(self.bytes_per_s, self.requests_per_s) <= 0:
            raise ConfigError(
                f"disk: {self.bytes_per_s} bytes/s, {self.requests_per_s} requests/s; write numbers above 0"
            )

    def slowed(self, part: float) -> DiskModel:
        """At this part of both speeds."""
        return DiskModel(bytes_per_s=part * self.bytes_per_s, requests_per_s=part * self.requests_per_s)


PM9A3 = DiskModel(bytes_per_s=6.9e9, requests_per_s=1.1e6)
"""Swarm's faster disks, section 8, as published."""
OPTANE_900P = DiskModel(bytes_per_s=2.5e9, requests_per_s=0.55e6)


def page_speeds(disks: Sequence[DiskModel], page_bytes: int) -> FloatArray:
    """[disks]: pages a second, each read by a request of its own."""
    return np.array([min(disk.requests_per_s, disk.bytes_per_s / page_bytes) for disk in disks])


def disk_seconds(plan: ReadPlan, disks: Sequence[DiskModel], page_bytes: int) -> FloatArray:
    """[disks]: how long each is busy."""
    seconds_per_byte = np.array([1 / disk.bytes_per_s for disk in disks])
    seconds_per_request = np.array([1 / disk.requests_per_s for disk in disks])
    on = plan.run_disks
    each = np.maximum(seconds_per_request[on], plan.run_slots * page_bytes * seconds_per_byte[on])
    return np.bincount(on, weights=each, minlength=len(disks)).astype(np.float64)


def step_seconds(
    plan: ReadPlan, disks: Sequence[DiskModel], page_bytes: int, *, host_s_per_request: float = 0.0
) -> float:
    """Until the last disk is done, or the host with submitting and completing requests: 4 to 11 us each were measured."""
    return max(float(disk_seconds(plan, disks, page_bytes).max()), plan.runs * host_s_per_request)


def cheapest_runs(
    plan: ReadPlan,
    disks: Sequence[DiskModel],
    page_bytes: int,
    *,
    host_s_per_request: float = 0.0,
    most_gap_slots: int | None = None,
) -> ReadPlan:
    """The same reads, with gaps read over where that ends the step sooner than the requests that it spares.

    What a gap costs is certain for no request alone: a short run takes its turn whether or not it is longer, a long one its bytes,
    and the host's time counts for all disks together. So some widths are tried, below 64 KiB. `most_gap_slots`: of all gaps
    together, for which there is memory.
    """
    gaps = [gap for gap in _GAPS if gap == 0 or (gap + 1) * page_bytes <= MOST_GAP_BYTES]
    plans = [plan.merged(gap) for gap in gaps]
    if most_gap_slots is not None:
        plans = [tried for tried in plans if int(tried.run_slots.sum()) - len(tried.slots) <= most_gap_slots]
    seconds = [step_seconds(tried, disks, page_bytes, host_s_per_request=host_s_per_request) for tried in plans]
    return plans[int(np.argmin(seconds))]


def even_seconds(plan: ReadPlan, disks: Sequence[DiskModel], page_bytes: int) -> float:
    """What the same requests would take if all disks ended at the same moment: the least that balance can reach."""
    speeds = page_speeds(disks, page_bytes)
    return float(disk_seconds(plan, disks, page_bytes) @ (speeds / speeds.sum()))


def whole_page_bound_seconds(pages: int, disks: Sequence[DiskModel], page_bytes: int) -> float:
    """Of reading so many pages, none of them split: what the best schedule takes when every disk has every page."""
    everywhere = np.full(pages, (1 << len(disks)) - 1, dtype=np.int64)
    speeds = page_speeds(disks, page_bytes)
    return float((np.bincount(exact(everywhere, speeds), minlength=len(disks)) / speeds).max())


def bound_seconds(size_bytes: float, disks: Sequence[DiskModel]) -> float:
    """Of reading so many bytes: all disks at full bandwidth to the end. No disks do it sooner."""
    return size_bytes / sum(disk.bytes_per_s for disk in disks)
