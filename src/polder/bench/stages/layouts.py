"""What the layouts of an access set (polder.bench.sparse.arms) take on modelled disks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from polder.bench.report.metrics import Metrics
from polder.bench.sparse.arms import ARMS, ArmConfig, Layout, stages
from polder.bench.sparse.modelled import Modelled, run_steps
from polder.bench.stages.access_sets import AccessSet
from polder.diskstore.model import DiskModel, page_speeds
from polder.diskstore.schedule import exact, greedy

__all__ = [
    "HOST_S_PER_REQUEST",
    "PARTS",
    "REPLICA_SHARE",
    "arm_metrics",
    "build",
    "describe_sets",
    "modelled",
    "part_metrics",
]

REPLICA_SHARE = 0.10
"""Of the pages, that have a second copy."""
HOST_S_PER_REQUEST = 5e-6
"""What the host needs for a request: 4 to 11 us were measured. For `io_time_with_host_s` alone."""
LEAST_GAIN = 1.02
"""Below it there is nothing to have a share of."""

PARTS: tuple[str, ...] = ("packing", "placement", "replicas", "schedule", "parts")
"""What polder adds to striped pages of successive blocks, one after another. Replicas are read greedily before
`schedule`, whole pages before `parts`."""


def _config(of: AccessSet, disks: Sequence[DiskModel]) -> ArmConfig:
    copied = REPLICA_SHARE if len(disks) > 1 else 0.0  # one disk has nowhere to put a second copy
    return ArmConfig(known=of.known, speeds=page_speeds(disks, of.known.page_bytes), replica_share=copied)


def build(of: AccessSet, arm: str, disks: Sequence[DiskModel]) -> Layout:
    """The layout of this name, made from the known steps."""
    return ARMS[arm](_config(of, disks))


def modelled(
    layout: Layout, of: AccessSet, disks: Sequence[DiskModel], *, arm: str, host_s_per_request: float = 0.0
) -> Modelled:
    """The measured steps. "swarm" and what ends in "-greedy" are read by the paper's schedule."""
    return run_steps(
        layout,
        of.measured,
        disks,
        block_bytes=of.known.block_bytes,
        choose=greedy if arm == "swarm" or arm.endswith("-greedy") else exact,
        host_s_per_request=host_s_per_request,
    )


def arm_metrics(sets: Sequence[AccessSet], arm: str, disks: Sequence[DiskModel]) -> Metrics:
    """Figures of a layout over several instances of an access set. Times, requests and bytes are of one step, on
    average."""
    layouts = [(of, build(of, arm, disks)) for of in sets]
    run, with_host = (
        _together([modelled(layout, of, disks, arm=arm, host_s_per_request=host_s) for of, layout in layouts])
        for host_s in (0.0, HOST_S_PER_REQUEST)
    )
    steps = len(run.seconds)
    return {
        "io_time_s": float(run.seconds.mean()),
        "io_time_p99_s": float(np.percentile(run.seconds, 99)),
        "io_time_with_host_s": float(with_host.seconds.mean()),
        "bandwidth_bytes_per_s": run.useful_bytes_per_s,
        "over_bound": run.over_bound,
        "over_even": run.over_even,
        "over_whole_page_bound": run.over_whole_page_bound,
        "amplification": run.amplification,
        "requests": run.requests / steps,
        "wanted_bytes": run.useful_bytes / steps,
        "stored_bytes": sum(layout.stored_bytes for _, layout in layouts) / len(sets),
    }


def part_metrics(sets: Sequence[AccessSet], disks: Sequence[DiskModel]) -> dict[str, Metrics]:
    """What each part of polder adds to the ones before it: how many times shorter it makes a step, and its share of the
    gain.

    A share is the logarithm of the part's factor over that of the whole gain. Keys: "stage-" and the part's name.
    """
    seconds = dict.fromkeys(("striped", *PARTS), 0.0)
    layout_of = {part: part for part in seconds} | {"schedule": "replicas"}
    for of in sets:
        built = stages(_config(of, disks))
        for part, name in layout_of.items():
            arm = "replicas-greedy" if part == "replicas" else "polder"
            seconds[part] += float(modelled(built[name], of, disks, arm=arm).seconds.sum())
    steps = sum(of.measured.steps for of in sets)
    factors = {part: seconds[before] / seconds[part] for before, part in itertools.pairwise(seconds)}
    gain = seconds["striped"] / seconds["parts"]
    shares = {part: math.log(of) / math.log(gain) for part, of in factors.items()} if gain >= LEAST_GAIN else {}
    found: dict[str, Metrics] = {f"stage-{part}": {"io_time_s": taken / steps} for part, taken in seconds.items()}
    found["stage-parts"] |= {
        "gain": gain,
        **{f"{part}_factor": factor for part, factor in factors.items()},
        **{f"{part}_share": share for part, share in shares.items()},
    }
    return found


def _together(runs: Sequence[Modelled]) -> Modelled:
    """All their steps."""
    arrays = ("seconds", "bound_s", "whole_page_bound_s", "even_s")
    counts = ("useful_bytes", "read_bytes", "requests")
    return Modelled(
        **{name: np.concatenate([getattr(run, name) for run in runs]) for name in arrays},
        **{name: sum(getattr(run, name) for run in runs) for name in counts},
    )


def describe_sets(sets: Sequence[AccessSet]) -> dict[str, Any]:
    """Sizes of the instances of an access set, for the conditions of a result."""
    pairs = [(of.known.profile, of.measured) for of in sets]
    read_before = [(known.counts()[measured.items] > 0).mean() for known, measured in pairs]
    return {
        "blocks": [known.size for known, _ in pairs],
        "known_steps": [known.steps for known, _ in pairs],
        "measured_steps": [measured.steps for _, measured in pairs],
        "reads_a_step": round(float(np.mean([np.diff(measured.starts).mean() for _, measured in pairs])), 1),
        # What was never read before is where it was put when it was written.
        "measured_reads_of_blocks_read_before": round(float(np.mean(read_before)), 3),
    }
