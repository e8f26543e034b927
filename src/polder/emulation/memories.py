"""Memories of tiers (polder.tiers.worker) behind an emulated link, or with random faults."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from polder.emulation.links import EmulatedLink
from polder.emulation.options import Faults
from polder.tiers.jobs import BatchMemory, Mover, Part, PartResult, Pieces, TierMemory

__all__ = ["FaultyMemory", "PacedBatch", "PacedMemory"]


class _Wrapper:
    """Passes all calls on to another object, except for methods that a subclass has."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class FaultyMemory(_Wrapper):
    """A tier's memory whose loads fail, or bring changed bytes, at random."""

    def __init__(self, inner: TierMemory, faults: Faults) -> None:
        super().__init__(inner)
        self._faults, self._random = faults, random.Random(faults.seed)

    def load(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        if self._random.random() < self._faults.fail:
            raise OSError("injected fault")
        there: bool = self._inner.load(part, row, block, mover)
        if there and self._random.random() < self._faults.corrupt:
            address, size = block[self._random.randrange(len(block))]
            at = self._random.randrange(size - 1)
            mover.copy([(address + at, 1)], [(address + at + 1, 1)])  # may change nothing; half of the random bytes do
            mover.copy([(address, min(64, size // 2))], [(address + size // 2, min(64, size // 2))])
        return there


class PacedMemory(_Wrapper):
    """A tier's memory, used in one direction, behind an emulated link."""

    def __init__(self, inner: TierMemory, link: EmulatedLink) -> None:
        super().__init__(inner)
        self._link = link

    def finish(self, size_bytes: int, started: float) -> None:
        self._inner.finish(size_bytes, started)
        self._link.charge(size_bytes, started)


class PacedBatch(_Wrapper):
    """A tier that carries out whole parts. What it loads crosses an emulated link between host memory and the
    engine."""

    def __init__(self, inner: BatchMemory, link: EmulatedLink) -> None:
        super().__init__(inner)
        self._link = link

    def load_part(self, part: Part, blocks: Sequence[Pieces], mover: Mover) -> PartResult:
        result: PartResult = self._inner.load_part(part, blocks, _PacedMover(mover, self._link))
        return result


class _PacedMover(_Wrapper):
    def __init__(self, inner: Mover, link: EmulatedLink) -> None:
        super().__init__(inner)
        self._link = link

    def copy(self, dst: Pieces, src: Pieces) -> None:
        started = time.perf_counter()
        self._inner.copy(dst, src)
        self._link.charge(sum(size for _, size in src), started)
