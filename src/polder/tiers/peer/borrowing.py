"""The peer tier's slots: a borrower stores its KV blocks in idle KV blocks of other engines (lenders).

The blocks of two models differ in size, and the least common multiple of two block sizes can be hundreds of MiB, so
nothing is aligned to it. A block that a lender offers (see lending.py) is cut into **chunks**: its granules, or parts
of a granule where a granule is larger than what the borrower needs. A slot consists of as many chunks as one block of
the borrower needs on each of its ranks, from any lent blocks of one lender; it wastes less than one chunk on each rank.
When a block is taken back, the slots with a chunk in it are lost, and their other chunks make new slots.

A chunk's number is ((block * lender's ranks + rank) * granules + granule) * parts + part.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polder.arrays import IntArray
from polder.errors import IntegrityError
from polder.tiers.peer.lending import LendingTable, LentGeometry
from polder.tiers.slots import LentChunks, Slots, SlotStats

__all__ = ["ChunkGeometry", "PeerSlots"]

_ALIGNMENT = 64
_NONE: IntArray = np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class ChunkGeometry:
    """How one borrower cuts the blocks of one lender."""

    lender: LentGeometry
    chunk_bytes: int
    parts: int
    """Number of chunks in one granule."""
    per_rank: int
    """Number of chunks that one rank of the borrower needs for one block."""

    @classmethod
    def of(cls, lender: LentGeometry, shard_bytes: int) -> ChunkGeometry:
        """Cuts for blocks of `shard_bytes` on each rank of the borrower."""
        wanted = -(-shard_bytes // _ALIGNMENT) * _ALIGNMENT
        parts = max(1, lender.granule_bytes // wanted)
        chunk = lender.granule_bytes if parts == 1 else wanted
        return cls(lender=lender, chunk_bytes=chunk, parts=parts, per_rank=-(-shard_bytes // chunk))

    @property
    def per_block(self) -> int:
        return self.lender.ranks * self.lender.granules * self.parts

    def places(self, chunks: IntArray, table: LendingTable) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """For each chunk: the lender's rank, the unit, the index of the page in the unit, and the offset in the
        page."""
        granules, parts = np.divmod(chunks, self.parts)
        shards, q = np.divmod(granules, self.lender.granules)
        lent, ranks = np.divmod(shards, self.lender.ranks)
        units, inside = np.divmod(lent, self.lender.unit_blocks)
        offsets = table.granule_offset[inside, q] + parts * self.chunk_bytes
        return ranks, units, table.granule_page[inside, q].astype(np.int64), offsets


class _Lender:
    """What this engine borrows from one lender."""

    def __init__(self, name: str, table: LendingTable, shard_bytes: int, ranks: int, first: int) -> None:
        self.name, self.table, self.first = name, table, first
        self.cut = ChunkGeometry.of(table.geometry, shard_bytes)
        self.slot_chunks = ranks * self.cut.per_rank
        self.capacity = table.geometry.blocks * self.cut.per_block // self.slot_chunks
        self.ranks = ranks
        self.block_epoch = np.zeros(table.geometry.blocks, dtype=np.int64)  # 0: not borrowed
        self.chunks = np.full((self.capacity, self.slot_chunks), -1, dtype=np.int64)
        self.made = np.zeros(self.capacity, dtype=np.bool_)
        self.taken = np.zeros(self.capacity, dtype=np.bool_)
        self.seen = -1  # the value of `table.changes` at the last look
        self.lost = np.zeros(self.capacity, dtype=np.bool_)  # taken slots that are gone, until `lose` has returned them
        self.loose: list[int] = []  # chunks of borrowed blocks that are in no slot
        self.unmade = list(range(self.capacity - 1, -1, -1))
        self.free: list[int] = []  # made and not taken

    def lose(self) -> IntArray:
        """Finds lent blocks that were taken back. Returns the taken slots that are gone with them, and forgets these
        slots."""
        changes = self.table.changes
        if changes == self.seen and not self.table.closed and not self.lost.any():
            return _NONE
        self.seen = changes
        ours = np.flatnonzero(self.block_epoch)
        changed = self.table.epoch[ours].astype(np.int64) != self.block_epoch[ours]
        self._drop(ours if self.table.closed else ours[changed])
        lost = np.flatnonzero(self.lost)
        self.lost[lost] = self.taken[lost] = False
        self.chunks[lost] = -1
        self.unmade.extend(lost.tolist())
        return lost

    def _drop(self, lent: IntArray) -> None:
        """These lent blocks are not borrowed any more. Slots with a chunk there cease to exist; taken ones when `lose`
        has returned them."""
        if not len(lent):
            return
        self.block_epoch[lent] = 0
        per_block = self.cut.per_block
        self.loose = [chunk for chunk in self.loose if self.block_epoch[chunk // per_block]]
        made = np.flatnonzero(self.made)
        hit = made[(self.block_epoch[self.chunks[made] // per_block] == 0).any(axis=1)]
        rest = self.chunks[hit].ravel()
        self.loose.extend(rest[self.block_epoch[rest // per_block] != 0].tolist())
        self.made[hit] = False
        self.lost[hit] = self.taken[hit]
        unused = hit[~self.taken[hit]]
        self.chunks[unused] = -1
        self.unmade.extend(unused.tolist())
        gone_slots = set(unused.tolist())
        self.free = [slot for slot in self.free if slot not in gone_slots]

    def give(self, slots: IntArray) -> None:
        slots = slots[self.taken[slots]]
        self.taken[slots] = False
        lost = slots[self.lost[slots]]
        self.lost[lost] = False
        self.chunks[lost] = -1
        self.unmade.extend(lost.tolist())
        self.free.extend(slots[self.made[slots]].tolist())

    def grow(self, count: int, number: int, most_blocks: int) -> None:
        """Makes slots until `count` are free, and claims lent blocks for them as long as any are on offer."""
        missing = (count - len(self.free)) * self.slot_chunks - len(self.loose)
        room = most_blocks - int(np.count_nonzero(self.block_epoch))
        if missing > 0 and room > 0:
            lent, epochs = self.table.claim(number, min(room, -(-missing // self.cut.per_block)))
            self._drop(lent[self.block_epoch[lent] != 0])  # taken back and offered again since the last look
            self.block_epoch[lent] = epochs
            for block in lent.tolist():
                self.loose.extend(range(block * self.cut.per_block, (block + 1) * self.cut.per_block))
        while len(self.free) < count and len(self.loose) >= self.slot_chunks and self.unmade:
            slot = self.unmade.pop()
            self.chunks[slot] = self.loose[: self.slot_chunks]
            del self.loose[: self.slot_chunks]
            self.made[slot] = True
            self.free.append(slot)


class PeerSlots(Slots):
    """Slots in the memory that other engines lend at the moment."""

    def __init__(self, *, name: str, number: int, shard_bytes: int, ranks: int, capacity: int) -> None:
        """`number`: this borrower's number, its process id. `capacity`: the most slots that can ever exist, over all
        lenders. `shard_bytes`: the bytes of one block on one rank."""
        self.name, self.capacity, self.slot_bytes = name, capacity, shard_bytes * ranks
        self._number, self._shard_bytes, self._ranks = number, shard_bytes, ranks
        self._lenders: list[_Lender] = []
        self._gone: list[IntArray] = []  # taken slots of lenders that left, until `lost` has returned them
        self._lost = 0
        self._share = 1

    @property
    def lenders(self) -> list[str]:
        return [lender.name for lender in self._lenders]

    @property
    def closed(self) -> list[str]:
        """Lenders that have closed the table that is attached here. They may lend by a new one."""
        return [lender.name for lender in self._lenders if lender.table.closed]

    def attach(self, name: str, table: LendingTable) -> None:
        """Adds a lender, or a new table of a known lender. The table belongs to this object now. It is closed if
        `capacity` is used up."""
        self.detach(name)
        first = 0
        capacity = _Lender(name, table, self._shard_bytes, self._ranks, 0).capacity
        for known in sorted(self._lenders, key=lambda lender: lender.first):
            if known.first - first >= capacity:
                break
            first = known.first + known.capacity
        if first + capacity <= self.capacity:
            self._lenders.append(_Lender(name, table, self._shard_bytes, self._ranks, first))
        else:
            table.close()

    def detach(self, name: str) -> None:
        """Removes a lender: its slots are lost."""
        for lender in [known for known in self._lenders if known.name == name]:
            if lender.taken.any():
                self._gone.append(lender.first + np.flatnonzero(lender.taken))
            self._lenders.remove(lender)
            lender.table.close()

    def share_with(self, borrowers: int) -> None:
        """Tells how many engines borrow from the same lenders: each claims at most an equal share of the lent
        blocks."""
        self._share = max(1, borrowers)

    def take(self, count: int) -> IntArray:
        found: list[int] = []
        for lender in self._lenders:
            # The numbers of lost slots must not be reused before `lost` has returned them.
            if len(found) < count and not lender.table.closed and not self._gone:
                wanted = count - len(found)
                lender.grow(wanted, self._number, lender.table.geometry.blocks // self._share)
                slots = lender.free[:wanted]
                del lender.free[:wanted]
                lender.taken[slots] = True
                found.extend(lender.first + slot for slot in slots)
        return np.array(found, dtype=np.int64)

    def give(self, slots: IntArray) -> None:
        for lender, _, local in self._split(slots):
            lender.give(local)
        self._gone = [left for gone in self._gone if len(left := gone[~np.isin(gone, slots)])]

    def lost(self) -> IntArray:
        lost = [*self._gone, *(lender.first + lender.lose() for lender in self._lenders)]
        self._gone = []
        self._lost += sum(map(len, lost))
        return np.concatenate(lost) if lost else np.empty(0, dtype=np.int64)

    def locate(self, slots: IntArray) -> list[tuple[IntArray, LentChunks | None]]:
        found: list[tuple[IntArray, LentChunks | None]] = []
        rest = np.ones(len(slots), dtype=np.bool_)
        for lender, positions, local in self._split(slots):
            local = local[made := lender.made[local]]
            positions = positions[made]
            rest[positions] = False
            shape = (len(local), self._ranks, lender.cut.per_rank)
            chunks = lender.chunks[local].reshape(shape)
            epochs = lender.block_epoch[chunks // lender.cut.per_block]
            found.append(
                (positions, LentChunks(lender=lender.name, table=lender.table.identity, chunks=chunks, epochs=epochs))
            )
        if rest.any():  # lost already: no lender has this name
            nowhere = np.zeros((int(rest.sum()), self._ranks, 1), dtype=np.int64)
            found.append((np.flatnonzero(rest), LentChunks(lender="", table=0, chunks=nowhere, epochs=nowhere)))
        return found

    def stats(self) -> SlotStats:
        return SlotStats(
            slots=sum(int(lender.made.sum()) for lender in self._lenders),
            used=sum(int(lender.taken.sum()) for lender in self._lenders) + sum(map(len, self._gone)),
            slot_bytes=self.slot_bytes,
            lost=self._lost,
        )

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every chunk of a borrowed block is in exactly one slot, or in none."""
        for lender in self._lenders:
            made = lender.chunks[np.flatnonzero(lender.made)].ravel()
            chunks = np.concatenate([made, np.array(lender.loose, dtype=np.int64)])
            owned = int(np.count_nonzero(lender.block_epoch)) * lender.cut.per_block
            ours = (lender.block_epoch[chunks // lender.cut.per_block] != 0).all()
            if len(np.unique(chunks)) != len(chunks) or len(chunks) != owned or not ours:
                raise IntegrityError(f"{lender.name}: {len(chunks)} chunks booked, {owned} borrowed")
            free = np.zeros(lender.capacity, dtype=np.bool_)
            free[lender.free] = True
            inuse = lender.taken & ~lender.lost
            if len(set(lender.free)) != len(lender.free) or not np.array_equal(free ^ inuse, lender.made):
                raise IntegrityError(f"{lender.name}: a slot is neither free nor taken, or both")

    def close(self) -> None:
        for lender in self._lenders:
            if not lender.table.closed:
                lender.table.release(self._number, np.flatnonzero(lender.block_epoch))
            lender.table.close()
        self._lenders.clear()

    def _split(self, slots: IntArray) -> list[tuple[_Lender, IntArray, IntArray]]:
        """For each lender of some of these slots: the lender, their positions in `slots`, and their numbers within the
        lender."""
        parts = []
        for lender in self._lenders:
            at = np.flatnonzero((slots >= lender.first) & (slots < lender.first + lender.capacity))
            if len(at):
                parts.append((lender, at, slots[at] - lender.first))
        return parts
