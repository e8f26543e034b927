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
    "disk_seconds",
    "gap_slots",
    "page_speeds",
    "step_seconds",
    "whole_page_bound_seconds",
]


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


def gap_slots(disk: DiskModel, page_bytes: int) -> int:
    """Unwanted slots that are read over in less time than another request takes."""
    return int(disk.bytes_per_s / (disk.requests_per_s * page_bytes))


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


def whole_page_bound_seconds(pages: int, disks: Sequence[DiskModel], page_bytes: int) -> float:
    """Of reading so many pages, none of them split: what the best schedule takes when every disk has every page."""
    everywhere = np.full(pages, (1 << len(disks)) - 1, dtype=np.int64)
    speeds = page_speeds(disks, page_bytes)
    return float((np.bincount(exact(everywhere, speeds), minlength=len(disks)) / speeds).max())


def bound_seconds(size_bytes: float, disks: Sequence[DiskModel]) -> float:
    """Of reading so many bytes: all disks at full bandwidth to the end. No disks do it sooner."""
    return size_bytes / sum(disk.bytes_per_s for disk in disks)
