"""Copies blocks to and from the KV caches of lenders, in a worker."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from polder.arrays import IntArray
from polder.errors import EnvironmentFault
from polder.memory.backend import Backend
from polder.memory.pool import ImportedPages
from polder.memory.span import Span
from polder.tiers.jobs import Mover, Part, Pieces
from polder.tiers.peer.borrowing import ChunkGeometry
from polder.tiers.peer.lending import LendingTable

__all__ = ["Lent", "PeerMemory"]


@dataclass(frozen=True, kw_only=True)
class Lent:
    """One lender, as a borrower's worker needs it. `fetch(pages, rank, numbers)` imports handles of its pages."""

    table: LendingTable
    cut: ChunkGeometry
    generation: int
    fetch: Callable[[ImportedPages, int, Sequence[int]], None]


class _Mirror:
    """A lender's pages, mapped into this process. There is an address for each page of each unit of each rank; a page
    is mapped there when it is first needed."""

    def __init__(self, lent: Lent, backend: Backend) -> None:
        self.lent, self._backend = lent, backend
        self._imported = ImportedPages(backend)
        pages = lent.table.pages
        self._span = Span(backend, pages.size)
        self._first = self._span.address(0)
        self._mapped = np.full(pages.shape, -1, dtype=np.int64)

    def addresses(self, chunks: IntArray) -> list[int]:
        """The addresses of these chunks. Raises PolderError when a unit is not mapped, or the lender has given a page
        back."""
        table = self.lent.table
        ranks, units, pages, offsets = self.lent.cut.places(chunks, table)
        at = (ranks * table.geometry.units + units) * table.geometry.unit_pages + pages
        numbers = table.pages.ravel()[at]
        for wrong in np.unique(at[self._mapped.ravel()[at] != numbers]).tolist():
            rank, unit, page = np.unravel_index(wrong, table.pages.shape)
            self._remap(int(rank), int(unit), int(page), wrong, int(table.pages[rank, unit, page]))
        found: list[int] = (self._first + at * self._backend.page_bytes + offsets).tolist()
        return found

    def _remap(self, rank: int, unit: int, page: int, at: int, number: int) -> None:
        if self._mapped[rank, unit, page] >= 0:
            self._span.unmap([at])
            self._mapped[rank, unit, page] = -1
        if self._imported.missing(self.lent.generation, [number]):
            wanted = self.lent.table.pages[rank, unit].tolist()
            self.lent.fetch(self._imported, rank, self._imported.missing(self.lent.generation, wanted))
        self._span.map([at], self._imported.handles(self.lent.generation, [number]))
        self._mapped[rank, unit, page] = number

    def close(self) -> None:
        self._span.close()
        self._imported.close()
        self.lent.table.close()


_REFUSED_FOR_S = 1.0
"""A lender that could not be opened is not asked for again for so long. Its blocks are misses at once, without a
question each."""


class PeerMemory:
    """The memory of lenders. Every lane needs an object of its own, because file locks belong to an open file."""

    def __init__(self, *, number: int, rank: int, backend: Backend, open_lender: Callable[[str], Lent]) -> None:
        """`open_lender`: finds a lender by name. It raises PolderError when there is none (any more)."""
        self._number, self._rank, self._backend, self._open = number, rank, backend, open_lender
        self._mirrors: dict[str, _Mirror] = {}
        self._refused_until: dict[str, float] = {}  # lender -> time.monotonic()

    def store(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        assert part.lent is not None
        mirror = self._mirror(part.lent.lender, part.lent.table)
        chunks, epochs = part.lent.chunks[row, self._rank], part.lent.epochs[row, self._rank]
        lent, first = np.unique(chunks // mirror.lent.cut.per_block, return_index=True)
        table = mirror.lent.table
        if not table.valid(lent, epochs[first]):
            return False
        # Before the lock is taken: this may ask the broker for handles, and a lender must not wait for that.
        target = [(address, mirror.lent.cut.chunk_bytes) for address in mirror.addresses(chunks)]
        with table.writing(self._number, lent.tolist(), epochs[first].tolist()) as ours:
            if ours:
                mover.copy(target, block)
        return ours

    def load(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        assert part.lent is not None
        mirror = self._mirror(part.lent.lender, part.lent.table)
        chunks, epochs = part.lent.chunks[row, self._rank], part.lent.epochs[row, self._rank]
        lent = chunks // mirror.lent.cut.per_block
        if not mirror.lent.table.valid(lent, epochs):
            return False
        source, left = [], sum(size for _, size in block)
        for address in mirror.addresses(chunks):
            size = min(left, mirror.lent.cut.chunk_bytes)
            source.append((address, size))
            left -= size
        mover.copy(block, source)
        return mirror.lent.table.valid(lent, epochs)

    def finish(self, size_bytes: int, started: float) -> None:
        """Every copy has been waited for already."""

    def close(self) -> None:
        for mirror in self._mirrors.values():
            mirror.close()
        self._mirrors.clear()

    def _mirror(self, lender: str, table: int) -> _Mirror:
        """The lender's pages, as its table with this identity has them."""
        mirror = self._mirrors.get(lender)
        if mirror is not None and mirror.lent.table.identity != table:
            self._mirrors.pop(lender).close()
            mirror = None
        if mirror is None:
            if time.monotonic() < self._refused_until.get(lender, 0.0):
                raise EnvironmentFault(f"{lender} could not be opened just now")
            try:
                mirror = self._mirrors[lender] = self._opened(lender, table)
            except Exception:
                self._refused_until[lender] = time.monotonic() + _REFUSED_FOR_S
                raise
        return mirror

    def _opened(self, lender: str, table: int) -> _Mirror:
        lent = self._open(lender)
        if lent.table.identity != table:
            lent.table.close()
            raise EnvironmentFault(f"{lender} lends by another table now")
        return _Mirror(lent, self._backend)
