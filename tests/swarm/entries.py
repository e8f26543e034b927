"""Entries whose bytes tell which they are, and an entry store with its upkeep on emulated disks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polder.diskstore.config import DiskConfig, StoreConfig
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.model import PM9A3, DiskModel
from polder.diskstore.store import DiskStore
from polder.emulation.disks import EmulatedDisk, EmulatedEngine, VirtualClock
from polder.swarm.activations import Profile
from polder.swarm.clusters import Packing
from polder.swarm.entry_pages import EntryConfig
from polder.swarm.entry_store import EntryStore
from polder.swarm.entry_upkeep import EntryUpkeep

ENTRY, PARTS = 4096, 16
Bytes = npt.NDArray[np.uint8]


def content(ids: Sequence[int] | npt.NDArray[np.int64], version: int = 0) -> Bytes:
    """[n, ENTRY]: no two entries or versions have the same bytes."""
    words = np.arange(ENTRY // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    names = (np.asarray(ids).astype(np.uint64) << np.uint64(8)) + np.uint64(version)
    return (names[:, None] * np.uint64(0xC2B2AE3D27D4EB4F) ^ words).view(np.uint8)


class Rig:
    """Entries on emulated disks that take no time."""

    def __init__(
        self, folder: Path, *, entries: int, disks: int = 3, limit_bytes: int = 8 << 20, **config: int
    ) -> None:
        clock = VirtualClock()
        self.disks = [EmulatedDisk(DiskModel(bytes_per_s=1e9), clock=clock) for _ in range(disks)]
        self.folders = [folder / str(disk) for disk in range(disks)]
        for directory in self.folders:
            directory.mkdir(exist_ok=True)
        self.store = DiskStore(
            StoreConfig(
                disks=tuple(DiskConfig(directory=directory, limit_bytes=limit_bytes) for directory in self.folders),
                page_bytes=PARTS * ENTRY,
                parts=PARTS,
                namespace="entries",
            ),
            engine=EmulatedEngine(ThreadEngine(2), self.disks),
        )
        chosen = {"memory_bytes": 96 * ENTRY, "hot_bytes": 16 * ENTRY} | config
        self.entries = EntryStore(self.store, EntryConfig(disks=(PM9A3,) * disks, **chosen), entries=entries)
        self.upkeep = EntryUpkeep(self.entries, pages_at_once=4)

    def check(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Reads them; what comes is right. Which came."""
        found = self.entries.read(ids)
        assert np.array_equal(self.entries.memory.bytes[found.rows[found.ok]], content(ids[found.ok]))
        return found.ok

    def close(self) -> None:
        self.entries.close()
        self.store.close()


def pages_per_block(profile: Profile, packing: Packing) -> float:
    """The pages that the profile's steps read for each wanted block; 0 if they want none."""
    wanted = len(profile.items)
    return len(profile.mapped(packing.page_of, size=packing.pages).items) / wanted if wanted else 0.0


def fill(rig: Rig, entries: int) -> None:
    for at in range(0, entries, 64):
        ids = np.arange(at, min(entries, at + 64))
        assert rig.entries.write(ids, content(ids)).all()
    rig.entries.flush()
