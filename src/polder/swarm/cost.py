"""How long the reads of a step take on modelled disks.

A disk carries out its requests one after another, each in max(1 / requests per second, bytes / bandwidth). A step ends
with its last disk. Emulated disks follow the same rules, plus a latency, which is the same for all layouts.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polder.arrays import FloatArray
from polder.diskstore.model import DiskModel
from polder.swarm.reads import ReadPlan

__all__ = ["cheapest_runs", "disk_seconds", "step_seconds"]


_GAPS = (0, 1, 2, 4, 8, 15)
MOST_GAP_BYTES = 64 << 10


def disk_seconds(plan: ReadPlan, disks: Sequence[DiskModel], page_bytes: int) -> FloatArray:
    """[disks] how long each disk is busy."""
    seconds_per_byte = np.array([1 / disk.bytes_per_s for disk in disks])
    seconds_per_request = np.array([1 / disk.requests_per_s for disk in disks])
    on = plan.run_disks
    each = np.maximum(seconds_per_request[on], plan.run_slots * page_bytes * seconds_per_byte[on])
    return np.bincount(on, weights=each, minlength=len(disks)).astype(np.float64)


def step_seconds(
    plan: ReadPlan, disks: Sequence[DiskModel], page_bytes: int, *, host_s_per_request: float = 0.0
) -> float:
    """The time until the last disk is done, or until the host has submitted and completed all requests (4 to 11 us
    each)."""
    return max(float(disk_seconds(plan, disks, page_bytes).max()), plan.runs * host_s_per_request)


def cheapest_runs(
    plan: ReadPlan,
    disks: Sequence[DiskModel],
    page_bytes: int,
    *,
    host_s_per_request: float = 0.0,
    most_gap_slots: int | None = None,
) -> ReadPlan:
    """The same reads in fewer requests: small gaps between wanted slots are read as well where that ends the step
    sooner.

    Whether a gap pays cannot be decided for one request alone: a short request takes its turn whatever its length, a
    long one takes its bytes, and the host's time counts for all disks together. So some widths of gaps, up to 64 KiB,
    are tried. `most_gap_slots`: the memory for all gaps together.
    """
    gaps = [gap for gap in _GAPS if gap == 0 or (gap + 1) * page_bytes <= MOST_GAP_BYTES]
    plans = [plan.merged(gap) for gap in gaps]
    if most_gap_slots is not None:
        plans = [tried for tried in plans if int(tried.run_slots.sum()) - len(tried.slots) <= most_gap_slots]
    seconds = [step_seconds(tried, disks, page_bytes, host_s_per_request=host_s_per_request) for tried in plans]
    return plans[int(np.argmin(seconds))]
