"""One disk of a store while it runs: its books, its index, its faults.

A page is written in this order: a slot is taken (its old page is forgotten), the bytes, the index, and only then can it be found.
So whatever stops the process, a slot's record and its bytes either belong together or do not verify.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from polder.errors import EnvironmentFault
from polder.swarm.directory import open_directory
from polder.swarm.health import DiskHealth, DiskStatistics
from polder.swarm.index import empty_records, row_bytes
from polder.swarm.io import OpenFile, Outcome, Transfer
from polder.swarm.keys import Keys, distinct, page_seeds
from polder.swarm.layout import plan_layout, usage_bytes
from polder.swarm.slots import SlotBook

__all__ = ["Disk", "DiskConfig", "DiskTransfer"]

logger = logging.getLogger("polder.swarm")

BoolArray = npt.NDArray[np.bool_]
IntArray = npt.NDArray[np.int64]
UintArray = npt.NDArray[np.uint64]


@dataclass(frozen=True, kw_only=True)
class DiskConfig:
    directory: Path
    """Must exist, on the disk that is to be used."""
    limit_bytes: int
    """What `du` of the directory may come to."""


@dataclass(frozen=True, kw_only=True)
class DiskTransfer:
    """What an engine is to do, and which rows of the caller's and slots of this disk's that is about."""

    rows: IntArray
    slots: IntArray
    keys: Keys
    generations: UintArray
    transfer: Transfer


class Disk:
    """Thread-safe. Only opening raises; a disk that cannot be opened is "out", with the reason."""

    def __init__(
        self,
        number: int,
        config: DiskConfig,
        *,
        page_bytes: int,
        namespace: str,
        errors_allowed: int,
        open_file: OpenFile,
    ) -> None:
        """Raises ConfigError or BudgetError when the directory, the limit or the page size cannot be meant."""
        self.number, self.config, self.page_bytes = number, config, page_bytes
        self.health = DiskHealth(config.directory, errors_allowed)
        self.device = ""
        self._namespace = xxhash.xxh3_64_intdigest(namespace.encode())
        self._lock = threading.Lock()  # of the books; never held during I/O
        self._index_lock = threading.Lock()  # taken first
        self._open = None
        records = empty_records(0)
        layout = plan_layout(config.limit_bytes, page_bytes)
        try:
            self._open = open_directory(config.directory, layout, namespace, open_file)
            self.device, records = self._open.meta.device, self._open.records
        except (EnvironmentFault, OSError) as error:
            self.health.stop("out", str(error))
        self.slots = len(records)
        self._book = SlotBook(records)
        # Rises over all runs, also when the last rows of the index were lost with the power.
        self._generation = max(int(records["generation"].max(initial=0)) + 1, time.time_ns())

    def find(self, keys: Keys) -> tuple[IntArray, UintArray]:
        """Of each key the slot and the generation, -1 and 0 where it is absent."""
        if self.health.state == "out":
            return np.full(len(keys), -1, dtype=np.int64), np.zeros(len(keys), dtype=np.uint64)
        with self._lock:
            slots = self._book.find(keys)
            there = slots >= 0
            generations = np.zeros(len(keys), dtype=np.uint64)
            generations[there] = self._book.records["generation"][slots[there]]
        return slots, generations

    @property
    def free(self) -> int:
        """Pages that can be written before one has to be evicted."""
        with self._lock:
            return self._book.free if self.health.state == "ok" else 0

    @property
    def room(self) -> int:
        """Pages that the disk has or can take: without the slots that went bad, and none when it is out."""
        with self._lock:
            if self.health.state == "ok":
                return self.slots - self._book.bad
            return len(self._book) if self.health.state == "read-only" else 0

    @property
    def evicted(self) -> int:
        """Pages since the disk was opened."""
        return self._book.evicted

    # ------------------------------------------------------------------ write

    def begin_write(self, rows: IntArray, keys: Keys, addresses: IntArray) -> DiskTransfer | None:
        """Takes slots for those of `keys` that are not here. None when there is nothing to write."""
        if self._open is None or self.health.state != "ok":
            return None
        with self._lock:
            known = self._book.find(keys)
            self._book.touch(known[known >= 0])
            fresh = distinct(keys)
            fresh = fresh[known[fresh] < 0]
            slots = self._book.take(len(fresh))
            fresh = fresh[: len(slots)]
            generations = self._generation + np.arange(len(slots), dtype=np.uint64)
            self._generation += len(slots)
        if not len(slots):
            return None
        return self._transfer(rows[fresh], slots, keys[fresh], generations, addresses[fresh])

    def end_write(self, written: DiskTransfer, outcome: Outcome) -> None:
        """Publishes the pages that were written as a whole and that the index took."""
        good, slots = outcome.errors == 0, written.slots
        failure = ""
        with self._index_lock:
            with self._lock:
                spoiled = outcome.errors == errno.EIO
                self._book.retire(slots[spoiled])
                self._book.abandon(slots[~good & ~spoiled])
                self._book.note(slots[good], written.keys[good], written.generations[good], outcome.digests[good])
            try:
                self._store_rows(self._book.dirty)
            except EnvironmentFault as error:
                failure = str(error)
            with self._lock:
                (self._book.abandon if failure else self._book.publish)(slots[good])
        with self._lock:
            self.health.did_write(outcome.errors, failure)

    # ------------------------------------------------------------------ read

    def begin_read(
        self, rows: IntArray, keys: Keys, slots: IntArray, generations: UintArray, addresses: IntArray
    ) -> DiskTransfer | None:
        """Pins what is still as it was looked up. None when there is nothing to read."""
        if self._open is None or self.health.state == "out":
            return None
        with self._lock:
            still = self._book.current(slots, generations)
            self._book.pin(slots[still])
        if not still.any():
            return None
        return self._transfer(rows[still], slots[still], keys[still], generations[still], addresses[still])

    def end_read(self, read: DiskTransfer, outcome: Outcome) -> BoolArray:
        """Which pages arrived as they were written. Others are dropped, but for those that only took too long."""
        slots, errors = read.slots, outcome.errors
        late = errors == errno.ETIMEDOUT
        with self._lock:
            torn = (errors == 0) & (outcome.digests != self._book.records["digest"][slots])
            still = self._book.current(slots, read.generations)  # a page that was forgotten meanwhile has no digest
            good: BoolArray = (errors == 0) & ~torn & still
            self.health.did_read(errors[still], int(good.sum()))
            self.health.took(int(good.sum()), outcome.seconds)
            bad = slots[still & ~good & ~late]
            if len(bad) and self.health.state != "out":  # of a disk that is lost the books say what to copy again
                self._book.drop(np.unique(bad))
            self._book.touch(slots[good])
            self._book.unpin(slots)
        return good

    def forget(self, keys: Keys) -> int:
        """Drops these pages, in the index too; returns how many there were."""
        if self.health.state == "out":
            return 0
        with self._index_lock:
            with self._lock:
                slots = self._book.find(keys[distinct(keys)])
                slots = slots[slots >= 0]
                self._book.drop(slots)
            try:
                self._store_rows(self._book.dirty)
            except EnvironmentFault as error:
                logger.warning("%s: pages that were forgotten may come back: %s", self.config.directory, error)
        return len(slots)

    # ------------------------------------------------------------------

    def by_recency(self) -> Keys:
        """[m, 2] keys of all pages that are or, the disk being out, were here, the last used first."""
        with self._lock:
            keys: Keys = self._book.records["key"][self._book.by_recency()].copy()
        return keys

    def statistics(self) -> DiskStatistics:
        try:
            disk_bytes = usage_bytes(self.config.directory)
        except OSError:
            disk_bytes = 0
        with self._lock:
            return DiskStatistics(
                directory=str(self.config.directory),
                device=self.device,
                state=self.health.state,
                reason=self.health.reason,
                slots=self.slots,
                used=len(self._book),
                limit_bytes=self.config.limit_bytes,
                disk_bytes=disk_bytes,
                read_pages=self.health.read_pages,
                written_pages=self.health.written_pages,
                evicted_pages=self._book.evicted,
                corrupt_pages=self.health.corrupt_pages,
                failed_reads=self.health.failed_reads,
                failed_writes=self.health.failed_writes,
                timeouts=self.health.timeouts,
            )

    def check_integrity(self) -> None:
        """Raises IntegrityError."""
        with self._lock:
            self._book.check_integrity()

    def settle(self) -> None:
        """Stores what only changed the order of use, so that the next run evicts in the same order. Nothing may be under way."""
        with self._index_lock:
            if self._open is not None and self.health.state == "ok":
                try:
                    self._store_rows(self._book.dirty | self._book.touched)
                except EnvironmentFault as error:
                    logger.warning("%s: the order of use is lost: %s", self.config.directory, error)

    def close(self) -> None:
        if self._open is not None:
            self._open.index.close()
            self._open.file.close()
            os.close(self._open.lock_fd)
            self._open = None

    def _transfer(
        self, rows: IntArray, slots: IntArray, keys: Keys, generations: UintArray, addresses: IntArray
    ) -> DiskTransfer:
        assert self._open is not None
        transfer = Transfer(
            disk=self.number,
            file=self._open.file,
            page_bytes=self.page_bytes,
            offsets=slots * self.page_bytes,
            addresses=addresses,
            seeds=page_seeds(keys, generations, self._namespace),
        )
        return DiskTransfer(rows=rows, slots=slots, keys=keys, generations=generations, transfer=transfer)

    def _store_rows(self, marked: BoolArray) -> None:
        """Rows of the index as they are now. Raises EnvironmentFault: they stay marked."""
        assert self._open is not None
        with self._lock:
            numbers = np.flatnonzero(marked)
            rows = {number: row_bytes(self._book.records, number) for number in numbers.tolist()}
            self._book.dirty[numbers] = False
        try:
            self._open.index.store(rows)
        except EnvironmentFault:
            with self._lock:
                self._book.dirty[numbers] = True
            raise
        with self._lock:
            self._book.touched[numbers] = False
