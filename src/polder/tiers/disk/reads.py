"""Reads pages for a load from all disks at once. While a chunk of pages is copied to the engine, the next chunk is
read."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.arrays import FloatArray, IntArray
from polder.diskstore.keys import Keys
from polder.diskstore.schedule import MAX_DISKS, exact, greedy
from polder.diskstore.store import DiskStore, PageLocations
from polder.memory.cores import leave_bound_core
from polder.tiers.jobs import Reason

__all__ = ["Chunk", "PageReader"]

_LEAST_CHUNK = 64
"""So many pages keep several disks busy. A load of several times as many is cut into chunks even if the arena could
hold it."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    rows: IntArray
    """[n] the rows whose pages have arrived."""
    addresses: IntArray
    """[n] where the pages are, until the chunk after the next one is asked for."""
    failed: dict[int, Reason]
    """The rows whose pages have not arrived."""


class PageReader:
    """Used by one thread."""

    def __init__(self, store: DiskStore, halves: tuple[IntArray, IntArray]) -> None:
        """`halves`: two arrays of page addresses, at least one each; chunks use them in turn."""
        self._store, self._halves = store, halves
        self._stopped = False
        self._corrupt = store.corrupt_pages

    def stop(self) -> None:
        self._stopped = True

    def speeds(self) -> FloatArray:
        """[disks] measured speeds. A disk that was not read yet counts as fast as the others on average."""
        speeds = self._store.speeds
        known = speeds > 0
        speeds[~known] = speeds[known].mean() if known.any() else 1.0
        return speeds

    def read(self, keys: Keys) -> Iterator[Chunk]:
        """Reads the pages of these keys ([n, 2]). Yields chunks that together contain every row once; ends early after
        `stop`."""
        count = len(keys)
        width = min(len(self._halves[0]), max(_LEAST_CHUNK, -(-count // 4)))
        shunned = np.zeros(len(self._store.states), dtype=np.bool_)
        if count <= width:
            if count:
                yield from self._chunks(keys, 0, width, shunned)
            return
        ready: queue.SimpleQueue[Chunk | None] = queue.SimpleQueue()
        free = threading.Semaphore(2)
        over = threading.Event()

        def read_ahead() -> None:
            leave_bound_core()
            try:
                at = number = 0
                while at < count:
                    free.acquire()
                    if over.is_set() or self._stopped:
                        break
                    chunk = self._some(keys, at, width, number % 2, shunned)
                    at += len(chunk.rows) + len(chunk.failed)
                    number += 1
                    ready.put(chunk)
            finally:
                ready.put(None)

        # A daemon thread, as all threads that a disk may keep.
        thread = threading.Thread(target=read_ahead, name="polder-disk-ahead", daemon=True)
        thread.start()
        left = count
        try:
            while (chunk := ready.get()) is not None:
                left -= len(chunk.rows) + len(chunk.failed)
                yield chunk
                free.release()
        finally:
            over.set()
            free.release()
            thread.join()
        if left:  # the thread failed, or was stopped
            none = np.empty(0, dtype=np.int64)
            yield Chunk(rows=none, addresses=none, failed=dict.fromkeys(range(count - left, count), "error"))

    def _chunks(self, keys: Keys, at: int, width: int, shunned: npt.NDArray[np.bool_]) -> Iterator[Chunk]:
        number = 0
        while at < len(keys):
            chunk = self._some(keys, at, width, number % 2, shunned)
            at += len(chunk.rows) + len(chunk.failed)
            number += 1
            yield chunk

    def _some(self, keys: Keys, at: int, width: int, half: int, shunned: npt.NDArray[np.bool_]) -> Chunk:
        """Reads the next pages, as many as fit. `shunned`: [disks] which disks are not read; a disk that times out is
        added."""
        memory = self._halves[half]
        addresses = memory[~np.isin(memory, self._store.unsettled())]
        if not len(addresses):
            failed: dict[int, Reason] = dict.fromkeys(range(at, len(keys)), "error")
            return Chunk(rows=addresses, addresses=addresses, failed=failed)
        some = keys[at : at + min(width, len(addresses))]
        found = self._store.lookup(some)
        slots = np.where(shunned, -1, found.slots)
        places = PageLocations(keys=some, slots=slots, generations=found.generations)
        disks = self._schedule(places.present)
        started = time.monotonic()
        good = self._store.read(places, addresses[: len(some)], disks)
        if time.monotonic() - started > 0.9 * self._store.config.timeout_s:
            shunned[disks[~good & (disks >= 0)]] = True
        bad = np.flatnonzero(~good)
        reasons = self._reasons(found, bad) if len(bad) else []
        return Chunk(
            rows=at + np.flatnonzero(good),
            addresses=addresses[: len(some)][good],
            failed=dict(zip((at + bad).tolist(), reasons, strict=True)),
        )

    def _schedule(self, present: npt.NDArray[np.bool_]) -> IntArray:
        """[n] chooses the disk that reads each page, given which disks have it ([n, disks])."""
        masks = present.astype(np.int64) @ (np.int64(1) << np.arange(present.shape[1]))
        if present.shape[1] <= MAX_DISKS:
            return exact(masks, self.speeds())
        return np.where(masks > 0, greedy(np.maximum(masks, 1), self.speeds()), -1)

    def _reasons(self, places: PageLocations, rows: IntArray) -> list[Reason]:
        """Why these pages did not arrive. A page that the read dropped was corrupt if the disks have counted corrupt
        pages since."""
        present = places.slots[rows].max(axis=1, initial=-1) >= 0
        still = self._store.lookup(places.keys[rows]).slots.max(axis=1, initial=-1) >= 0
        before, self._corrupt = self._corrupt, self._store.corrupt_pages
        corrupt = self._corrupt - before
        reasons: list[Reason] = []
        for was, stays in zip(present.tolist(), still.tolist(), strict=True):
            if not was:
                reasons.append("lost")
            elif not stays and corrupt > 0:
                corrupt -= 1
                reasons.append("corrupt")
            else:
                reasons.append("error")
        return reasons
