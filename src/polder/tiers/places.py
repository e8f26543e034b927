"""Memory that tiers are made of, as a worker sees it: the host region, and the lenders' KV caches."""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import xxhash

from polder.arrays import IntArray
from polder.errors import EnvironmentFault
from polder.memory import _libc
from polder.memory.addresses import bytes_at, rows_at
from polder.memory.backend import Backend
from polder.memory.copy import CopyEngine
from polder.memory.pool import ImportedPages
from polder.memory.span import Span
from polder.memory.tensor import tensor_over
from polder.tiers.borrowing import ChunkGeometry
from polder.tiers.lending import LendingTable
from polder.tiers.slots import Recipe
from polder.tiers.transfer import Mover, Pieces

__all__ = ["CpuMover", "CudaMover", "HostMemory", "Lent", "PeerMemory", "pair", "wait_for_end"]


_FACTOR = 0x9E3779B97F4A7C15
"""Of CudaMover's sum, from piece to piece."""


def pair(dst: Pieces, src: Pieces) -> tuple[list[int], list[int], list[int]]:
    """Cuts two lists of pieces where either has a border: (destinations, sources, lengths). `dst` may be the longer one."""
    targets, sources, lengths = [], [], []
    to, room, ahead = 0, 0, iter(dst)
    for start, size in src:
        while size:
            if not room:
                to, room = next(ahead)
            part = min(size, room)
            targets.append(to)
            sources.append(start)
            lengths.append(part)
            to, room, start, size = to + part, room - part, start + part, size - part
    return targets, sources, lengths


class CpuMover:
    """Copies by numpy, with the GIL released, and xxh3.

    The pieces of a block lie at equal distances, layer by layer, on both sides mostly, so one call copies them all. That
    matters: the engine's own thread runs beside this one, and each call is a fight for the GIL.
    """

    def copy(self, dst: Pieces, src: Pieces) -> None:
        to, start, sizes = pair(dst, src)
        first = 0
        while first < len(to):
            last = first + 1
            size = sizes[first]
            if last < len(to):
                steps = to[last] - to[first], start[last] - start[first]
                while (
                    last < len(to)
                    and sizes[last] == size
                    and (to[last] - to[last - 1], start[last] - start[last - 1]) == steps
                ):
                    last += 1
            rows = last - first
            if rows == 1:
                _libc.copy_bytes(to[first], start[first], size)
            else:
                target = rows_at(to[first], (rows, size), steps[0])
                target[:] = rows_at(start[first], (rows, size), steps[1])
            first = last

    def checksum(self, pieces: Pieces, seed: int) -> int:
        digest = xxhash.xxh3_64(seed=seed)
        for address, size in pieces:
            digest.update(bytes_at(address, size))
        return digest.intdigest()

    checksum_in_host = checksum


class CudaMover:
    """The copy engine's stream, and a sum that the device computes itself: fetching the bytes to hash them would cost more than
    recomputing them. The sum is not xxh3, but every bit counts and so does its place: words times odd numbers, modulo 2^64.

    The sum is computed in a stream of its own for each thread. The thread's default would be the legacy stream, in which the sum
    would wait for the engine's steps where the engine computes there, and be ordered with nothing where it does not.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._copies = CopyEngine(backend)
        self._streams = threading.local()

    def copy(self, dst: Pieces, src: Pieces) -> None:
        to, start, sizes = pair(dst, src)
        addresses = np.array(to, dtype=np.uint64), np.array(start, dtype=np.uint64)
        self._copies.wait(self._copies.submit(*addresses, np.array(sizes, dtype=np.int64)))

    def checksum(self, pieces: Pieces, seed: int) -> int:
        import torch

        with self._stream():
            total = torch.tensor(_signed(seed), dtype=torch.int64, device=self._backend.device)
            for address, size in pieces:
                words = tensor_over(address, size, self._backend.device, None).view(torch.int64)
                weights = torch.arange(1, 2 * len(words), 2, dtype=torch.int64, device=words.device)
                total = total * _signed(_FACTOR) + (words * weights).sum()
            return int(total) & (2**64 - 1)

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        """What torch launches within runs in this thread's own stream."""
        import torch

        if not self._backend.device.startswith("cuda"):
            return contextlib.nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._backend.device)
        own: contextlib.AbstractContextManager[object] = torch.cuda.stream(self._streams.own)
        return own

    def checksum_in_host(self, pieces: Pieces, seed: int) -> int:
        total = seed
        for address, size in pieces:
            words = np.frombuffer(bytes_at(address, size), dtype=np.uint64)
            weights = np.arange(1, 2 * len(words), 2, dtype=np.uint64)
            total = (total * _FACTOR + int((words * weights).sum(dtype=np.uint64))) & (2**64 - 1)
        return total


def _signed(word: int) -> int:
    """The number that a signed 64-bit integer has where an unsigned one has `word`."""
    return word - (word >> 63 << 64)


class HostMemory:
    """This rank's part of the host region: equal slots, one after another."""

    def __init__(self, address: int, slot_bytes: int) -> None:
        self._address, self._slot_bytes = address, slot_bytes

    def store(self, recipe: Recipe, row: int, block: Pieces, mover: Mover) -> bool:
        mover.copy(self._slot(recipe, row), block)
        return True

    def load(self, recipe: Recipe, row: int, block: Pieces, mover: Mover) -> bool:
        address, _ = self._slot(recipe, row)[0]
        mover.copy(block, [(address, sum(size for _, size in block))])
        return True

    def finish(self, size_bytes: int, started: float) -> None:
        """Nothing to wait for: each copy was."""

    def close(self) -> None:
        """The pages belong to whoever mapped them."""

    def _slot(self, recipe: Recipe, row: int) -> Pieces:
        return [(self._address + int(recipe.slots[row]) * self._slot_bytes, self._slot_bytes)]


@dataclass(frozen=True, kw_only=True)
class Lent:
    """One lender, as a borrower's worker needs it. `fetch` brings handles of its pages: (rank, page numbers) -> adopted."""

    table: LendingTable
    cut: ChunkGeometry
    generation: int
    fetch: Callable[[ImportedPages, int, Sequence[int]], None]


class _Mirror:
    """A lender's pages, mapped here: a slot for each page of each unit of each rank, filled when first needed."""

    def __init__(self, lent: Lent, backend: Backend) -> None:
        self.lent, self._backend = lent, backend
        self._imported = ImportedPages(backend)
        pages = lent.table.pages
        self._span = Span(backend, pages.size)
        self._first = self._span.address(0)
        self._mapped = np.full(pages.shape, -1, dtype=np.int64)

    def addresses(self, chunks: IntArray) -> list[int]:
        """Where the chunks are. Raises when a unit is not mapped, or the lender gave a page back."""
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
"""A lender that could not be opened is not asked for again so long: its blocks are misses at once, not each after a question."""


class PeerMemory:
    """The lenders' memory. Every lane's thread needs one of its own: locks belong to an open file."""

    def __init__(self, *, number: int, rank: int, backend: Backend, open_lender: Callable[[str], Lent]) -> None:
        """`open_lender`: finds a lender by name; raises PolderError when there is none (any more)."""
        self._number, self._rank, self._backend, self._open = number, rank, backend, open_lender
        self._mirrors: dict[str, _Mirror] = {}
        self._refused_until: dict[str, float] = {}  # lender -> time.monotonic()

    def store(self, recipe: Recipe, row: int, block: Pieces, mover: Mover) -> bool:
        mirror = self._mirror(recipe.lender)
        chunks, epochs = recipe.chunks[row, self._rank], recipe.epochs[row, self._rank]
        lots, first = np.unique(chunks // mirror.lent.cut.per_lot, return_index=True)
        table = mirror.lent.table
        if not table.valid(lots, epochs[first]):
            return False
        # Before the lock: it may ask the broker for handles, and a lender must not wait for that.
        target = [(address, mirror.lent.cut.chunk_bytes) for address in mirror.addresses(chunks)]
        with table.writing(self._number, lots.tolist(), epochs[first].tolist()) as ours:
            if ours:
                mover.copy(target, block)
        return ours

    def load(self, recipe: Recipe, row: int, block: Pieces, mover: Mover) -> bool:
        mirror = self._mirror(recipe.lender)
        chunks, epochs = recipe.chunks[row, self._rank], recipe.epochs[row, self._rank]
        lots = chunks // mirror.lent.cut.per_lot
        if not mirror.lent.table.valid(lots, epochs):
            return False
        source, left = [], sum(size for _, size in block)
        for address in mirror.addresses(chunks):
            size = min(left, mirror.lent.cut.chunk_bytes)
            source.append((address, size))
            left -= size
        mover.copy(block, source)
        return mirror.lent.table.valid(lots, epochs)

    def finish(self, size_bytes: int, started: float) -> None:
        """Nothing to wait for: each copy was."""

    def close(self) -> None:
        for mirror in self._mirrors.values():
            mirror.close()
        self._mirrors.clear()

    def _mirror(self, lender: str) -> _Mirror:
        mirror = self._mirrors.get(lender)
        if mirror is not None and mirror.lent.table.closed:
            self._mirrors.pop(lender).close()
            mirror = None
        if mirror is None:
            if time.monotonic() < self._refused_until.get(lender, 0.0):
                raise EnvironmentFault(f"{lender} could not be opened just now")
            try:
                mirror = self._mirrors[lender] = _Mirror(self._open(lender), self._backend)
            except Exception:
                self._refused_until[lender] = time.monotonic() + _REFUSED_FOR_S
                raise
        return mirror


def wait_for_end(pid: int, timeout_s: float = 2.0) -> None:
    """Returns when a process is gone, its GPU contexts included; for LendingTable's `on_dead_writer` on CUDA."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return
        try:
            poll = select.poll()  # select() knows no descriptor above 1023
            poll.register(pidfd, select.POLLIN)
            if poll.poll(50):
                return
        finally:
            os.close(pidfd)
