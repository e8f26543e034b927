"""A table of the disks and slots of all copies of pages, and the plan of a step's reads made from it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polder.arrays import IntArray
from polder.errors import IntegrityError
from polder.swarm.reads import ReadPlan

__all__ = ["Placement", "plan_reads"]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the copies of pages are."""

    disks: int
    disk_of: IntArray
    """[pages, copies] the disk of each copy, -1 for none. No disk is twice in a row."""
    slot_of: IntArray
    """[pages, copies] the slot of each copy on its disk."""

    @classmethod
    def of(cls, disk_of: IntArray, *, disks: int, order: IntArray | None = None) -> Placement:
        """Gives slots on each disk in `order` of pages (of their numbers if None). `disk_of`: [pages] or [pages,
        copies]."""
        table = disk_of.reshape(len(disk_of), -1)
        slot_of = np.full(table.shape, -1, dtype=np.int64)
        rank = np.argsort(order) if order is not None else np.arange(len(table))
        page, copy = np.nonzero(table >= 0)
        by_disk = np.lexsort((copy, rank[page], table[page, copy]))
        page, copy = page[by_disk], copy[by_disk]
        disk = table[page, copy]
        slot_of[page, copy] = np.arange(len(page)) - np.searchsorted(disk, np.arange(disks))[disk]
        return cls(disks=disks, disk_of=table, slot_of=slot_of)

    def masks(self) -> IntArray:
        """[pages] bit d says that disk d has a copy."""
        bits = np.where(self.disk_of >= 0, np.int64(1) << np.maximum(self.disk_of, 0), 0)
        masks: IntArray = bits.sum(axis=1)
        return masks

    def check_integrity(self) -> None:
        """Raises IntegrityError when a page is on a disk twice or on none, or two copies are in one slot."""
        page, copy = np.nonzero(self.disk_of >= 0)
        disk, slot = self.disk_of[page, copy], self.slot_of[page, copy]
        for name, keys in (("page", page), ("slot", slot)):
            pairs = np.stack([disk, keys])
            if np.unique(pairs, axis=1).shape[1] != len(page):
                raise IntegrityError(f"placement: a {name} has two copies on one disk")
        if not (self.disk_of >= 0).any(axis=1).all():
            raise IntegrityError("placement: a page is on no disk")


def plan_reads(placement: Placement, pages: IntArray, chosen: IntArray) -> ReadPlan:
    """Plans the reads of pages from the disks that `exact` or `greedy` chose."""
    copy = (placement.disk_of[pages] == chosen[:, None]).argmax(axis=1)
    return ReadPlan.of(pages, chosen, placement.slot_of[pages, copy], lost=pages[:0])
