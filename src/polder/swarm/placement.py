"""Which disk has which page: pages that are read together lie on different disks, and the hottest have a second copy.

Swarm's abstract names a graph; none is needed. Pages are taken by falling count, and each goes to the disk on which the steps that
read it have least to read so far, in proportion to the disks' speeds. That leaves 60 to 65 % of what hashing leaves to balance;
second copies of the hottest 5 to 10 % with a balanced schedule do the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polder.errors import ConfigError, IntegrityError
from polder.swarm.activations import BoolArray, FloatArray, IntArray, Profile

__all__ = ["Placement", "anti_affine", "with_replicas"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the copies of pages are."""

    disks: int
    disk_of: IntArray
    """[pages, copies]: the disk of each copy, -1 where there is none. No disk twice in a row."""
    slot_of: IntArray
    """[pages, copies]: its slot there."""

    @classmethod
    def of(cls, disk_of: IntArray, *, disks: int, order: IntArray | None = None) -> Placement:
        """Slots are given on each disk in `order` of pages (of their numbers if None). `disk_of`: [pages] or [pages, copies]."""
        table = disk_of.reshape(len(disk_of), -1)
        slot_of = np.full(table.shape, -1, dtype=np.int64)
        rank = np.argsort(order) if order is not None else np.arange(len(table))
        page, copy = np.nonzero(table >= 0)
        by_disk = np.lexsort((copy, rank[page], table[page, copy]))
        page, copy = page[by_disk], copy[by_disk]
        disk = table[page, copy]
        slot_of[page, copy] = np.arange(len(page)) - np.searchsorted(disk, np.arange(disks))[disk]
        return cls(disks=disks, disk_of=table, slot_of=slot_of)

    def masks(self, in_use: BoolArray | None = None) -> IntArray:
        """[pages]: bit d says that disk d has a copy, and is in use ([disks]; all if None)."""
        usable = np.ones(self.disks, dtype=np.bool_) if in_use is None else in_use
        there = (self.disk_of >= 0) & usable[self.disk_of]
        masks: IntArray = np.where(there, np.int64(1) << np.maximum(self.disk_of, 0), 0).sum(axis=1)
        return masks

    def check_integrity(self) -> None:
        """Raises IntegrityError when a page is on a disk twice, on none, or two copies are in one slot."""
        page, copy = np.nonzero(self.disk_of >= 0)
        disk, slot = self.disk_of[page, copy], self.slot_of[page, copy]
        for name, keys in (("page", page), ("slot", slot)):
            pairs = np.stack([disk, keys])
            if np.unique(pairs, axis=1).shape[1] != len(page):
                raise IntegrityError(f"placement: a {name} has two copies on one disk")
        if not (self.disk_of >= 0).any(axis=1).all():
            raise IntegrityError("placement: a page is on no disk")


def anti_affine(
    profile: Profile, speeds: FloatArray, *, max_imbalance: float = 1.02, fixed: IntArray | None = None
) -> IntArray:
    """[pages]: a disk for each, such that the pages of a step are spread. O(ids in the profile x disks).

    `speeds`: [disks], above 0. `max_imbalance`: no disk has more pages than so many times its share by speed, and one. `fixed`:
    [pages], the disk of pages that stay where they are, -1 for those to be placed. Raises ConfigError for an imbalance below 1.
    """
    if max_imbalance < 1:
        raise ConfigError(f"placement: an imbalance of {max_imbalance}; write a number from 1")
    disks, pages = len(speeds), profile.size
    weight = disks * speeds / speeds.sum()
    disk_of = np.full(pages, -1, dtype=np.int64) if fixed is None else fixed.copy()
    size = np.bincount(disk_of[disk_of >= 0], minlength=disks).astype(np.float64)
    load = np.zeros((profile.steps, disks))
    placed = disk_of[profile.items]
    np.add.at(load, (profile.step_of_items()[placed >= 0], placed[placed >= 0]), 1.0)
    capacity = np.ceil(max_imbalance * pages * weight / disks)
    starts, steps = profile.by_id()
    free = np.flatnonzero(disk_of < 0)
    for page in free[np.argsort(-np.diff(starts)[free], kind="stable")].tolist():
        mine = steps[starts[page] : starts[page + 1]]
        cost = load[mine].sum(axis=0) / weight + 1e-3 * size / weight
        cost[size >= capacity] = np.inf
        disk = int(cost.argmin())
        disk_of[page] = disk
        size[disk] += 1
        load[mine, disk] += 1
    return disk_of


def with_replicas(disk_of: IntArray, counts: IntArray, speeds: FloatArray, *, share: float) -> IntArray:
    """[pages, 2]: a second copy of the hottest `share` of pages, -1 for the others.

    Copies of one disk's pages are dealt over all other disks by their speeds, so that what is read from them, or from all of them
    when the disk is dead, is spread too. Raises ConfigError for a share outside [0, 1], or above 0 with a single disk.
    """
    disks = len(speeds)
    if not 0 <= share <= 1 or (share > 0 and disks < 2):
        raise ConfigError(f"replicas: a share of {share} on {disks} disks; write a number from 0 to 1, 0 for one disk")
    second = np.full(len(disk_of), -1, dtype=np.int64)
    dealt = np.zeros((disks, disks))
    held = np.zeros(disks)
    for page in np.argsort(-counts, kind="stable")[: round(share * len(disk_of))].tolist():
        first = int(disk_of[page])
        # Evenly from this disk to each other, and evenly over the disks that take them.
        cost = (dealt[first] + held / disks + 1) / speeds
        cost[first] = np.inf
        second[page] = int(cost.argmin())
        dealt[first, second[page]] += 1
        held[second[page]] += 1
    return np.stack([disk_of, second], axis=1)
