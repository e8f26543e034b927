"""Where the units of stored prefixes lie: in host memory, or on disks."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from polder.arrays import BoolArray, IntArray
from polder.diskstore.config import DiskConfig, StoreConfig
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.io import ALIGNMENT_BYTES, Arena
from polder.diskstore.store import DiskStore, PageLocations
from polder.emulation.factory import Emulation
from polder.engines.vllm.plans import SparsePlan
from polder.errors import ConfigError

__all__ = ["Disks", "Home", "MakeHome", "in_memory"]

PARTS = 4
"""Units of a page. Pages are written whole, and read in parts."""
LEAST_PAGE_BYTES = 64 << 10
STAGED_UNITS = 256
"""Read or written at once."""


class Home(Protocol):
    """The units of one layer of one prefix."""

    def read(self, units: IntArray, cache: torch.Tensor, blocks: IntArray) -> BoolArray:
        """Copies units into blocks of the KV cache. Returns which of them arrived; the other blocks are as they were."""

    def drop(self) -> None:
        """Nobody reads them any more."""


MakeHome = Callable[[torch.Tensor], Home]
"""Stores the units of one layer: [units, ...] in the layout of the kernel. What cannot be written cannot be read later."""


@dataclass(frozen=True)
class _Memory:
    units: torch.Tensor

    def read(self, units: IntArray, cache: torch.Tensor, blocks: IntArray) -> BoolArray:
        cache[torch.from_numpy(blocks)] = self.units[torch.from_numpy(units)]
        return np.ones(len(units), np.bool_)

    def drop(self) -> None:
        pass


in_memory: MakeHome = _Memory


class Disks:
    """One rank's store. Pages of former runs are of no use, since their index is gone: the disks drop them for new ones."""

    def __init__(self, plan: SparsePlan, rank: int, unit_bytes: int, emulation: Emulation) -> None:
        """Raises ConfigError or BudgetError when a directory or a size cannot be meant."""
        if unit_bytes % ALIGNMENT_BYTES:
            raise ConfigError(
                f"POLDER_SPARSE_DISKS: a block has {unit_bytes} bytes in a layer, no multiple of {ALIGNMENT_BYTES}: use another "
                f"--block-size, or remove it"
            )
        self.unit_bytes = unit_bytes
        self.parts = max(PARTS, LEAST_PAGE_BYTES // unit_bytes)
        disks = tuple(
            DiskConfig(directory=_own(Path(path), plan.ranks, rank), limit_bytes=limit // plan.ranks)
            for path, limit in plan.disks
        )
        config = StoreConfig(
            disks=disks,
            page_bytes=self.parts * unit_bytes,
            parts=self.parts,
            namespace=f"sparse units of {unit_bytes} bytes, rank {rank} of {plan.ranks}",
        )
        self.store = DiskStore(config, engine=emulation.disk_engine(ThreadEngine(), disks=len(disks)))
        self._staged = Arena(STAGED_UNITS, unit_bytes)
        self._written_to: list[Arena] = []
        """By requests that timed out, and may still write."""

    def home(self, units: torch.Tensor) -> Home:
        """Writes the units of one layer."""
        pages = -(-len(units) // self.parts)
        keys = np.empty((pages, 2), np.uint64)
        keys[:, 0], keys[:, 1] = secrets.randbits(64), np.arange(pages)
        arena = Arena(min(pages, STAGED_UNITS // self.parts), self.parts * self.unit_bytes)
        plain = units.contiguous().view(torch.uint8).reshape(len(units), -1).numpy()
        for first in range(0, pages, len(arena.addresses)):
            some = keys[first : first + len(arena.addresses)]
            rows = plain[first * self.parts : (first + len(some)) * self.parts]
            arena.bytes.reshape(-1, self.unit_bytes)[: len(rows)] = rows
            self.store.write(some, arena.addresses[: len(some)])
            if len(self.store.unsettled()):
                self._written_to.append(arena)
                arena = Arena(len(arena.addresses), arena.page_bytes)
        return _OnDisks(self, self.store.lookup(keys))

    def read(self, places: PageLocations, units: IntArray, cache: torch.Tensor, blocks: IntArray) -> BoolArray:
        """As Home.read."""
        order = np.argsort(units)
        ok = np.zeros(len(units), np.bool_)
        for first in range(0, len(units), STAGED_UNITS):
            some = order[first : first + STAGED_UNITS]
            staged = self._staged
            pages, parts = np.divmod(units[some], self.parts)
            there = self.store.read(places.rows(pages), staged.addresses[: len(some)], parts=parts)
            if there.any():
                arrived = torch.from_numpy(staged.bytes[: len(some)][there])
                cache[torch.from_numpy(blocks[some][there])] = arrived.view(cache.dtype).view(-1, *cache.shape[1:])
            ok[some] = there
            if len(self.store.unsettled()):
                self._written_to.append(staged)
                self._staged = Arena(STAGED_UNITS, self.unit_bytes)
        return ok


@dataclass(frozen=True)
class _OnDisks:
    disks: Disks
    places: PageLocations

    def read(self, units: IntArray, cache: torch.Tensor, blocks: IntArray) -> BoolArray:
        return self.disks.read(self.places, units, cache, blocks)

    def drop(self) -> None:
        self.disks.store.forget(self.places.keys)


def _own(path: Path, ranks: int, rank: int) -> Path:
    """A rank's directory below one of the user's, which must be there."""
    if ranks == 1 or not path.is_dir():
        return path
    own = path / f"rank{rank}"
    own.mkdir(exist_ok=True)
    return own
