"""One disk of a running store: its slots, its index and its faults.

A page is written in this order: take a slot (its old page is forgotten), write the bytes, store the index, and only
then publish the page. So whatever stops the process, the record and the bytes of a slot either belong together or do
not verify.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import threading
import time

import numpy as np
import xxhash

from polder.arrays import BoolArray, IntArray, UintArray
from polder.diskstore.config import DiskConfig, StoreConfig
from polder.diskstore.directory import OpenDirectory, open_directory
from polder.diskstore.engine import TimedCall
from polder.diskstore.health import DiskHealth, DiskStats
from polder.diskstore.index import empty_records, row_bytes
from polder.diskstore.io import OpenFile, Outcome
from polder.diskstore.keys import Keys, distinct
from polder.diskstore.layout import plan_layout
from polder.diskstore.pieces import DiskTransfer, PageFormat, one_a_page, verify, worst
from polder.diskstore.slots import SlotBook
from polder.errors import EnvironmentFault

__all__ = ["Disk"]

logger = logging.getLogger("polder.diskstore")

_Parts = IntArray | None

_LEAST_PATIENCE_S = 5.0
"""The least time that storing the index and closing files may take: a busy machine makes any disk slow."""
_ROWS_AT_ONCE = 1024  # rows of the index; a disk that answers takes far less than the patience for them


class Disk:
    """Thread-safe. Only the constructor raises. A disk that cannot be used is "out"; `health` says why."""

    def __init__(self, number: int, config: DiskConfig, store: StoreConfig, open_file: OpenFile) -> None:
        """Raises ConfigError or BudgetError when the directory, the limit or the sizes are invalid."""
        self.number, self.config = number, config
        self.health = DiskHealth(config.directory, store.errors_allowed)
        self.device = ""
        hashed = xxhash.xxh3_64_intdigest(store.namespace.encode())
        self._pages = PageFormat(page_bytes=store.page_bytes, parts=store.parts, namespace=hashed)
        self._lock = threading.Lock()  # of the slot book; never held during I/O
        self._index_lock = threading.Lock()  # taken first
        self._timed, self._patience_s = TimedCall(number), max(store.timeout_s, _LEAST_PATIENCE_S)
        self._open: OpenDirectory | None = None
        layout = plan_layout(config.limit_bytes, store.page_bytes, store.parts)
        records = empty_records(0, store.parts)
        try:
            self._open = open_directory(config.directory, layout, store.namespace, open_file)
            self.device, records = self._open.meta.device, self._open.records
        except (EnvironmentFault, OSError) as error:
            self.health.stop("out", str(error))
        self.slots = len(records)
        self._book = SlotBook(records)
        # Rises over all runs, even when a power loss took the last rows of the index.
        self._generation = max(int(records["generation"].max(initial=0)) + 1, time.time_ns())

    def find(self, keys: Keys) -> tuple[IntArray, UintArray]:
        """The slot and the generation of each key; -1 and 0 where it is absent."""
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
        """The number of pages that can be written before one has to be evicted."""
        with self._lock:
            return self._book.free if self.health.state == "ok" else 0

    @property
    def room(self) -> int:
        """The number of pages that the disk can hold: without bad slots, and 0 when it is out."""
        with self._lock:
            if self.health.state == "ok":
                return self.slots - self._book.bad
            return len(self._book) if self.health.state == "read-only" else 0

    @property
    def evicted(self) -> int:
        """The number of pages evicted since the disk was opened."""
        return self._book.evicted

    # ------------------------------------------------------------------ write

    def begin_write(self, rows: IntArray, keys: Keys, addresses: IntArray) -> DiskTransfer | None:
        """Takes slots for those of `keys` that are not on this disk. None when there is nothing to write."""
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
        return self._transfer(rows[fresh], slots, keys[fresh], generations, addresses[fresh], None)

    def end_write(self, written: DiskTransfer, outcome: Outcome) -> None:
        """Publishes the pages whose bytes were fully written and whose rows the index accepted."""
        slots, digests = written.slots, outcome.digests.reshape(-1, self._pages.parts)
        errors = worst(outcome.errors.reshape(digests.shape))
        good, failure = errors == 0, ""
        with self._index_lock:
            with self._lock:
                spoiled = errors == errno.EIO
                self._book.retire(slots[spoiled])
                self._book.abandon(slots[~good & ~spoiled])
                self._book.note(slots[good], written.keys[good], written.generations[good], digests[good])
            try:
                self._store_rows(self._book.dirty)
            except EnvironmentFault as error:
                failure = str(error)
            with self._lock:
                (self._book.abandon if failure else self._book.publish)(slots[good])
        with self._lock:
            self.health.did_write(errors, failure)

    # ------------------------------------------------------------------ read

    def begin_read(
        self, rows: IntArray, keys: Keys, slots: IntArray, generations: UintArray, addresses: IntArray, parts: _Parts
    ) -> DiskTransfer | None:
        """Pins the pages that are still as they were looked up. `parts`: see DiskTransfer. None when there is nothing
        to read."""
        if self._open is None or self.health.state == "out":
            return None
        with self._lock:
            still = self._book.current(slots, generations)
            self._book.pin(slots[still])
        if not still.any():
            return None
        chosen = None if parts is None else parts[still]
        return self._transfer(rows[still], slots[still], keys[still], generations[still], addresses[still], chosen)

    def end_read(self, read: DiskTransfer, outcome: Outcome) -> BoolArray:
        """[n] which rows arrived as they were written. The pages of other rows are dropped, except those that only
        timed out."""
        slots, parts = read.slots, read.parts
        with self._lock:
            digests = self._book.records["digest"]
            digests = digests[slots] if parts is None else digests[slots, parts][:, None]
            errors, torn = verify(outcome, digests)
            still = self._book.current(
                slots, read.generations
            )  # a page that was forgotten meanwhile has no digest any more
            good: BoolArray = (errors == 0) & ~torn & still
            counted = still if parts is None else still & one_a_page(slots, errors, torn)
            self.health.did_read(errors[counted], int(good[counted].sum()))
            self.health.took(int(good.sum()) * digests.shape[1] / self._pages.parts, outcome.seconds)
            self._book.touch(slots[good])  # before a page is dropped because another of its parts is bad
            bad = slots[still & ~good & (errors != errno.ETIMEDOUT)]
            if len(bad) and self.health.state != "out":  # the book of a lost disk is kept: it says what to copy again
                self._book.drop(np.unique(bad))
            self._book.unpin(slots)
        return good

    def forget(self, keys: Keys) -> int:
        """Drops these pages, in the index too. Returns how many there were."""
        if self.health.state == "out":
            return 0
        with self._index_lock:
            with self._lock:
                slots = self._book.find(keys[distinct(keys)])
                slots = slots[slots >= 0]
                self._book.drop(slots)
            try:
                if len(slots):
                    self._store_rows(self._book.dirty)
            except EnvironmentFault as error:
                logger.warning("%s: pages that were forgotten may come back: %s", self.config.directory, error)
        return len(slots)

    # ------------------------------------------------------------------

    def by_recency(self) -> Keys:
        """[m, 2] keys of all pages on this disk, the most recently used first; also of a disk that is out."""
        with self._lock:
            keys: Keys = self._book.records["key"][self._book.by_recency()].copy()
        return keys

    def stats(self) -> DiskStats:
        with self._lock:
            return DiskStats(
                device=self.device,
                state=self.health.state,
                reason=self.health.reason,
                slots=self.slots,
                used=len(self._book),
                read_pages=self.health.read_pages,
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
        """Stores the order of use, so that the next run evicts in the same order. Nothing may be under way."""
        with self._index_lock:
            if self._open is not None and self.health.state == "ok":
                try:
                    self._store_rows(self._book.dirty | self._book.touched)
                except EnvironmentFault as error:
                    logger.warning("%s: the order of use is lost: %s", self.config.directory, error)

    def close(self) -> None:
        """Closes the disk. One that hangs stays open until the process ends."""
        with self._index_lock:
            opened, self._open = self._open, None
            if opened is not None:
                try:
                    self._timed.call(lambda: _close(opened), self._patience_s)
                except EnvironmentFault as error:
                    logger.warning("%s: not closed: %s", self.config.directory, error)

    def _transfer(
        self, rows: IntArray, slots: IntArray, keys: Keys, generations: UintArray, addresses: IntArray, parts: _Parts
    ) -> DiskTransfer:
        assert self._open is not None
        transfer = self._pages.transfer(self.number, self._open.file, slots, keys, generations, addresses, parts)
        return DiskTransfer(rows=rows, slots=slots, keys=keys, generations=generations, parts=parts, transfer=transfer)

    def _store_rows(self, marked: BoolArray) -> None:
        """Stores the marked rows of the index. Raises EnvironmentFault; the rows stay marked then.

        An index that hangs makes the disk read-only, and is not called again before it has answered, so nobody waits
        twice.
        """
        assert self._open is not None
        every = np.flatnonzero(marked)
        for numbers in (every[at : at + _ROWS_AT_ONCE] for at in range(0, len(every), _ROWS_AT_ONCE)):
            with self._lock:
                rows = {number: row_bytes(self._book.records, number) for number in numbers.tolist()}
                self._book.dirty[numbers] = False
            try:
                self._timed.call(functools.partial(self._open.index.store, rows), self._patience_s)
            except EnvironmentFault as error:
                with self._lock:
                    self._book.dirty[numbers] = True
                    if self._timed.hangs:
                        self.health.stop("read-only", f"writing the index: {error}")
                raise
            with self._lock:
                self._book.touched[numbers] = False


def _close(opened: OpenDirectory) -> None:
    opened.index.close()
    opened.file.close()
    os.close(opened.lock_fd)
