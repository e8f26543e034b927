"""The scheduler's half of a tier: which slots it has, and which of them are free, taken or gone.

A **slot** is room for one KV block. A tier has two halves, because vLLM has two: this half lives in the scheduler's
process and decides; the other half (worker.py) lives in every worker and copies bytes. `TierSet` works with any list
of `Slots`; to add a tier, derive a class from `Slots` here and a memory from `TierMemory` or `BatchMemory` there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from polder.arrays import IntArray
from polder.diskstore.keys import Keys

__all__ = ["LentChunks", "SlotStats", "Slots", "block_ids"]


def block_ids(keys: Sequence[bytes]) -> Keys:
    """[n, 2] the 128-bit ids that tiers use for vLLM's block keys: a hash of the key, which includes its KV cache
    group.

    The disk store uses both words of an id. Eviction policies and checksums use the first.
    """
    digest = xxhash.xxh3_128_digest
    words = np.frombuffer(b"".join([digest(key) for key in keys]), dtype="<u8") if keys else np.empty(0)
    return words.reshape(-1, 2).astype(np.uint64)


@dataclass(frozen=True, kw_only=True)
class LentChunks:
    """Where the bytes of n slots lie in a lender's memory; see peer/borrowing.py."""

    lender: str
    """Empty where the memory was taken back already."""
    table: int
    """The identity of the lender's table."""
    chunks: IntArray
    """[n, ranks, k] the lender's chunks that make up each slot."""
    epochs: IntArray
    """[n, ranks, k] the epoch that each chunk's block had when the slot was made."""


@dataclass(frozen=True, kw_only=True)
class SlotStats:
    slots: int
    """Slots that exist now."""
    used: int
    slot_bytes: int
    lost: int
    """Slots that their owner took back, since the start."""


class Slots:
    """The slots of one tier, numbered from 0 to capacity - 1. Not all of them exist all the time: lent memory comes and
    goes."""

    name: str
    capacity: int
    slot_bytes: int
    behind = False
    """Whether blocks come here from the tier before, in the background. Otherwise they are copied here from the
    engine's cache."""
    permanent = False
    """Whether the memory stays where it is for the engine's whole life, so that it can be read in the background."""

    def take(self, count: int) -> IntArray:
        """Takes up to `count` free slots. They are the caller's until `give`, or until `lost` returns them."""
        raise NotImplementedError

    def give(self, slots: IntArray) -> None:
        """Frees these slots. Slots that were lost meanwhile are ignored."""
        raise NotImplementedError

    def lost(self) -> IntArray:
        """The taken slots that ceased to exist since the last call. They are no longer the caller's."""
        return np.empty(0, dtype=np.int64)

    def locate(self, slots: IntArray) -> list[tuple[IntArray, LentChunks | None]]:
        """Where the bytes of these slots are: (positions in `slots`, location) pairs that together cover all of them.

        A location of None means that the slots' numbers say it all.
        """
        return [(np.arange(len(slots)), None)] if len(slots) else []

    def stats(self) -> SlotStats:
        raise NotImplementedError

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every slot is accounted for exactly once."""
        raise NotImplementedError

    def close(self) -> None:
        """Returns what belongs to others."""

    # ------------------------------------------------------------------ tiers that outlive the engine

    @property
    def unclaimed(self) -> int:
        """Blocks that an earlier run left here and nobody has asked for yet."""
        return 0

    def claim(self, ids: Keys) -> IntArray:
        """[n] the slots of these blocks among the unclaimed ones, -1 where there is none. These slots are taken now."""
        return np.full(len(ids), -1, dtype=np.int64)

    def forget_unclaimed(self) -> None:
        """The blocks that an earlier run left are not valid any more."""

    # ------------------------------------------------------------------ tiers whose workers lose blocks

    @property
    def overcommitted(self) -> int:
        """Slots that must be freed before `take` returns any, because there is less room than there are slots."""
        return 0

    @property
    def losing(self) -> bool:
        """Whether `lost` has more to return."""
        return False

    def report_lost(self, slots: IntArray) -> None:
        """A worker has lost the blocks in these slots."""

    def set_room(self, blocks: int) -> None:
        """The worker with the least room can hold so many blocks now."""
