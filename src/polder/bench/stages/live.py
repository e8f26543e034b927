"""An entry store at work: packing, the hot set, reading ahead and packing again, each left out in turn.

Entries are written to a store on emulated disks and read step by step, and every byte that comes is compared. Times are
the disks' own, modelled; nobody sleeps. Upkeep runs between steps and reading ahead beside them: steps do not wait for
them, and what they take of the disks is counted apart.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from polder.arrays import FloatArray, IntArray
from polder.bench.report.metrics import Metrics
from polder.bench.sparse.generator import Sticky
from polder.bench.sparse.lru import LruSet
from polder.bench.stages.access_sets import ENTRY_BYTES, ENTRY_PAGE_BLOCKS, PAGE_BYTES, SetSizes, disks_of, from_disks
from polder.bench.stages.layouts import REPLICA_SHARE
from polder.bench.stages.wall import store_config
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.store import DiskStore
from polder.emulation.disks import EmulatedDisk, EmulatedEngine, VirtualClock
from polder.errors import IntegrityError
from polder.swarm.activations import Profile
from polder.swarm.entry_pages import EntryConfig
from polder.swarm.entry_store import EntryStore
from polder.swarm.entry_upkeep import EntryUpkeep

__all__ = ["LIVE_ARMS", "LIVE_DISKS", "LIVE_SETS", "live_run", "live_set"]

LIVE_ARMS: tuple[str, ...] = ("live", "live-no-packing", "live-packed-once", "live-lru", "live-no-ahead")
"""All of it; no upkeep; the first packing alone; least recently used in place of the benefit score; nothing read
ahead."""
LIVE_SETS: dict[str, str] = {
    "sticky": "as the set of that name, a quarter of its entries",
    "drift": "the same; halfway the clusters are all others",
}
LIVE_DISKS = "4"
HOT_SHARE, AHEAD_SHARE, MEMORY_SHARE = 0.10, 0.05, 0.30
"""Of all entries, in DRAM."""


def live_set(name: str, sizes: SetSizes) -> Profile:
    """Twice the known steps, of a quarter of the entries."""
    config = Sticky(blocks=sizes.synthetic_blocks // 4, steps=2 * sizes.known_steps, seed=sizes.seeds[0], window=64)
    return from_disks(config, *([replace(config, seed=config.seed + 1)] if name == "drift" else []))


def live_run(arm: str, profile: Profile, known_steps: int, folder: Path) -> Metrics:
    """Times are of a step, on average, of the disks alone: of the quarter before the first packing; of the steps before
    the middle, where reading changes in the set `drift`; of those after it; of the last quarter.

    `disk_time_s`: of all batches, those ahead and those of upkeep among them, a step. Raises IntegrityError for an
    entry that is not what was written.
    """
    models = disks_of(LIVE_DISKS)
    clock = VirtualClock()
    engine = EmulatedEngine(
        ThreadEngine(2), [EmulatedDisk(replace(model, latency_s=0.0), clock=clock) for model in models]
    )
    # Twice what the entries take, for pages that move.
    limits = np.full(len(models), 2 * profile.size * ENTRY_BYTES // len(models) + (8 << 20))
    stored = store_config(folder, limits, page_bytes=PAGE_BYTES, parts=ENTRY_PAGE_BLOCKS)
    store = DiskStore(stored, engine=engine)
    config = EntryConfig(
        disks=tuple(models),
        memory_bytes=_share(MEMORY_SHARE, profile.size),
        # What is not read ahead leaves its memory to what is hot.
        hot_bytes=_share(HOT_SHARE + (AHEAD_SHARE if arm == "live-no-ahead" else 0.0), profile.size),
        ahead_bytes=0 if arm == "live-no-ahead" else _share(AHEAD_SHARE, profile.size),
        replica_share=REPLICA_SHARE,
        learn_steps=known_steps // 2,
        ring_steps=known_steps,
    )
    hot = LruSet(np.full(profile.size, ENTRY_BYTES), config.hot_bytes) if arm == "live-lru" else None
    entries = EntryStore(store, config, entries=profile.size, hot=hot)
    upkeep = EntryUpkeep(entries) if arm != "live-no-packing" else None
    try:
        _write(entries, profile.size)
        written = len(engine.steps)
        rounds = 1 if arm == "live-packed-once" else profile.steps
        io_s, requests = _steps(entries, upkeep, profile, engine, rounds=rounds)
        stats, eighth = entries.stats, len(io_s) // 8
        return {
            "io_time_first_s": float(io_s[: 2 * eighth].mean()),
            "io_time_packed_s": float(io_s[3 * eighth : 4 * eighth].mean()),
            "io_time_aged_s": float(io_s[4 * eighth : 5 * eighth].mean()),
            "io_time_last_s": float(io_s[-2 * eighth :].mean()),
            "disk_time_s": sum(batch.modelled_s for batch in engine.steps[written:]) / stats.steps,
            "requests_an_entry": float(requests.sum()) / stats.wanted,
            "resident_share": stats.resident / stats.wanted,
            "ahead_share": stats.ahead / stats.wanted,
            "ahead_used_share": stats.ahead / stats.read_ahead if stats.read_ahead else 0.0,
            "packed": float(stats.packed),
            "rewritten_pages": float(stats.rewritten_pages),
            "lost": float(stats.lost),
            "steps": float(stats.steps),
        }
    finally:
        entries.close()
        store.close()


def _steps(
    entries: EntryStore, upkeep: EntryUpkeep | None, profile: Profile, engine: EmulatedEngine, *, rounds: int
) -> tuple[FloatArray, FloatArray]:
    """[steps] what each took of the disks, and its requests; without what was read ahead of it."""
    rows: list[tuple[float, int]] = []
    for wanted in profile:
        entries.wait()
        stats, batches, before = entries.stats, len(engine.steps), entries.stats.requests
        read = entries.read(wanted)
        rows.append((sum(step.modelled_s for step in engine.steps[batches:]), stats.requests - before))
        if not (read.ok.all() and np.array_equal(entries.memory.bytes[read.rows], _content(wanted))):
            raise IntegrityError("an entry that was read is not what was written")
        entries.read_ahead(wanted)
        if upkeep is not None and stats.packed < rounds:
            upkeep.advance()
    io_s, requests = np.array(rows).T
    return io_s, requests


def _share(share: float, entries: int) -> int:
    return int(share * entries) * ENTRY_BYTES


def _write(entries: EntryStore, count: int) -> None:
    for first in range(0, count, 256):
        ids = np.arange(first, min(count, first + 256))
        entries.write(ids, _content(ids))
    entries.flush()


def _content(ids: IntArray) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    words = np.arange(ENTRY_BYTES // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (ids.astype(np.uint64)[:, None] * np.uint64(0xC2B2AE3D27D4EB4F) ^ words).view(np.uint8)
