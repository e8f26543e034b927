"""Which disk has which page: pages that are read together lie on different disks, and the hottest have a second copy.

Swarm's abstract names a graph; none is needed. Pages are taken by falling count, and each goes to the disk on which the steps that
read it have least to read so far, in proportion to the disks' speeds. That leaves 60 to 65 % of what hashing leaves to balance;
second copies of the hottest 5 to 10 % with a balanced schedule do the rest.
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
