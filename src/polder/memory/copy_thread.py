"""The CPU's copy queue: a thread that copies with the GIL released, or the caller itself for small copies."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence

from polder.memory import _libc
from polder.memory.backend import Mark
from polder.memory.cores import leave_bound_core

__all__ = ["ThreadJob", "ThreadQueue"]


class ThreadJob:
    """See polder.memory.backend.CopyJob."""

    def __init__(
        self, dst: Sequence[int], src: Sequence[int], length: Sequence[int], after: Mark | None = None
    ) -> None:
        self._pieces = list(zip(dst, src, length, strict=True))
        self._after = after
        self._over = threading.Event()
        self._seconds = 0.0
        self._error: Exception | None = None

    def run(self) -> None:
        started = time.perf_counter()
        try:
            if self._after is not None:
                self._after.wait()
                started = time.perf_counter()
            for dst, src, length in self._pieces:
                _libc.copy_bytes(dst, src, length)
        except Exception as error:
            self._error = error
        self._seconds = time.perf_counter() - started
        self._over.set()

    def done(self) -> bool:
        return self._over.is_set()

    def wait(self) -> float:
        self._over.wait()
        if self._error is not None:
            raise self._error
        return self._seconds

    def hold(self) -> None:
        self.wait()


class ThreadQueue:
    """See polder.memory.backend.CopyQueue. The thread starts with the first job, so that a process may fork before.

    A child of a later fork has the queue without its thread: it must make a queue of its own.
    """

    def __init__(self, name: str, inline_bytes: int = 0) -> None:
        """`inline_bytes`: see polder.memory.backend.Backend.copy_queue."""
        self._name, self._inline_bytes = name, inline_bytes
        self._jobs: queue.SimpleQueue[ThreadJob | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._last: ThreadJob | None = None
        """Handed to the thread."""

    def put(
        self, dst: Sequence[int], src: Sequence[int], length: Sequence[int], after: Mark | None = None
    ) -> ThreadJob:
        job = ThreadJob(dst, src, length, after)
        # The last job handed to the thread is over, so all before this one are.
        free = (self._last is None or self._last.done()) and (after is None or after.done())
        if free and sum(length) < self._inline_bytes:
            job.run()
            return job
        if self._thread is None:
            # The thread knows the queue, not this object. A daemon: a process that ends without close() is not held up.
            self._thread = threading.Thread(target=_work, args=(self._jobs,), name=self._name, daemon=True)
            self._thread.start()
        self._last = job
        self._jobs.put(job)
        return job

    def close(self) -> None:
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None


def _work(jobs: queue.SimpleQueue[ThreadJob | None]) -> None:
    leave_bound_core()
    while (job := jobs.get()) is not None:
        job.run()
