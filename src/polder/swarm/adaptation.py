"""When a packing has aged, and which pages to rewrite then.

When reading changes, the balance of the disks hardly suffers, but the packing does. It is measured by the pages read
for each wanted block. When this is a quarter higher than right after clustering, the pages that lost most are taken
apart and packed anew. All other pages stay as and where they are, so only pages that change are rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polder.arrays import BoolArray, FloatArray, IntArray
from polder.swarm.activations import Profile
from polder.swarm.clusters import PackConfig, Packing, pack
from polder.swarm.placement import anti_affine

__all__ = ["Drift", "Repacked", "page_fill", "repack"]


class Drift:
    """Compares the present cost of reading with the cost after clustering."""

    def __init__(self, *, after_clustering: float, threshold: float = 1.25, halflife_steps: float = 64.0) -> None:
        """`after_clustering`: the pages read for each wanted block then. `threshold`: the ratio that is drift."""
        self._baseline, self._threshold = after_clustering, threshold
        self._decay = 0.5 ** (1 / halflife_steps)
        self._pages = self._blocks = self._weight = 0.0
        self._full_weight = 0.5 / (1 - self._decay)  # the weight of a half-life of steps

    @property
    def ratio(self) -> float:
        """The present cost over the cost after clustering; 1 before anything was read."""
        return self._pages / self._blocks / self._baseline if self._blocks else 1.0

    @property
    def drifted(self) -> bool:
        """Whether to pack again. Never before a half-life of steps was seen, because a few odd steps are no drift."""
        return self._weight >= self._full_weight and self.ratio > self._threshold

    def note(self, pages_read: int, blocks_wanted: int) -> None:
        """Notes the cost of one step."""
        self._pages = self._decay * self._pages + pages_read
        self._blocks = self._decay * self._blocks + blocks_wanted
        self._weight = self._decay * self._weight + 1


def page_fill(profile: Profile, packing: Packing) -> FloatArray:
    """[pages] the average share of a page that is wanted when it is read; 1 for a page that is not read."""
    reads = profile.mapped(packing.page_of, size=packing.pages).counts()
    page = packing.page_of[profile.items]
    wanted = np.bincount(page[page >= 0], minlength=packing.pages)
    blocks = (packing.members >= 0).sum(axis=1)
    fill: FloatArray = np.where(reads > 0, wanted / np.maximum(1, reads * blocks), 1.0)
    return fill


@dataclass(frozen=True, kw_only=True)
class Repacked:
    packing: Packing
    """Pages that stay keep their numbers."""
    disk_of: IntArray
    """[pages] the disks of the first copies."""
    moved: IntArray
    """The changed pages, rising, which have to be written. Their second copies have to be made anew too."""


def repack(
    profile: Profile,
    packing: Packing,
    disk_of: IntArray,
    speeds: FloatArray,
    *,
    fill_before: FloatArray,
    config: PackConfig,
    threshold: float = 1.25,
) -> Repacked:
    """Packs the blocks of pages whose fill fell anew, by the steps of this profile alone.

    `fill_before`: [pages] page_fill after the last clustering. A page is taken apart when its fill is lower than that,
    or than the average of all pages then, by the factor `threshold`. The average gives blocks a chance that were packed
    as noise.
    """
    reads = profile.mapped(packing.page_of, size=packing.pages).counts()
    fill = page_fill(profile, packing)
    usual = float(np.average(fill_before, weights=reads)) if reads.any() else 1.0
    apart = (reads > 0) & (fill * threshold < np.maximum(fill_before, usual))
    members = packing.members.copy()
    again = pack(profile, config, blocks=np.sort(members[apart][members[apart] >= 0])).members
    members[apart] = _keeping_numbers(members[apart], again)
    moved = _differ(members, packing.members)
    packed = Packing.of(members, blocks=len(packing.page_of))
    placed = anti_affine(
        profile.mapped(packed.page_of, size=packed.pages), speeds, fixed=np.where(moved, np.int64(-1), disk_of)
    )
    return Repacked(packing=packed, disk_of=placed, moved=np.flatnonzero(moved))


def _keeping_numbers(old: IntArray, new: IntArray) -> IntArray:
    """[len(old), k] the new pages. A page with the same blocks as an old one gets its row; rows that are not needed are
    empty."""
    rows = np.full(old.shape, -1, dtype=np.int64)
    number = {tuple(sorted(page)): row for row, page in enumerate(old.tolist())}
    kept = [number.get(tuple(sorted(page)), -1) for page in new.tolist()]
    free = sorted(set(range(len(old))) - set(kept))
    for page, row in zip(new, kept, strict=True):
        if row >= 0:
            rows[row] = old[row]
        else:
            rows[free.pop(0)] = page
    return rows


def _differ(members: IntArray, before: IntArray) -> BoolArray:
    changed: BoolArray = (members != before).any(axis=1) & (members >= 0).any(axis=1)
    return changed
