"""What a step's reads take on modelled disks, and the least that any layout could take.

A request takes max(1 / requests per second, bytes / bandwidth) of its disk, one after another, and a step ends with its last disk.
These are the emulated disks' own rules without their latency, which all layouts pay alike.
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
