"""Tiers that fail on purpose: loads that do not come, bytes that arrive changed. Seeded, so that a run can be repeated."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from polder.errors import ConfigError
from polder.testing.links import EmulatedLink
from polder.tiers.slots import Recipe
from polder.tiers.transfer import BatchMemory, Carried, HostRows, Mover, News, Part, Pieces, TierMemory

__all__ = ["EmulatedBatch", "EmulatedMemory", "Faults", "FaultyMemory", "parse_faults"]

_FAULT = re.compile(r"(fail|corrupt|seed)=([0-9.]+)")


@dataclass(frozen=True, kw_only=True)
class Faults:
    fail: float = 0.0
    """Share of loaded blocks that raise."""
    corrupt: float = 0.0
    """Share of loaded blocks of which one byte is changed on the way."""
    seed: int = 0


def parse_faults(text: str) -> Faults:
    """ "fail=0.2,corrupt=0.01,seed=1". Raises ConfigError on anything else."""
    values: dict[str, float] = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        match = _FAULT.fullmatch(part)
        if match is None:
            raise ConfigError(f"fault {part!r}: write fail=0.2, corrupt=0.01 or seed=1")
        values[match[1]] = float(match[2])
    return Faults(fail=values.get("fail", 0.0), corrupt=values.get("corrupt", 0.0), seed=int(values.get("seed", 0)))


class FaultyMemory:
    """Another tier's memory, with faults in its loads."""

    def __init__(self, inner: TierMemory, faults: Faults) -> None:
        self._inner, self._faults, self._random = inner, faults, random.Random(faults.seed)

    def store(self, recipe: Recipe, row: int, block: Pieces, mover: Mover) -> bool:
        return self._inner.store(recipe, row, block, mover)

    def load(self, recipe: Recipe, row: int, block: Pieces, mover: Mover) -> bool:
        if self._random.random() < self._faults.fail:
            raise OSError("injected fault")
        there = self._inner.load(recipe, row, block, mover)
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


class EmulatedBatch:
    """A tier of whole parts, whose pages go on to the engine's blocks over an emulated link, as those of the host tier do."""

    def __init__(self, inner: BatchMemory, link: EmulatedLink) -> None:
        self._inner, self._link = inner, link

    def load_part(self, part: Part, blocks: Sequence[Pieces], mover: Mover) -> Carried:
        return self._inner.load_part(part, blocks, _LinkedMover(mover, self._link))

    def spill_part(self, part: Part, host: HostRows, mover: Mover) -> Carried:
        return self._inner.spill_part(part, host, mover)

    def tend(self, copies: int) -> Carried:
        return self._inner.tend(copies)

    def drop(self) -> Carried:
        return self._inner.drop()

    def news(self) -> News:
        return self._inner.news()

    def stop(self) -> None:
        self._inner.stop()

    def close(self) -> None:
        self._inner.close()


class _LinkedMover:
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


class EmulatedMemory:
    """One direction of another tier's memory behind an emulated link: a part of a job takes as long as the link needs for it."""

    def __init__(self, inner: TierMemory, link: EmulatedLink) -> None:
        self._inner, self._link = inner, link

    def store(self, recipe: Recipe, row: int, block: Pieces, mover: Mover) -> bool:
        return self._inner.store(recipe, row, block, mover)

    def load(self, recipe: Recipe, row: int, block: Pieces, mover: Mover) -> bool:
        return self._inner.load(recipe, row, block, mover)

    def finish(self, size_bytes: int, started: float) -> None:
        self._inner.finish(size_bytes, started)
        self._link.charge(size_bytes, started)

    def close(self) -> None:
        self._inner.close()
