"""Reads and writes batches of pieces on several disks at a time, and computes the checksum of every piece.

`ThreadEngine` needs only the kernel: some threads for each disk, one task for each thread and batch, and one preadv for
pieces that lie side by side. Another engine (io_uring, NIXL) can take its place; see `IoEngine`.

A system call on a disk that hangs cannot be cancelled. The engine waits for a batch until its time is over, and reports
what is not done as ETIMEDOUT. A thread that hangs may still write to the memory that it was given. `unsettled` lists
that memory: it must not be used for anything else until it is no longer listed.

`TimedCall` is for the other calls on a disk that may hang: storing its index and closing its files.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import numpy as np
import xxhash

from polder.arrays import IntArray
from polder.diskstore.io import Arena, Outcome, Transfer
from polder.errors import EnvironmentFault
from polder.memory.addresses import bytes_at
from polder.memory.cores import leave_bound_core

__all__ = ["ThreadEngine", "TimedCall", "side_by_side"]

logger = logging.getLogger("polder.diskstore")


RUN_PIECES, RUN_BYTES = 16, 1 << 20
"""One system call moves at most so many pieces or bytes, whichever is more, that lie side by side on the disk. As a
piece has 4096 bytes or more, that is at most 256 pieces; the kernel accepts 1024."""
LEAST_RUN_BYTES = 256 << 10
"""Runs are not cut shorter than this to occupy idle workers: four such requests at a time keep a disk as busy as
sixteen of 64 KiB, and a batch of 64 pages costs a third less CPU time."""
_JOIN_S = 2.0


_Move = Callable[["_Batch", int, int, Arena | None], None]


class _Latch:
    """Opens when it was counted down `count` times."""

    def __init__(self, count: int) -> None:
        self._left = itertools.count(count - 1, -1)
        self._closed = threading.Lock()
        self._closed.acquire()

    def count_down(self) -> None:
        if next(self._left) == 0:
            self._closed.release()

    def wait(self, timeout_s: float) -> bool:
        return self._closed.acquire(timeout=max(0.0, timeout_s))


class _Batch:
    """A transfer in the order of its offsets. The threads index its rows one by one, so they are lists."""

    def __init__(self, transfer: Transfer, workers: int, move: _Move) -> None:
        self.order = np.argsort(transfer.offsets, kind="stable")
        self.file, self.piece_bytes, self.move = transfer.file, transfer.piece_bytes, move
        self.memory = transfer.memory
        self.offsets: list[int] = transfer.offsets[self.order].tolist()
        self.addresses: list[int] = transfer.addresses[self.order].tolist()
        self.seeds: list[int] = transfer.seeds[self.order].tolist()
        count = len(self.offsets)
        self.aligned = not (transfer.addresses % transfer.file.alignment_bytes).any()
        self.runs = (
            side_by_side(self.offsets, transfer.piece_bytes, workers)
            if self.aligned
            else [(row, row + 1) for row in range(count)]
        )
        self.errors = [errno.ETIMEDOUT] * count
        self.digests = [0] * count
        self.abandoned = False
        self.started = self.ended = time.monotonic()

    def outcome(self) -> Outcome:
        errors = np.empty(len(self.errors), dtype=np.int32)
        digests = np.empty(len(self.errors), dtype=np.uint64)
        # A thread that hangs has noted the digest before the success.
        errors[self.order] = self.errors
        digests[self.order] = np.array(self.digests, dtype=np.uint64)
        return Outcome(errors=errors, digests=digests, seconds=self.ended - self.started)


class _Task:
    """The runs of a batch that one thread moves."""

    def __init__(self, batch: _Batch, runs: Sequence[tuple[int, int]]) -> None:
        self.batch, self.runs = batch, runs
        self.current: tuple[int, int] | None = None
        self.over = False
        self.latch: _Latch | None = None

    def carry_out(self, bounce: Arena | None) -> None:
        batch, move = self.batch, self.batch.move
        for run in self.runs:
            # In this order: who abandons a batch reads `current` afterwards. So it sees this run, or this thread sees
            # `abandoned`.
            self.current = run
            if batch.abandoned:
                break
            first, last = run
            try:
                move(batch, first, last, bounce)
            except OSError as error:
                if last - first == 1:
                    batch.errors[first] = error.errno or errno.EIO
                else:
                    self._one_by_one(first, last)

    def finish(self) -> None:
        self.current, self.over = None, True
        self.batch.ended = time.monotonic()
        assert self.latch is not None
        self.latch.count_down()

    def _one_by_one(self, first: int, last: int) -> None:
        """Finds out which piece of the run is bad."""
        for row in range(first, last):
            if self.batch.abandoned:
                return
            try:
                self.batch.move(self.batch, row, row + 1, None)
            except OSError as error:
                self.batch.errors[row] = error.errno or errno.EIO


class ThreadEngine:
    """Moves batches of pieces with threads, some for each disk.

    They start with the first transfer of a disk, so that a process may fork before.
    """

    def __init__(self, workers_per_disk: int = 8) -> None:
        self._workers = workers_per_disk
        self._tasks: dict[int, queue.SimpleQueue[_Task | None]] = {}
        self._threads: list[threading.Thread] = []
        self._hung: list[_Task] = []
        self._lock = threading.Lock()

    def read(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        return self._move(transfers, timeout_s, _read)

    def write(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        return self._move(transfers, timeout_s, _write)

    def unsettled(self) -> IntArray:
        with self._lock:
            self._hung = [task for task in self._hung if not task.over]
            held = [(task.batch, task.current) for task in self._hung]
        memory = [batch.memory[batch.order[run[0] : run[1]]] for batch, run in held if run]
        return np.unique(np.concatenate(memory)) if memory else np.empty(0, dtype=np.int64)

    def close(self) -> None:
        """Ends the threads, except those that hang in the kernel: they end with the process."""
        with self._lock:
            for tasks in self._tasks.values():
                for _ in range(self._workers):
                    tasks.put(None)
            until = time.monotonic() + _JOIN_S
            for thread in self._threads:
                thread.join(max(0.0, until - time.monotonic()))
            self._tasks.clear()
            self._threads.clear()

    def _move(self, transfers: Sequence[Transfer], timeout_s: float, move: _Move) -> list[Outcome]:
        until = time.monotonic() + timeout_s
        batches = [_Batch(transfer, self._workers, move) for transfer in transfers]
        tasks = [
            [_Task(batch, batch.runs[n :: self._workers]) for n in range(min(self._workers, len(batch.runs)))]
            for batch in batches
        ]
        latch = _Latch(sum(map(len, tasks)))
        for transfer, mine in zip(transfers, tasks, strict=True):
            waiting = self._queue(transfer.disk)
            for task in mine:
                task.latch = latch
                waiting.put(task)
        if any(tasks) and not latch.wait(until - time.monotonic()):
            for batch in batches:
                batch.abandoned = True
            with self._lock:
                self._hung += [task for mine in tasks for task in mine if not task.over]
        return [batch.outcome() for batch in batches]

    def _queue(self, disk: int) -> queue.SimpleQueue[_Task | None]:
        with self._lock:
            if disk not in self._tasks:
                tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
                self._tasks[disk] = tasks
                for number in range(self._workers):
                    name = f"polder-disk{disk}-{number}"
                    # A daemon thread, no executor: one that hangs in the kernel must not keep the process alive.
                    thread = threading.Thread(target=_work, args=(tasks,), name=name, daemon=True)
                    self._threads.append(thread)
                    thread.start()
            return self._tasks[disk]


def _work(tasks: queue.SimpleQueue[_Task | None]) -> None:
    leave_bound_core()
    bounce: Arena | None = None
    while (task := tasks.get()) is not None:
        if not task.batch.aligned and (bounce is None or bounce.page_bytes != task.batch.piece_bytes):
            bounce = Arena(1, task.batch.piece_bytes)
        try:
            task.carry_out(bounce)
        except Exception:
            logger.exception("a disk thread failed; its pages count as misses")
        task.finish()


def _read(batch: _Batch, first: int, last: int, bounce: Arena | None) -> None:
    size = batch.piece_bytes
    views = [bytes_at(address, size) for address in batch.addresses[first:last]]
    target = views if batch.aligned or bounce is None else [memoryview(bounce.bytes[0])]
    if batch.file.preadv(target, batch.offsets[first]) != (last - first) * size:
        raise OSError(errno.EIO, "short read")
    for row, view in enumerate(views, first):
        if target is not views:
            view[:] = target[0]
        batch.digests[row] = xxhash.xxh3_64_intdigest(view, batch.seeds[row])
        batch.errors[row] = 0


def _write(batch: _Batch, first: int, last: int, bounce: Arena | None) -> None:
    views = [bytes_at(address, batch.piece_bytes) for address in batch.addresses[first:last]]
    for row, view in enumerate(views, first):
        batch.digests[row] = xxhash.xxh3_64_intdigest(view, batch.seeds[row])
    if not batch.aligned and bounce is not None:
        bounce.bytes[0] = views[0]
        views = [memoryview(bounce.bytes[0])]
    if batch.file.pwritev(views, batch.offsets[first]) != (last - first) * batch.piece_bytes:
        raise OSError(errno.EIO, "short write")
    batch.errors[first:last] = [0] * (last - first)


class TimedCall:
    """Makes calls that may hang, one at a time, each in a thread of its own, so that the caller waits only for a while.

    Not thread-safe.
    """

    def __init__(self, disk: int) -> None:
        self._name = f"polder-disk{disk}-call"
        self._last: Future[None] | None = None

    @property
    def hangs(self) -> bool:
        """Whether an earlier call has not returned yet."""
        return self._last is not None and not self._last.done()

    def call(self, function: Callable[[], None], timeout_s: float) -> None:
        """Raises what `function` raises.

        Raises EnvironmentFault when the function takes longer than `timeout_s`; it goes on in its thread. While an
        earlier call hangs, raises EnvironmentFault at once and calls nothing.
        """
        if not self.hangs:
            done = Future[None]()

            def carry_out() -> None:
                try:
                    function()
                except BaseException as error:
                    done.set_exception(error)
                else:
                    done.set_result(None)

            thread = threading.Thread(target=carry_out, name=self._name, daemon=True)  # a daemon thread, as above
            try:
                thread.start()
            except RuntimeError:  # no more threads, or the interpreter is ending
                return function()
            self._last = done
            with contextlib.suppress(TimeoutError):
                return done.result(timeout_s)
        raise EnvironmentFault(f"no answer for {timeout_s:g} s")


def side_by_side(offsets: Sequence[int], piece_bytes: int, workers: int) -> list[tuple[int, int]]:
    """Cuts sorted offsets, in bytes, into runs (first, end) of adjacent pieces, short enough to occupy all workers."""
    count = len(offsets)
    longest = min(max(RUN_PIECES, RUN_BYTES // piece_bytes), max(-(-count // workers), LEAST_RUN_BYTES // piece_bytes))
    runs, first = [], 0
    for row in range(1, count):
        if offsets[row] - offsets[row - 1] != piece_bytes or row - first == longest:
            runs.append((first, row))
            first = row
    if count:
        runs.append((first, count))
    return runs
