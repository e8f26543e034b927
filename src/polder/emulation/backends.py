"""Memory backends that fail on order, or whose copies are as slow as an emulated link."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from polder.errors import EnvironmentFault, OutOfPages
from polder.memory.backend import Backend, CopyJob, CopyQueue, Mark

__all__ = ["FaultyBackend", "PacedBackend", "seeded_faults"]

Failure = Callable[[str], Exception]


def seeded_faults(seed: int, rates: Mapping[str, float], calls: int = 1000) -> dict[str, frozenset[int]]:
    """Chooses at random, with the given rate, which of the first `calls` calls of each method fail."""
    chance = random.Random(seed)
    return {name: frozenset(n for n in range(1, calls + 1) if chance.random() < rate) for name, rate in rates.items()}


def _counted(name: str) -> Any:
    """A method that counts its call, fails if that call is to fail, and otherwise calls the inner backend."""

    def method(self: FaultyBackend, *args: Any) -> Any:
        if (failure := self._failure(name)) is not None:
            raise failure
        return getattr(self._inner, name)(*args)

    return method


class FaultyBackend:
    """A backend that passes calls on to another one, except for chosen calls: they raise, and change nothing.

    `fail` chooses them: {"map": {2}} fails the second call of `map`, counted from 1 since this object was made. "copy"
    stands for the submissions to its copy queues: a chosen one copies nothing, and its error appears where real errors
    do, at `wait`. `error` makes the exceptions, OutOfPages by default. `calls` counts the calls of each method,
    including the failed ones.
    """

    calls: Counter[str]

    def __init__(
        self, inner: Backend, fail: Mapping[str, Collection[int]] | None = None, error: Failure = OutOfPages
    ) -> None:
        self._inner, self._error = inner, error
        self._fail = {name: set(numbers) for name, numbers in (fail or {}).items()}
        self.calls = Counter()
        self.device, self.page_bytes, self.sparse = inner.device, inner.page_bytes, inner.sparse
        self.dropped = inner.dropped

    def fail_next(self, name: str, nth: int = 1) -> None:
        """Makes the n-th call of `name` from now on fail as well."""
        self._fail.setdefault(name, set()).add(self.calls[name] + nth)

    def forgive(self) -> None:
        """Nothing fails from now on."""
        self._fail.clear()

    reserve = _counted("reserve")
    free = _counted("free")
    create = _counted("create")
    destroy = _counted("destroy")
    drop = _counted("drop")
    map = _counted("map")
    unmap = _counted("unmap")
    zero = _counted("zero")
    export_many = _counted("export_many")
    adopt_many = _counted("adopt_many")
    mark = _counted("mark")
    fence = _counted("fence")
    pin = _counted("pin")
    unpin = _counted("unpin")
    resident_bytes = _counted("resident_bytes")
    free_bytes = _counted("free_bytes")
    close = _counted("close")

    def copy_queue(self, inline_bytes: int = 0) -> CopyQueue:
        if (failure := self._failure("copy_queue")) is not None:
            raise failure
        return _FaultyQueue(self._inner.copy_queue(inline_bytes), self._failure)

    def _failure(self, name: str) -> Exception | None:
        self.calls[name] += 1
        if self.calls[name] in self._fail.get(name, ()):
            return self._error(f"injected: call {self.calls[name]} of {name}")
        return None


class _FaultyQueue:
    def __init__(self, inner: CopyQueue, failure: Callable[[str], Exception | None]) -> None:
        self._inner, self._failure = inner, failure

    def put(self, dst: Sequence[int], src: Sequence[int], length: Sequence[int], after: Mark | None = None) -> CopyJob:
        failure = self._failure("copy")
        if failure is None:
            return self._inner.put(dst, src, length, after)
        # An empty job keeps the place in the queue: the failed copy is over when those before it are.
        return _FailedJob(self._inner.put([], [], [], after), failure)

    def close(self) -> None:
        self._inner.close()


class _FailedJob:
    def __init__(self, place: CopyJob, error: Exception) -> None:
        self._place, self._error = place, EnvironmentFault(str(error))

    def done(self) -> bool:
        return self._place.done()

    def wait(self) -> float:
        self._place.wait()
        raise self._error

    def hold(self) -> None:
        self.wait()


class PacedBackend(FaultyBackend):
    """A backend whose copies take as long as over a link of the given bandwidth: each copy queue is one direction of
    such a link.

    The bytes move at once, and the job is over when the link would have carried them. Nobody may look at a destination
    before its job is over, so nobody sees the difference, and no thread is needed. Calls can be made to fail, as with
    the base class.
    """

    def __init__(self, inner: Backend, bytes_per_s: float, fail: Mapping[str, Collection[int]] | None = None) -> None:
        super().__init__(inner, fail)
        self._bytes_per_s = bytes_per_s

    def copy_queue(self, inline_bytes: int = 0) -> CopyQueue:
        return PacedQueue(super().copy_queue(inline_bytes), self._bytes_per_s)


class PacedQueue:
    """A copy queue of PacedBackend."""

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
