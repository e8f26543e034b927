"""Chooses the disks of pages: pages that are read together go to different disks, and the hottest pages get a second
copy.

The paper uses a graph for this, but none is needed. Pages are taken by falling number of reads. Each goes to the disk
on which the steps that read it have least to read so far, in proportion to the disks' speeds. This leaves 60 to 65 % of
the imbalance that hashing leaves; second copies of the hottest 5 to 10 % and a balanced schedule remove the rest.
"""

from __future__ import annotations

import numpy as np

from polder.arrays import FloatArray, IntArray
from polder.errors import ConfigError
from polder.swarm.activations import Profile

__all__ = ["anti_affine", "with_replicas"]


def anti_affine(
    profile: Profile, speeds: FloatArray, *, max_imbalance: float = 1.02, fixed: IntArray | None = None
) -> IntArray:
    """[pages] a disk for each page, so that the pages of a step are spread. O(ids in the profile x disks).

    `speeds`: [disks] above 0. `max_imbalance`: no disk gets more pages than its share by speed times this, rounded up.
    `fixed`: [pages] the disks of pages that stay where they are, -1 for pages to be placed. Raises ConfigError for an
    imbalance below 1.
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
    """[pages, 2] the disks of the first and the second copy. The hottest `share` of pages has a second copy; -1 for the
    others.

    The copies of one disk's pages are spread over all other disks by their speeds, so that reads of these copies are
    balanced too, also when the disk is dead. Raises ConfigError for a share outside [0, 1], or above 0 with a single
    disk.
    """
    disks = len(speeds)
    if not 0 <= share <= 1 or (share > 0 and disks < 2):
        raise ConfigError(f"replicas: a share of {share} on {disks} disks; write a number from 0 to 1, 0 for one disk")
    second = np.full(len(disk_of), -1, dtype=np.int64)
    dealt = np.zeros((disks, disks))
    held = np.zeros(disks)
    for page in np.argsort(-counts, kind="stable")[: round(share * len(disk_of))].tolist():
        first = int(disk_of[page])
        # Evenly from this disk to each other disk, and evenly over the disks that take copies.
        cost = (dealt[first] + held / disks + 1) / speeds
        cost[first] = np.inf
        second[page] = int(cost.argmin())
        dealt[first, second[page]] += 1
        held[second[page]] += 1
    return np.stack([disk_of, second], axis=1)
