"""The layouts of an access set, and what they take on modelled disks.

They are those of polder.bench.sparse.arms. Clusters and packed pages do not depend on the disks and take longest, so here they
are made once for all disks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

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

__all__ = ["PARTS", "Layouts", "metrics_of", "modelled", "together"]

PARTS: tuple[str, ...] = ("packing", "placement", "replicas", "schedule", "parts")
"""What polder adds to striped pages of successive blocks, one after another. Replicas are read greedily before `schedule`, whole
pages before `parts`."""


class Layouts:
    """Of one access set, made from what is known of it."""

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


def together(runs: Sequence[Modelled]) -> Modelled:
    """All their steps."""
    return Modelled(
        seconds=np.concatenate([run.seconds for run in runs]),
        bound_s=np.concatenate([run.bound_s for run in runs]),
        whole_page_bound_s=np.concatenate([run.whole_page_bound_s for run in runs]),
        even_s=np.concatenate([run.even_s for run in runs]),
        useful_bytes=sum(run.useful_bytes for run in runs),
        read_bytes=sum(run.read_bytes for run in runs),
        requests=sum(run.requests for run in runs),
    )


def metrics_of(run: Modelled, with_host: Modelled) -> Metrics:
    """Times, requests and bytes are of one step, on average. `with_host`: the same steps, with the host's time for requests."""
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
    }
