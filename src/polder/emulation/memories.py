"""Memories of tiers (polder.tiers.transfer) behind an emulated link, or with random faults."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

from polder.emulation.links import EmulatedLink
from polder.emulation.options import Faults
from polder.tiers.transfer import BatchMemory, HostRows, Mover, Part, PartResult, Pieces, TierMemory, TierState

__all__ = ["FaultyMemory", "PacedBatch", "PacedMemory"]


class FaultyMemory:
    """A tier's memory whose loads fail, or bring changed bytes, at random."""

    def __init__(self, inner: TierMemory, faults: Faults) -> None:
        self._inner, self._faults, self._random = inner, faults, random.Random(faults.seed)

    def store(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        return self._inner.store(part, row, block, mover)

    def load(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        if self._random.random() < self._faults.fail:
            raise OSError("injected fault")
        there = self._inner.load(part, row, block, mover)
        if there and self._random.random() < self._faults.corrupt:
            address, size = block[self._random.randrange(len(block))]
            at = self._random.randrange(size - 1)
            mover.copy([(address + at, 1)], [(address + at + 1, 1)])  # may change nothing; half of the random bytes do
            mover.copy([(address, min(64, size // 2))], [(address + size // 2, min(64, size // 2))])
        return there

    def finish(self, size_bytes: int, started: float) -> None:
        self._inner.finish(size_bytes, started)

    def close(self) -> None:
        self._inner.close()


class PacedMemory:
    """A tier's memory, used in one direction, behind an emulated link."""

    def __init__(self, inner: TierMemory, link: EmulatedLink) -> None:
        self._inner, self._link = inner, link

    def store(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        return self._inner.store(part, row, block, mover)

    def load(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        return self._inner.load(part, row, block, mover)

    def finish(self, size_bytes: int, started: float) -> None:
        self._inner.finish(size_bytes, started)
        self._link.charge(size_bytes, started)

    def close(self) -> None:
        self._inner.close()


class PacedBatch:
    """A tier that carries out whole parts. What it loads crosses an emulated link between host memory and the engine."""

    def __init__(self, inner: BatchMemory, link: EmulatedLink) -> None:
        self._inner, self._link = inner, link

    def load_part(self, part: Part, blocks: Sequence[Pieces], mover: Mover) -> PartResult:
        return self._inner.load_part(part, blocks, _PacedMover(mover, self._link))

    def spill_part(self, part: Part, host: HostRows, mover: Mover) -> PartResult:
        return self._inner.spill_part(part, host, mover)

    def replicate(self, copies: int) -> PartResult:
        return self._inner.replicate(copies)

    def drop(self) -> PartResult:
        return self._inner.drop()

    def state(self) -> TierState:
        return self._inner.state()

    def stop(self) -> None:
        self._inner.stop()

    def close(self) -> None:
        self._inner.close()


class _PacedMover:
    def __init__(self, inner: Mover, link: EmulatedLink) -> None:
        self._inner, self._link = inner, link

    def copy(self, dst: Pieces, src: Pieces) -> None:
        started = time.perf_counter()
        self._inner.copy(dst, src)
        self._link.charge(sum(size for _, size in src), started)

    def checksum(self, pieces: Pieces, seed: int) -> int:
        return self._inner.checksum(pieces, seed)

    def checksum_in_host(self, pieces: Pieces, seed: int) -> int:
        return self._inner.checksum_in_host(pieces, seed)
