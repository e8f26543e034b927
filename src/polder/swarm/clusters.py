"""Packs blocks that are read together into the same pages.

When pages are read as a whole, a profile's steps read as many pages as the sum over all pages of the steps that touch
them. Packing keeps this sum low with a greedy rule. Let S_b be the steps that read block b, and S_page those that read
any block of the page. A page
begins with the block that was read most often among those left. Then it gets, one after another, the block that
minimises |S_page u S_b| - |S_b|. Candidates are the blocks that are nearest to the first one by Jaccard's distance.

The steps of a block are the bits of its signature, so all of this is `&` and popcount over whole arrays. With n blocks,
k blocks a page and s steps, it takes n^2 s / 64 k operations on words. More than `group_blocks` blocks are first split
into groups around medoids that are far apart, which makes it linear in n. The paper's own algorithm is in
polder.bench.sparse.medoids.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.errors import ConfigError, IntegrityError
from polder.swarm.activations import Profile, Signatures

__all__ = ["PackConfig", "Packing", "pack", "pages_in_order", "reading_order"]

Counts = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class PackConfig:
    """Raises ConfigError for a number below 1."""

    page_blocks: int
    """k, the number of blocks in a page. A page should have 64 KiB at least."""
    shortlist: int = 8
    """The number of candidates for a page, in multiples of k."""
    group_blocks: int = 16384
    """The most blocks that are packed together; more are split into groups."""

    def __post_init__(self) -> None:
        if min(self.page_blocks, self.shortlist, self.group_blocks) < 1:
            raise ConfigError(
                f"packing: page_blocks {self.page_blocks}, shortlist {self.shortlist}, group_blocks {self.group_blocks}; "
                f"write numbers above 0"
            )


@dataclass(frozen=True, kw_only=True)
class Packing:
    """Which blocks are on which page."""

    members: IntArray
    """[pages, k] blocks, -1 where a page has fewer than k."""
    page_of: IntArray
    """[blocks] the page of each block, -1 for none."""

    @classmethod
    def of(cls, members: IntArray, *, blocks: int) -> Packing:
        page_of = np.full(blocks, -1, dtype=np.int64)
        page, column = np.nonzero(members >= 0)
        page_of[members[page, column]] = page
        return cls(members=members, page_of=page_of)

    @property
    def pages(self) -> int:
        return len(self.members)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless `members` and `page_of` agree."""
        page, column = np.nonzero(self.members >= 0)
        if not (self.page_of[self.members[page, column]] == page).all() or len(page) != int((self.page_of >= 0).sum()):
            raise IntegrityError(f"{len(page)} places on pages for {int((self.page_of >= 0).sum())} blocks")


def pages_in_order(order: IntArray, *, page_blocks: int) -> IntArray:
    """[pages, page_blocks] pages cut from a list of blocks; the last one is filled up with -1."""
    members = np.full((-(-len(order) // page_blocks), page_blocks), -1, dtype=np.int64)
    members.reshape(-1)[: len(order)] = order
    return members


def pack(profile: Profile, config: PackConfig, *, blocks: IntArray | None = None) -> Packing:
    """Packs `blocks`, or all of the profile's. Blocks that no step read come last, in the order of their ids."""
    counts = profile.counts()
    chosen = np.arange(profile.size) if blocks is None else blocks
    seen = chosen[counts[chosen] > 0]
    signatures = profile.signatures()
    groups = _split(seen, signatures, counts, config)
    packed = [_pack_group(group, signatures[group], counts[group], config) for group in groups]
    order = np.concatenate([*packed, chosen[counts[chosen] == 0]])
    return Packing.of(pages_in_order(order, page_blocks=config.page_blocks), blocks=profile.size)


def reading_order(profile: Profile, *, neighbours: int = 32) -> IntArray:
    """[size] an order of all pages of a profile in which pages that are read together are neighbours.

    Pages get slots on their disks in this order, so pages that are read together and lie on one disk need fewer
    requests.
    """
    members = pack(profile, PackConfig(page_blocks=neighbours)).members.reshape(-1)
    return members[members >= 0]


def _pack_group(blocks: IntArray, signatures: Signatures, counts: IntArray, config: PackConfig) -> IntArray:
    """The blocks of a group, in the order in which they fill pages."""
    by_count = np.argsort(-counts, kind="stable")
    blocks, signatures, counts = blocks[by_count], signatures[by_count], counts[by_count]
    free = np.ones(len(blocks), dtype=np.bool_)
    pages: list[IntArray] = []
    seed = 0
    while len(blocks):
        remaining = free.nonzero()[0]
        if 4 * len(remaining) < 3 * len(blocks):  # the arrays shrink with the number of blocks that are left
            blocks, signatures, counts = blocks[remaining], signatures[remaining], counts[remaining]
            free = np.ones(len(blocks), dtype=np.bool_)
            seed = 0
            continue
        seed += int(free[seed:].argmax())
        chosen = _page_around(seed, signatures, counts, free, config)
        free[chosen] = False
        pages.append(blocks[chosen])
    return np.concatenate(pages) if pages else blocks


def _page_around(
    seed: int, signatures: Signatures, counts: IntArray, free: npt.NDArray[np.bool_], config: PackConfig
) -> IntArray:
    both = _common(signatures, signatures[seed])
    nearness = both / (counts + counts[seed] - both)
    nearness[~free] = -1
    nearness[seed] = -1
    wanted = min(config.shortlist * config.page_blocks, len(nearness))
    near = np.argpartition(-nearness, wanted - 1)[:wanted]
    near = near[nearness[near] >= 0]
    # Among equals the block read most often, then the lowest id, so that prefixes of a conversation stay in order.
    near = near[np.lexsort((near, -nearness[near]))]
    theirs, alone = signatures[near], counts[near].copy()
    steps, page = signatures[seed].copy(), [seed]
    for _ in range(min(config.page_blocks - 1, len(near))):
        best = int((2 * _common(theirs, steps) - alone).argmax())
        alone[best] = np.iinfo(np.int64).max // 2  # taken
        steps |= theirs[best]
        page.append(int(near[best]))
    return np.array(page, dtype=np.int64)


def _common(signatures: Signatures, steps: Signatures) -> Counts:
    """[rows] the number of steps that each signature has in common with `steps`."""
    common: Counts = np.bitwise_count(signatures & steps).sum(axis=1, dtype=np.int32)
    return common


def _split(blocks: IntArray, signatures: Signatures, counts: IntArray, config: PackConfig) -> list[IntArray]:
    """Splits the blocks into groups near the same medoids, of at most `group_blocks`. Each is a whole number of pages,
    except the last one."""
    limit = max(1, config.group_blocks // config.page_blocks) * config.page_blocks
    if len(blocks) <= limit:
        return [blocks]
    hot = blocks[np.argsort(-counts[blocks], kind="stable")[: len(blocks) // 4]]
    nearest = np.full(len(blocks), -1.0)
    medoid_of = np.zeros(len(blocks), dtype=np.int64)
    far = int(hot[0])
    for number in range(4 * -(-len(blocks) // limit)):
        both = _common(signatures[blocks], signatures[far])
        nearness = both / (counts[blocks] + counts[far] - both)
        closer = nearness > nearest
        nearest[closer], medoid_of[closer] = nearness[closer], number
        # The next medoid is the hot block that is nearest to none so far.
        to_medoids = np.full(len(signatures), 2.0)
        to_medoids[blocks] = nearest
        far = int(hot[to_medoids[hot].argmin()])
    order = blocks[np.argsort(medoid_of, kind="stable")]
    return np.split(order, range(limit, len(order), limit))
