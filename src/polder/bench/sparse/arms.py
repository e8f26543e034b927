"""Layouts to compare: which blocks form a unit of reading, and which disk each unit is on. `polder` is ours, `swarm`
the paper's.

A unit is read as a whole: a page of k blocks, or a single block. Adjacent units are read with one request.

| name | unit | where |
|---|---|---|
| sequential | page of successive blocks | an equal range of them on each disk |
| hash | page of successive blocks | any disk, by its speed |
| raid0 | page of successive blocks | 128 KiB on each disk in turn |
| fixed-blocks | page of successive blocks | one on each disk in turn (InfLLM's blocks, read whole) |
| no-cluster | a block | one on each disk in turn (only what is wanted is read) |
| cluster-per-disk | a block | each of Swarm's clusters on one disk, the emptiest |
| swarm | a block | Swarm's clusters striped over the disks, copies where they overlap: equation (7) |
| polder-pages | page packed by co-activation | anti-affine, with second copies of the hottest |
| polder | a block | the same pages, of which only what is wanted is read |
| packing, placement, replicas | as polder-pages | striped; anti-affine; with the copies, read greedily |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from polder.arrays import FloatArray, IntArray
from polder.bench.sparse.medoids import Clusters, medoid_clusters
from polder.bench.sparse.placements import Placement
from polder.swarm.activations import Profile
from polder.swarm.clusters import PackConfig, Packing, pack, reading_order
from polder.swarm.placement import anti_affine, with_replicas

__all__ = [
    *("ARMS", "GREEDY", "PARTS", "ArmConfig", "Known", "Layout", "cluster_per_disk", "cluster_striped", "hashed"),
    *("parts_of", "sequential", "striped"),
]

RAID0_CHUNK_BYTES = 128 << 10


@dataclass(frozen=True, kw_only=True)
class Known:
    """What layouts are made from. What does not depend on the disks takes longest, and is made once."""

    profile: Profile
    """Recorded sets of blocks."""
    page_blocks: int
    block_bytes: int

    @property
    def page_bytes(self) -> int:
        return self.page_blocks * self.block_bytes

    @cached_property
    def clusters(self) -> Clusters:
        return medoid_clusters(self.profile)

    @cached_property
    def packing(self) -> Packing:
        return pack(self.profile, PackConfig(page_blocks=self.page_blocks))

    @cached_property
    def of_pages(self) -> Profile:
        return self.profile.mapped(self.packing.page_of, size=self.packing.pages)

    @cached_property
    def page_order(self) -> IntArray:
        """Of the pages on a disk."""
        return reading_order(self.of_pages)


@dataclass(frozen=True, kw_only=True)
class ArmConfig:
    known: Known
    speeds: FloatArray
    """[disks] pages a second, relative to each other."""
    replica_share: float = 0.10

    @property
    def disks(self) -> int:
        return len(self.speeds)

    @property
    def blocks(self) -> int:
        return self.known.profile.size

    @cached_property
    def page_disks(self) -> IntArray:
        """[pages] of packed pages, without second copies."""
        return anti_affine(self.known.of_pages, self.speeds)

    @cached_property
    def with_copies(self) -> Layout:
        """Packed pages, with second copies of the hottest."""
        share, counts = self.replica_share, self.known.of_pages.counts()
        return _packed(self, with_replicas(self.page_disks, counts, self.speeds, share=share))


@dataclass(frozen=True, kw_only=True)
class Layout:
    unit_of: IntArray
    """[blocks] the unit of each block."""
    unit_bytes: int
    placement: Placement
    pages: Layout | None = None
    """The layout of the pages, where units are parts of pages. Slot s of a disk is part s % k of its page s // k."""

    @property
    def stored_bytes(self) -> int:
        """The bytes of all copies."""
        return int((self.placement.disk_of >= 0).sum()) * self.unit_bytes

    def units(self, blocks: IntArray) -> IntArray:
        """The units to read for these blocks, each once, in the order of blocks."""
        units, first = np.unique(self.unit_of[blocks], return_index=True)
        return units[np.argsort(first)]


def sequential(units: int, disks: int) -> IntArray:
    """[units] an equal range of units on each disk."""
    return np.arange(units) * disks // max(1, units)


def striped(units: int, disks: int, *, chunk_units: int = 1) -> IntArray:
    """[units] `chunk_units` units on each disk in turn."""
    return np.arange(units) // chunk_units % disks


def hashed(units: int, speeds: FloatArray, *, seed: int = 0) -> IntArray:
    """[units] a random disk for each unit, in proportion to the speeds."""
    return np.random.default_rng(seed).choice(len(speeds), units, p=speeds / speeds.sum()).astype(np.int64)


def cluster_per_disk(clusters: Clusters, speeds: FloatArray, *, blocks: int) -> IntArray:
    """[blocks] each cluster on one disk, the emptiest for its speed, large clusters first.

    A block in several clusters goes with the largest. Blocks in no cluster are striped.
    """
    disk_of = striped(blocks, len(speeds))
    stored = np.zeros(blocks, dtype=np.bool_)
    size = np.zeros(len(speeds))
    for cluster in np.argsort(-clusters.sizes, kind="stable").tolist():
        members = clusters.members[clusters.starts[cluster] : clusters.starts[cluster + 1]]
        members = members[~stored[members]]
        stored[members] = True
        disk = int(((size + len(members)) / speeds).argmin())
        disk_of[members] = disk
        size[disk] += len(members)
    return disk_of


def cluster_striped(clusters: Clusters, disks: int, *, blocks: int) -> tuple[IntArray, IntArray]:
    """Equation (7): a pointer goes round the disks, over the members of one cluster after another, then over all other
    blocks.

    Returns disks ([blocks, copies], -1 for none) and the order of blocks on the disks. A block in several clusters has
    a copy from each, as far as these fall on different disks.
    """
    rest = np.ones(blocks, dtype=np.bool_)
    rest[clusters.members] = False
    written = np.concatenate([clusters.members, np.flatnonzero(rest)])
    _, first = np.unique(written * disks + np.arange(len(written)) % disks, return_index=True)
    first = np.sort(first)  # the same block on the same disk again is not a copy
    written, disk = written[first], first % disks
    by_block = np.argsort(written, kind="stable")
    copy = np.empty(len(written), dtype=np.int64)
    sorted_blocks = written[by_block]
    copy[by_block] = np.arange(len(written)) - np.searchsorted(sorted_blocks, sorted_blocks)
    table = np.full((blocks, int(copy.max(initial=0)) + 1), -1, dtype=np.int64)
    table[written, copy] = disk
    return table, written[np.sort(np.unique(written, return_index=True)[1])]


def _of_pages(config: ArmConfig, place: Callable[[int], IntArray]) -> Layout:
    unit_of = np.arange(config.blocks) // config.known.page_blocks
    return Layout(
        unit_of=unit_of,
        unit_bytes=config.known.page_bytes,
        placement=Placement.of(place(int(unit_of[-1]) + 1), disks=config.disks),
    )


def _of_blocks(config: ArmConfig, disk_of: IntArray, order: IntArray | None = None) -> Layout:
    return Layout(
        unit_of=np.arange(config.blocks),
        unit_bytes=config.known.block_bytes,
        placement=Placement.of(disk_of, disks=config.disks, order=order),
    )


def _raid0(config: ArmConfig) -> Layout:
    chunk = max(1, RAID0_CHUNK_BYTES // config.known.page_bytes)
    return _of_pages(config, lambda pages: striped(pages, config.disks, chunk_units=chunk))


def _cluster_per_disk(config: ArmConfig) -> Layout:
    disk_of = cluster_per_disk(config.known.clusters, config.speeds, blocks=config.blocks)
    return _of_blocks(config, disk_of, cluster_striped(config.known.clusters, config.disks, blocks=config.blocks)[1])


def _swarm(config: ArmConfig) -> Layout:
    return _of_blocks(config, *cluster_striped(config.known.clusters, config.disks, blocks=config.blocks))


def parts_of(packed: Layout, packing: Packing) -> Layout:
    """The same pages on the same disks, with a block as the unit of reading."""
    pages, page_blocks = packed.placement, packing.members.shape[1]
    column = np.zeros(len(packing.page_of), dtype=np.int64)
    page, at = np.nonzero(packing.members >= 0)
    column[packing.members[page, at]] = at
    disk_of = pages.disk_of[packing.page_of]
    slot_of = pages.slot_of[packing.page_of] * page_blocks + column[:, None]
    return Layout(
        unit_of=np.arange(len(packing.page_of)),
        unit_bytes=packed.unit_bytes // page_blocks,
        placement=Placement(disks=pages.disks, disk_of=disk_of, slot_of=np.where(disk_of < 0, -1, slot_of)),
        pages=packed,
    )


def _packed(config: ArmConfig, disk_of: IntArray) -> Layout:
    known = config.known
    return Layout(
        unit_of=known.packing.page_of,
        unit_bytes=known.page_bytes,
        placement=Placement.of(disk_of, disks=config.disks, order=known.page_order),
    )


ARMS: dict[str, Callable[[ArmConfig], Layout]] = {
    "sequential": lambda config: _of_pages(config, lambda pages: sequential(pages, config.disks)),
    "hash": lambda config: _of_pages(config, lambda pages: hashed(pages, config.speeds)),
    "raid0": _raid0,
    "fixed-blocks": lambda config: _of_pages(config, lambda pages: striped(pages, config.disks)),
    "no-cluster": lambda config: _of_blocks(config, striped(config.blocks, config.disks)),
    "cluster-per-disk": _cluster_per_disk,
    "swarm": _swarm,
    "polder-pages": lambda config: config.with_copies,
    "polder": lambda config: parts_of(config.with_copies, config.known.packing),
    # On the way to polder:
    "packing": lambda config: _packed(config, striped(config.known.packing.pages, config.disks)),
    "placement": lambda config: _packed(config, config.page_disks),
    "replicas": lambda config: config.with_copies,
}
GREEDY = ("swarm", "replicas")
"""What is read by the paper's schedule; all others by the exact one."""
PARTS = {
    "striped": "fixed-blocks",
    "packing": "packing",
    "placement": "placement",
    "replicas": "replicas",
    "schedule": "polder-pages",
    "parts": "polder",
}
"""What polder adds to striped pages of successive blocks, one after another -> the layout with it. Replicas are read
greedily before `schedule`, whole pages before `parts`."""
