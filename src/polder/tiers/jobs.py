"""What travels between the two halves of the tiers, and what each kind of memory has to do for a job.

A job is a list of blocks to copy. It has one part for each tier that takes part. The scheduler makes it (tierset.py),
every worker carries it out (worker.py), and a `JobResult` of each worker comes back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

import numpy as np

from polder.arrays import IntArray
from polder.diskstore.keys import Keys
from polder.tiers.slots import LentChunks

__all__ = [
    *("BatchMemory", "Direction", "HostRows", "Job", "JobResult", "Mover", "Part", "PartResult"),
    *("Piece", "Pieces", "Reason", "TierMemory", "TierState"),
]

Piece = tuple[int, int]
"""(address, bytes)"""
Pieces = Sequence[Piece]
Direction = Literal["load", "store", "spill", "replicate", "drop"]
"""The last three are the disk tier's: write from host memory to disk, make second copies, forget everything."""
Reason = Literal["lost", "corrupt", "error"]


def _no_numbers() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Part:
    """The rows of a job that concern one tier, and one lender where the tier is lent memory."""

    tier: int
    rows: IntArray
    """[n] which rows of the job's places these are."""
    slots: IntArray
    """[n] the tier's slots."""
    ids: Keys
    """[n, 2] the blocks' ids, see `block_ids`."""
    blocks: IntArray = field(default_factory=_no_numbers)
    """[n] which of the job's blocks each row copies. Empty where no block of the engine takes part."""
    lent: LentChunks | None = None
    """Where the slots are, where their numbers do not say it."""
    sources: IntArray = field(default_factory=_no_numbers)
    """[n] of a spill: the slots of the host tier to write from."""
    stripes: IntArray = field(default_factory=_no_numbers)
    """[n] of a spill: consecutive numbers for consecutive blocks of a prefix; they decide which disk each page goes to.
    """


@dataclass(frozen=True, kw_only=True)
class Job:
    number: int
    direction: Direction
    parts: tuple[Part, ...]
    copies: int = 0
    """For "replicate": how many pages may be written."""


@dataclass(kw_only=True)
class JobResult:
    """What became of a job on one rank."""

    number: int
    failed: dict[int, Reason] = field(default_factory=dict)
    """The rows that did not succeed."""
    moved: dict[int, tuple[int, float]] = field(default_factory=dict)
    """By tier: bytes, and the seconds that its thread was busy with them."""
    lost: dict[int, IntArray] = field(default_factory=dict)
    """By tier: slots whose blocks are gone although nobody forgot them."""
    room: dict[int, int] = field(default_factory=dict)
    """By tier: the number of slots that there is room for now."""
    gauges: dict[str, float] = field(default_factory=dict)
    """Gauges of this rank."""


class TierMemory(Protocol):
    """The memory of one tier, as one rank sees it. Calls come from one thread."""

    def store(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        """Copies the engine's block into the slot of this row. False: the slot is not ours any more, and nothing was
        written after it was taken back."""

    def load(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
        """Copies the slot of this row into the engine's block. False: the slot was lost, and the block's bytes are
        undefined."""

    def finish(self, size_bytes: int, started: float) -> None:
        """Called after each part of a job: `size_bytes` were copied since `started` (time.perf_counter). An emulated
        link waits here."""

    def close(self) -> None: ...


class Mover(Protocol):
    """Copies bytes and computes checksums on the worker's device."""

    def copy(self, dst: Pieces, src: Pieces) -> None:
        """Copies all bytes of `src` to `dst`, which is at least as long. Returns when the bytes are there."""

    def checksum(self, pieces: Pieces, seed: int) -> int: ...

    def checksum_in_host(self, pieces: Pieces, seed: int) -> int:
        """The same checksum, of a copy of these pieces in host memory."""


@dataclass(frozen=True, kw_only=True)
class HostRows:
    """What a worker knows about n blocks in its host tier."""

    seeds: Sequence[int]
    sums: Sequence[int]
    """Checksums of the engine's bytes when they were stored."""
    sizes: Sequence[tuple[int, ...]]
    """The sizes of each block's pieces, which lie one after another in the slot. Empty where nothing was stored."""


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """What became of a part of a job."""

    failed: dict[int, Reason]
    """The failed rows, by their position in the part."""
    size_bytes: int
    """Bytes that were copied successfully."""


@dataclass(frozen=True, kw_only=True)
class TierState:
    """How a tier fares; the fields are those of JobResult."""

    lost: IntArray
    room: int
    gauges: Mapping[str, float]


class BatchMemory(Protocol):
    """A tier that carries out whole parts. One thread calls `load_part`; another one calls the other methods
    meanwhile."""

    def load_part(self, part: Part, blocks: Sequence[Pieces], mover: Mover) -> PartResult:
        """Loads row i of the part into `blocks[i]`."""

    def spill_part(self, part: Part, host: HostRows, mover: Mover) -> PartResult:
        """Writes the blocks in the host tier's slots `part.sources` to the part's own slots."""

    def replicate(self, copies: int) -> PartResult:
        """Writes up to so many second copies."""

    def drop(self) -> PartResult:
        """Forgets all blocks."""

    def state(self) -> TierState:
        """How the tier fares; asked after each part."""

    def stop(self) -> None:
        """Makes every part fail at once from now on."""

    def close(self) -> None: ...
