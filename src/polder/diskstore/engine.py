"""Carries out batches of reads and writes on several disks at a time, and sums every piece on its way.

`ThreadEngine` needs nothing but the kernel: some threads a disk, one task a thread and batch, one preadv for pieces that lie side
by side. Another engine (io_uring, NIXL) takes its place by having the same three methods.

A system call on a disk that hangs cannot be called off. The engine waits for a batch until its time is over and reports what is
not done as ETIMEDOUT; a thread that hangs may still write to the memory that it was given. `unsettled` lists that memory: it must
not be used for anything else until it is listed no more.

`Aside` is for the few other calls on a disk that may hang as well: on its index, and to close its files.
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

__all__ = ["Aside", "ThreadEngine", "side_by_side"]

logger = logging.getLogger("polder.swarm")


RUN_PIECES, RUN_BYTES = 16, 1 << 20
"""At most so many pieces or bytes, whichever is more, that lie side by side on the disk are moved by one system call. That is 256
pieces at most, for none has less than 4096 bytes; the kernel takes 1024."""
LEAST_RUN_BYTES = 256 << 10
"""No run is cut into shorter ones than that for workers that are idle: four such requests at a time keep a disk as busy as sixteen
of 64 KiB, and a batch of 64 pages takes a third less of the host."""
_JOIN_S = 2.0


_Move = Callable[["_Batch", int, int, Arena | None], None]


class _Latch:
    """Opened by the last of so many."""

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
    """A transfer in the order of its offsets, as lists: the threads index them one by one."""

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
        # A thread that hung notes the digest first and the success last.
        errors[self.order] = self.errors
        digests[self.order] = np.array(self.digests, dtype=np.uint64)
        return Outcome(errors=errors, digests=digests, seconds=self.ended - self.started)


class _Task:
    """Every so-many-th run of a batch: what one thread does of it."""

    def __init__(self, batch: _Batch, runs: Sequence[tuple[int, int]]) -> None:
        self.batch, self.runs = batch, runs
        self.current: tuple[int, int] | None = None
        self.over = False
        self.latch: _Latch | None = None

    def carry_out(self, bounce: Arena | None) -> None:
        batch, move = self.batch, self.batch.move
        for run in self.runs:
            # In this order: who abandons a batch looks at `current` next, so it sees this run, or this thread sees it abandoned.
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
        """One piece of the run is bad: which?"""
        for row in range(first, last):
            if self.batch.abandoned:
                return
            try:
                self.batch.move(self.batch, row, row + 1, None)
            except OSError as error:
                self.batch.errors[row] = error.errno or errno.EIO


class ThreadEngine:
    """See above. Its threads start with the first transfer of a disk, so that a process may fork before."""

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
        """Ends the threads, but for those that hang in the kernel: they are left to the end of the process."""
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
                    # A daemon, and no executor: a thread that hangs in the kernel must not keep the process from ending.
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
            logger.exception("a disk thread failed; its pages are misses")
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


class Aside:
    """Calls on one disk, one at a time, each in a thread of its own: who asks does not wait for ever. Not thread-safe."""

    def __init__(self, disk: int) -> None:
        self._name = f"polder-disk{disk}-aside"
        self._last: Future[None] | None = None

    @property
    def hangs(self) -> bool:
        """Whether a call that took too long has not returned yet."""
        return self._last is not None and not self._last.done()

    def call(self, function: Callable[[], None], timeout_s: float) -> None:
        """Raises what `function` raises. Raises EnvironmentFault when it takes longer, though it goes on then; and at once, without
        a call, as long as an earlier one hangs."""
        if not self.hangs:
            done = Future[None]()

            def carry_out() -> None:
                try:
                    function()
                except BaseException as error:
                    done.set_exception(error)
                else:
                    done.set_result(None)

            thread = threading.Thread(target=carry_out, name=self._name, daemon=True)  # a daemon, as those above
            try:
                thread.start()
            except RuntimeError:  # the system has no more of them, or the interpreter ends
                return function()
            self._last = done
            with contextlib.suppress(TimeoutError):
                return done.result(timeout_s)
        raise EnvironmentFault(f"no answer for {timeout_s:g} s")


def side_by_side(offsets: Sequence[int], piece_bytes: int, workers: int) -> list[tuple[int, int]]:
    """Cuts sorted offsets, in bytes, into runs (first, end) of pieces side by side, so that every worker has something to do."""
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
