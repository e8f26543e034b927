"""The lender's side in the engine core: which blocks are on offer, and how they come back.

A block on offer counts as free: it is in vLLM's free queue, with a callback that vLLM calls when it hands the block out
(BlockPool.unpin_blocks), and the callback takes it back. So lending needs no permission to end, and costs the scheduler
one lock per block.

How much to offer is decided once a second from what the engine itself needs: the most blocks it used in the last
`PEAK_S`, the cache that its own prefix hits make use of (the reuse curve that the broker's policy sees too), and a
reserve. The coldest free blocks are offered. Once a second they are moved to the end of the free queue, so the engine
first uses up its own cold cache, then takes blocks back.

Blocks that a borrower wrote are zeroed before the engine uses them, also when the borrower has let go of them
meanwhile: foreign bytes, read as numbers of another type, can be NaN. `take_dirty` names them after each `schedule()`,
and the workers zero them before that step (rank/calls.py).

A block that a store to a tier still reads is not offered. A block that is offered is not stored any more: its bytes are
lost.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polder.broker.wire import Neighbours
from polder.engines.vllm.core.blocks import BlockUnits
from polder.engines.vllm.core.holders import NewIds
from polder.engines.vllm.core.subsystem import Subsystem, UnitPages
from polder.engines.vllm.rank.geometry import KvGeometry
from polder.tiers.peer.lending import LendingTable, LentGeometry

__all__ = ["Lender", "lent_geometry"]

logger = logging.getLogger("polder.engine")

EVERY_S = 1.0
PEAK_S = 20.0
RESERVE = 0.1
"""This part of all blocks is neither used nor lent, so that a small need takes no lent block back."""
AT_ONCE = 256
"""Blocks offered in one go: offering takes a lock a block, and is done between two steps."""


def lent_geometry(geometry: KvGeometry, ranks: int) -> LentGeometry:
    """The table's shape for an engine with this KV cache."""
    granule_bytes, pages, _ = geometry.granules()
    return LentGeometry(
        blocks=geometry.units * geometry.unit_blocks,
        ranks=ranks,
        unit_blocks=geometry.unit_blocks,
        unit_pages=geometry.pages_per_unit,
        page_bytes=geometry.page_bytes,
        granules=pages.shape[1],
        granule_bytes=granule_bytes,
    )


class Lender(Subsystem):
    """Offers idle blocks of one BlockPool. Runs in the engine core's thread, between steps but for `_on_reuse`."""

    def __init__(
        self,
        pool: Any,
        blocks: BlockUnits,
        geometry: KvGeometry,
        ranks: int,
        lend_bytes: int,
        *,
        useful_units: Callable[[float], int] = lambda now: 0,
        before_offer: Callable[[list[int]], object] = lambda free: None,
    ) -> None:
        """`useful_units(now)`: units of cache beyond which more saves next to nothing. `before_offer(free)` returns
        when no step reads these free blocks."""
        self._pool, self._blocks, self._holders, self._geometry = pool, blocks, blocks.holders, geometry
        self._useful_units, self._before_offer = useful_units, before_offer
        self._holders.register(self._renumber)
        self._lent = lent_geometry(geometry, ranks)
        self.most_blocks = lend_bytes // self._lent.block_bytes
        self._table: LendingTable | None = None
        self._offered: set[int] = set()
        self._used: deque[tuple[float, int]] = deque()  # (time, most blocks used since the one before)
        self._peak_now = 0
        self._looked_at = float("-inf")
        self._dirty: list[int] = []  # blocks with a borrower's bytes in them that are not lent any more
        self._recalls = self._borrowed_recalls = 0
        self._recall_seconds: deque[float] = deque(maxlen=4096)

    # ------------------------------------------------------------------ the table

    def open(self, fd: int, pages: UnitPages) -> None:
        """A new table from the broker, which knows nobody yet; the fd is closed. `pages`: unit -> pages per rank."""
        self.close()
        try:
            self._table = LendingTable.create(fd, self._lent)
        finally:
            os.close(fd)
        _, granule_pages, offsets = self._geometry.granules()
        self._table.granule_page[:], self._table.granule_offset[:] = granule_pages, offsets
        self._table.foreign[self._dirty] = 1  # lent by the table before, and not zeroed yet
        self.on_mapped(pages)

    def on_mapped(self, pages: UnitPages) -> None:
        if self._table is not None:
            for unit, ranks in pages.items():
                self._table.pages[:, unit] = ranks

    def before_unmap(self, units: Sequence[int]) -> None:
        if self._table is not None:  # their blocks were taken back when BlockUnits told vLLM's watchers
            self._table.pages[:, list(units)] = -1

    def on_neighbours(self, message: Neighbours) -> None:
        if self._table is not None:
            self._table.reap(message.cores)

    # ------------------------------------------------------------------ offering

    def on_step(self, steps: Sequence[tuple[int, float]], now: float) -> None:
        self._peak_now = max(self._peak_now, self._blocks.busy_blocks)

    def on_tick(self, now: float) -> None:
        """Offers more at most every EVERY_S."""
        if self._table is None or now - self._looked_at < EVERY_S:
            return
        self._looked_at = now
        busy_blocks, usable_blocks = self._blocks.busy_blocks, self._blocks.usable_blocks
        useful_cache_blocks = self._useful_units(now) * usable_blocks // len(self._blocks.mapped)
        self._used.append((now, max(self._peak_now, busy_blocks)))
        self._peak_now = busy_blocks
        while self._used[0][0] < now - PEAK_S:
            self._used.popleft()
        peak = max(used for _, used in self._used)
        own = max(peak, useful_cache_blocks) + int(RESERVE * usable_blocks)
        wanted = min(self.most_blocks, usable_blocks - own)
        if len(self._offered) < wanted:
            self._offer(min(AT_ONCE, wanted - len(self._offered)))
        self._renew()

    def _offer(self, count: int) -> None:
        """The coldest free blocks: their cached KV is forgotten. Those already on offer are passed over, those that a
        tier is being filled from, and those whose pages nobody could fetch."""
        assert self._table is not None
        chosen: list[Any] = []
        passed = self._offered | self._holders.in_transfer()
        known = self._table.pages[0, :, 0] >= 0
        block = self._pool.free_block_queue.fake_free_list_head.next_free_block
        while block is not None and block.next_free_block is not None and len(chosen) < count:
            if block.block_id not in passed and known[block.block_id // self._lent.unit_blocks]:
                chosen.append(block)
            block = block.next_free_block
        for block in chosen:
            self._pool._maybe_evict_cached_block(block)
        self._pool.touch(chosen)
        self._pool.unpin_blocks(chosen, self._on_reuse)
        chosen_ids = np.array([block.block_id for block in chosen], dtype=np.int64)
        self._holders.renumber({}, lost=chosen_ids.tolist())
        self._offered.update(chosen_ids.tolist())
        if len(chosen_ids):
            self._before_offer(chosen_ids.tolist())
        self._table.offer(chosen_ids)

    def _renew(self) -> None:
        """Back to the end of the free queue: the engine's own cold cache goes first."""
        queue = self._pool.free_block_queue
        blocks = [self._pool.blocks[number] for number in sorted(self._offered)]
        for block in blocks:
            queue.remove(block)
        queue.append_n(blocks)

    def _on_reuse(self, block: Any) -> None:
        """vLLM hands this block to a request, or resets its cache."""
        number = block.block_id
        if number not in self._offered:
            return
        self._offered.discard(number)
        assert self._table is not None
        started = time.perf_counter()
        foreign = self._table.take_back(number)
        self._recalls += 1
        if foreign:
            self._borrowed_recalls += 1
            self._recall_seconds.append(time.perf_counter() - started)
            self._dirty.append(number)

    def _renumber(self, new: NewIds) -> None:
        """Blocks that something has moved to, that have no page any more or are lent again: zeroing them would spoil
        KV."""
        self._dirty = [number for number in self._dirty if new[number] == number]

    def take_dirty(self) -> list[int]:
        """Blocks taken back with a borrower's bytes in them, since the last call: to be zeroed before they are used."""
        dirty, self._dirty = self._dirty, []
        if self._table is not None:
            self._table.foreign[dirty] = 0
        return dirty

    def stats(self, now: float) -> dict[str, float]:
        times = sorted(self._recall_seconds)
        borrowed = 0 if self._table is None else int(np.count_nonzero(self._table.holder))
        return {
            "lent_offered_bytes": float(len(self._offered) * self._lent.block_bytes),
            "lent_borrowed_bytes": float(borrowed * self._lent.block_bytes),
            "lent_recalls_total": float(self._recalls),
            "lent_borrowed_recalls_total": float(self._borrowed_recalls),
            "lent_recall_p99_seconds": times[int(0.99 * (len(times) - 1))] if times else 0.0,
            "lent_recall_max_seconds": times[-1] if times else 0.0,
        }

    def check_integrity(self) -> None:
        """Raises AssertionError unless what is on offer is free, has no hash, and is odd in the table."""
        if self._table is None:
            return
        for number in self._offered:
            block = self._pool.blocks[number]
            assert block.ref_cnt == 0, f"block {number} is lent and in use"
            assert block.block_hash is None, f"block {number} is lent and cached"
        odd = set(np.flatnonzero(self._table.epoch % 2).tolist())
        assert odd == self._offered, f"{len(odd)} lent blocks on offer, {len(self._offered)} blocks booked"
        self._table.check_integrity()

    def close(self) -> None:
        """Lends no more. What was lent is zeroed before the engine uses it, as after any other end of lending."""
        if self._table is not None:
            self._pool._notify_reuse([self._pool.blocks[number] for number in sorted(self._offered)])
            self._table.retire()
            self._table.close()
            self._table = None
        self._offered.clear()
