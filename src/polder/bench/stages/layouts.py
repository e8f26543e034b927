"""The layouts of an access set, and what they take on modelled disks.

They are those of polder.bench.sparse.arms. Clusters and packed pages do not depend on the disks and take longest, so
here they are made once for all disks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from polder.arrays import IntArray
from polder.bench.report.metrics import Metrics
from polder.bench.sparse.arms import ARMS, ArmConfig, Layout, cluster_per_disk, cluster_striped, packed_stages
from polder.bench.sparse.medoids import Clusters, medoid_clusters
from polder.bench.sparse.modelled import Modelled, run_steps
from polder.bench.sparse.placements import Placement
from polder.bench.stages.access_sets import AccessSet
from polder.diskstore.model import DiskModel, page_speeds
from polder.diskstore.schedule import exact, greedy
from polder.swarm.activations import Profile
from polder.swarm.clusters import PackConfig, Packing, pack, reading_order

__all__ = ["PARTS", "Layouts", "arm_metrics", "describe_sets", "modelled", "part_metrics", "together"]

LEAST_GAIN = 1.02
"""Below it there is nothing to have a share of."""

PARTS: tuple[str, ...] = ("packing", "placement", "replicas", "schedule", "parts")
"""What polder adds to striped pages of successive blocks, one after another. Replicas are read greedily before
`schedule`, whole pages before `parts`."""


class Layouts:
    """The layouts of one access set, made from its known steps."""

    def __init__(self, of: AccessSet, *, replica_share: float) -> None:
        self.of = of
        self._replica_share = replica_share

    def build(self, arm: str, disks: Sequence[DiskModel]) -> Layout:
        """`arm`: a name of polder.bench.sparse.arms.ARMS."""
        if arm in ("polder", "polder-pages"):
            return self.stages(disks)["parts" if arm == "polder" else "replicas"]
        if arm in ("cluster-per-disk", "swarm"):
            return self._of_clusters(arm, disks)
        return ARMS[arm](self.config(disks))

    def config(self, disks: Sequence[DiskModel]) -> ArmConfig:
        return ArmConfig(
            profile=self.of.known,
            speeds=page_speeds(disks, self.of.page_bytes),
            page_blocks=self.of.page_blocks,
            block_bytes=self.of.block_bytes,
            replica_share=self._replica_share if len(disks) > 1 else 0.0,  # one disk has nowhere to put a second copy
        )

    def stages(self, disks: Sequence[DiskModel]) -> dict[str, Layout]:
        """As polder.bench.sparse.arms.stages: striped, packing, placement, replicas, parts."""
        return packed_stages(self.config(disks), self._packing, self._of_pages, self._order)

    def _of_clusters(self, arm: str, disks: Sequence[DiskModel]) -> Layout:
        config, blocks = self.config(disks), self.of.known.size
        disk_of, order = cluster_striped(self._clusters, config.disks, blocks=blocks)
        if arm == "cluster-per-disk":
            disk_of = cluster_per_disk(self._clusters, config.speeds, blocks=blocks)
        placement = Placement.of(disk_of, disks=config.disks, order=order)
        return Layout(unit_of=np.arange(blocks), unit_bytes=config.block_bytes, placement=placement)

    @cached_property
    def _clusters(self) -> Clusters:
        return medoid_clusters(self.of.known, radius=self.config([]).radius)

    @cached_property
    def _packing(self) -> Packing:
        return pack(self.of.known, PackConfig(page_blocks=self.of.page_blocks))

    @cached_property
    def _of_pages(self) -> Profile:
        return self.of.known.mapped(self._packing.page_of, size=self._packing.pages)

    @cached_property
    def _order(self) -> IntArray:
        return reading_order(self._of_pages)


def modelled(
    layout: Layout, of: AccessSet, disks: Sequence[DiskModel], *, arm: str, host_s_per_request: float = 0.0
) -> Modelled:
    """The measured steps. "swarm" and what ends in "-greedy" are read by the paper's schedule."""
    return run_steps(
        layout,
        of.measured,
        disks,
        block_bytes=of.block_bytes,
        choose=greedy if arm == "swarm" or arm.endswith("-greedy") else exact,
        host_s_per_request=host_s_per_request,
    )


def arm_metrics(sets: Sequence[Layouts], arm: str, disks: Sequence[DiskModel], *, host_s_per_request: float) -> Metrics:
    """Figures of a layout over several instances of an access set. Times, requests and bytes are of one step, on
    average."""
    layouts = [(of, of.build(arm, disks)) for of in sets]
    run = together([modelled(layout, of.of, disks, arm=arm) for of, layout in layouts])
    with_host = [
        modelled(layout, of.of, disks, arm=arm, host_s_per_request=host_s_per_request) for of, layout in layouts
    ]
    steps = len(run.seconds)
    return {
        "io_time_s": float(run.seconds.mean()),
        "io_time_p99_s": float(np.percentile(run.seconds, 99)),
        "io_time_with_host_s": float(together(with_host).seconds.mean()),
        "bandwidth_bytes_per_s": run.useful_bytes_per_s,
        "over_bound": run.over_bound,
        "over_even": run.over_even,
        "over_whole_page_bound": run.over_whole_page_bound,
        "amplification": run.amplification,
        "requests": run.requests / steps,
        "wanted_bytes": run.useful_bytes / steps,
        "stored_bytes": sum(layout.stored_bytes for _, layout in layouts) / len(sets),
    }


def part_metrics(sets: Sequence[Layouts], disks: Sequence[DiskModel]) -> dict[str, Metrics]:
    """What each part of polder adds to the ones before it: how many times shorter it makes a step, and its share of the
    gain.

    A share is the logarithm of the part's factor over that of the whole gain. Keys: "stage-" and the part's name.
    """
    seconds = dict.fromkeys(("striped", *PARTS), 0.0)
    for layouts in sets:
        built = layouts.stages(disks)
        of = {"schedule": "replicas", **{name: name for name in ("striped", "packing", "placement", "parts")}}
        for part, layout in of.items():
            seconds[part] += float(modelled(built[layout], layouts.of, disks, arm="polder").seconds.sum())
        greedily = modelled(built["replicas"], layouts.of, disks, arm="replicas-greedy")
        seconds["replicas"] += float(greedily.seconds.sum())
    steps = sum(layouts.of.measured.steps for layouts in sets)
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


def together(runs: Sequence[Modelled]) -> Modelled:
    """All their steps."""
    arrays = ("seconds", "bound_s", "whole_page_bound_s", "even_s")
    counts = ("useful_bytes", "read_bytes", "requests")
    return Modelled(
        **{name: np.concatenate([getattr(run, name) for run in runs]) for name in arrays},
        **{name: sum(getattr(run, name) for run in runs) for name in counts},
    )


def describe_sets(sets: Sequence[Layouts]) -> dict[str, Any]:
    """Sizes of the instances of an access set, for the conditions of a result."""
    known, measured = [layouts.of.known for layouts in sets], [layouts.of.measured for layouts in sets]
    read_before = [(k.counts()[m.items] > 0).mean() for k, m in zip(known, measured, strict=True)]
    return {
        "blocks": [of.size for of in known],
        "known_steps": [of.steps for of in known],
        "measured_steps": [of.steps for of in measured],
        "reads_a_step": round(float(np.mean([np.diff(of.starts).mean() for of in measured])), 1),
        # What was never read before is where it was put when it was written.
        "measured_reads_of_blocks_read_before": round(float(np.mean(read_before)), 3),
    }
