"""All of the disk tier but vLLM: a scheduler's TierSet, one worker with host memory and a real store, and an engine's KV cache."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polder.diskstore.config import DiskConfig, StoreConfig
from polder.diskstore.io import Arena, IoEngine, OpenFile, open_page_file
from polder.diskstore.keys import Keys
from polder.diskstore.layout import usage_bytes
from polder.diskstore.store import DiskStore
from polder.tiers.disk.memory import DiskMemory
from polder.tiers.disk.mirror import disk_capacity, inventory
from polder.tiers.disk.slots import DiskSlots
from polder.tiers.disk.spill import SpillConfig
from polder.tiers.eviction.policy import EvictionPolicy, Lru
from polder.tiers.host import HostMemory, HostSlots
from polder.tiers.jobs import Job, JobResult, Pieces
from polder.tiers.movers import CpuMover
from polder.tiers.tierset import TierSet
from polder.tiers.worker import TierWorker

PAGE = 64 << 10
LAYERS, BYTES = 3, 1024
BLOCK = LAYERS * BYTES
SLOT = BLOCK + 512
"""Of the host tier: longer than a block, as for the smaller group of a hybrid model."""
HOST, DISK = 0, 1


def names(start: int, count: int, group: int = 0) -> list[bytes]:
    return [hashlib.sha256(b"%d" % n).digest() + group.to_bytes(4, "big") for n in range(start, start + count)]


def content(key: bytes, weights: int = 0) -> npt.NDArray[np.uint8]:
    """[layers, bytes]."""
    seed = [*key, weights]
    return np.random.default_rng(seed).integers(0, 256, (LAYERS, BYTES), dtype=np.uint8)


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Rig:
    """One run of an engine. `close` and make another one over the same directories for a restart."""

    def __init__(
        self,
        directories: Sequence[Path],
        *,
        host_slots: int = 16,
        limit_bytes: int = 4 << 20,
        engine: IoEngine | None = None,
        open_file: OpenFile = open_page_file,
        arena_pages: int = 24,
        timeout_s: float = 5.0,
        namespace: str = "weights",
        spilling: SpillConfig | None = None,
        policy: Callable[[int], EvictionPolicy] = Lru,
        weights: int = 0,
    ) -> None:
        for directory in directories:
            directory.mkdir(exist_ok=True)
        self.directories, self.limit_bytes, self.weights = tuple(directories), limit_bytes, weights
        disks = tuple(DiskConfig(directory=d, limit_bytes=limit_bytes) for d in directories)
        config = StoreConfig(disks=disks, page_bytes=PAGE, namespace=namespace, timeout_s=timeout_s)
        self.store = DiskStore(config, engine=engine, open_file=open_file)
        capacity = disk_capacity(self.store)
        kept: Keys = inventory(self.store, capacity)
        self.region = np.zeros(host_slots * SLOT, dtype=np.uint8)
        self.kv = np.zeros((LAYERS, 512, BYTES), dtype=np.uint8)
        self.arena = Arena(arena_pages, PAGE)
        self.memory = DiskMemory(
            self.store,
            self.arena,
            host_address=self.region.ctypes.data,
            host_slot_bytes=SLOT,
            capacity=capacity,
            inventory=kept,
        )
        host = HostMemory(self.region.ctypes.data, SLOT)
        self.worker = TierWorker(
            {(HOST, "store"): host, (HOST, "load"): host},
            CpuMover(),
            seed=77,
            capacities={HOST: host_slots, DISK: capacity},
            batches={DISK: self.memory},
            host=HOST,
        )
        self.clock = Clock()
        self.slots = DiskSlots(name="disk", capacity=capacity, slot_bytes=PAGE, inventory=kept)
        self.tiers = TierSet(
            [HostSlots(name="host", size_bytes=host_slots * SLOT, slot_bytes=SLOT), self.slots],
            policy(host_slots + capacity),
            ranks=1,
            block_tokens=16,
            clock=self.clock,
            spilling=spilling or SpillConfig(batch_blocks=8, copies_every_s=1e9),
        )

    def pieces(self, block: int) -> Pieces:
        return [(self.kv[layer, block].ctypes.data, BYTES) for layer in range(LAYERS)]

    # ------------------------------------------------------------------ what the connector does

    def run(self, job: Job, blocks: Sequence[Pieces] = ()) -> JobResult:
        self.worker.submit(job, blocks)
        self.worker.wait([job.number])
        ended = {finished.number: finished for finished in self.worker.poll()}  # spills may have ended meanwhile
        for finished in ended.values():
            self.tiers.report(finished)
        return ended[job.number]

    def compute(self, keys: Sequence[bytes]) -> None:
        """A request has computed these blocks: what the tiers want of them is stored."""
        self.clock.now += 1.0
        prepared = self.tiers.prepare_store(keys, np.arange(len(keys)))
        if prepared is None:
            return
        positions, job = prepared
        for at in positions.tolist():
            self.kv[:, at] = content(keys[at], self.weights)
        self.run(job, [self.pieces(at) for at in positions.tolist()])

    def spill(self) -> list[JobResult]:
        """To the end."""
        done = []
        while (job := self.tiers.plan_spills()) is not None:
            done.append(self.run(job))
        return done

    def keep(self, keys: Sequence[bytes], at_once: int = 8) -> None:
        """Computes them and writes them to disk, a few at a time."""
        for first in range(0, len(keys), at_once):
            self.compute(keys[first : first + at_once])
            self.spill()

    def ask(self, keys: Sequence[bytes]) -> list[int]:
        self.clock.now += 1.0
        self.tiers.refresh()
        found: list[int] = self.tiers.find(keys).tolist()
        self.tiers.asked(keys, tokens=16 * len(keys))
        return found

    def load(self, keys: Sequence[bytes]) -> JobResult:
        """Loads those that are there. Every block that is not reported as failed has the right bytes."""
        self.tiers.refresh()
        wanted = [key for key, tier in zip(keys, self.tiers.find(keys).tolist(), strict=True) if tier >= 0]
        if not wanted:
            return JobResult(number=0)
        self.kv[:] = 0xEE
        job = self.tiers.prepare_load(wanted, tokens=16 * len(wanted))
        finished = self.run(job, [self.pieces(at) for at in range(len(wanted))])
        for at, key in enumerate(wanted):
            assert at in finished.failed or np.array_equal(self.kv[:, at], content(key, self.weights)), "wrong bytes"
        return finished

    def check(self) -> None:
        self.tiers.check_integrity()
        self.slots.check_integrity()
        self.store.check_integrity()
        for directory in self.directories:
            assert usage_bytes(directory) <= self.limit_bytes

    def close(self) -> None:
        self.worker.close()
        self.store.close()
