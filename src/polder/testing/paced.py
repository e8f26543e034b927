"""A backend whose copies take as long as over a link of a given bandwidth, and not less. See polder.testing.links."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence

from polder.memory.backend import Backend, CopyJob, CopyQueue, Mark
from polder.testing.faulty import FaultyBackend

__all__ = ["PacedBackend"]


class PacedBackend(FaultyBackend):
    """Any backend, but each of its copy queues is one direction of a link. Fails on order too, as its base class does.

    The bytes move at once; the job is over when the link would have carried them. Nobody may look at a destination before,
    so nobody can tell, and it takes no thread.
    """

    def __init__(self, inner: Backend, bytes_per_s: float, fail: Mapping[str, Collection[int]] | None = None) -> None:
        super().__init__(inner, fail)
        self._bytes_per_s = bytes_per_s

    def copy_queue(self, inline_bytes: int = 0) -> CopyQueue:
        return _PacedQueue(super().copy_queue(inline_bytes), self._bytes_per_s)


class _PacedQueue:
    def __init__(self, inner: CopyQueue, bytes_per_s: float) -> None:
        self._inner, self._bytes_per_s = inner, bytes_per_s
        self._free_at = 0.0

    def put(self, dst: Sequence[int], src: Sequence[int], length: Sequence[int], after: Mark | None = None) -> CopyJob:
        seconds = sum(length) / self._bytes_per_s
        self._free_at = max(self._free_at, time.perf_counter()) + seconds
        return _PacedJob(self._inner.put(dst, src, length, after), self._free_at, seconds)

    def close(self) -> None:
        self._inner.close()
        _sleep_until(self._free_at)


class _PacedJob:
    def __init__(self, inner: CopyJob, over_at: float, seconds: float) -> None:
        self._inner, self._over_at, self._seconds = inner, over_at, seconds

    def done(self) -> bool:
        return time.perf_counter() >= self._over_at and self._inner.done()

    def wait(self) -> float:
        seconds = self._inner.wait()
        _sleep_until(self._over_at)
        return max(seconds, self._seconds)

    def hold(self) -> None:
        """The link is emulated by the host, so the host waits."""
        self.wait()


def _sleep_until(moment: float) -> None:
    wait = moment - time.perf_counter()
    if wait > 0:
        time.sleep(wait)
