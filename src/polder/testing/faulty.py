"""A backend that fails on order: the n-th call of a method, always the same one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence

from polder.errors import EnvironmentFault, OutOfPages
from polder.memory.backend import Backend, CopyJob, CopyQueue, Mark
from polder.memory.page import Handle

__all__ = ["FaultyBackend", "seeded_faults"]

Failure = Callable[[str], Exception]


def seeded_faults(seed: int, rates: Mapping[str, float], calls: int = 1000) -> dict[str, frozenset[int]]:
    """Which of the first `calls` calls of each method fail, at random with the given probability; the same for a seed."""
    chance = random.Random(seed)
    return {name: frozenset(n for n in range(1, calls + 1) if chance.random() < rate) for name, rate in rates.items()}


class FaultyBackend:
    """Any backend, but for chosen calls, which raise before they reach it and so change nothing.

    `fail` says which: {"map": {2}} fails the second call of `map`, counted from 1 since this wrapper was made. "copy" stands for
    the submissions to its copy queues: a chosen one copies nothing, and its error appears where the real ones do, at wait.
    `error` makes the exceptions: OutOfPages unless told otherwise. `calls` counts the calls of each method, failed ones too.
    """

    calls: Counter[str]

    def __init__(
        self, inner: Backend, fail: Mapping[str, Collection[int]] | None = None, error: Failure = OutOfPages
    ) -> None:
        self._inner, self._error = inner, error
        self._fail = {name: set(numbers) for name, numbers in (fail or {}).items()}
        self.calls = Counter()
        self.device, self.page_bytes, self.sparse = inner.device, inner.page_bytes, inner.sparse

    def fail_next(self, name: str, nth: int = 1) -> None:
        """Lets the n-th call of `name` from now on fail as well."""
        self._fail.setdefault(name, set()).add(self.calls[name] + nth)

    def forgive(self) -> None:
        """Nothing fails from now on."""
        self._fail.clear()

    def reserve(self, size_bytes: int) -> int:
        self._count("reserve")
        return self._inner.reserve(size_bytes)

    def free(self, address: int, size_bytes: int) -> None:
        self._count("free")
        self._inner.free(address, size_bytes)

    def create(self, count: int) -> list[Handle]:
        self._count("create")
        return self._inner.create(count)

    def destroy(self, handles: Sequence[Handle]) -> None:
        self._count("destroy")
        self._inner.destroy(handles)

    def drop(self, handles: Sequence[Handle]) -> None:
        self._count("drop")
        self._inner.drop(handles)

    def punch(self, handles: Sequence[Handle]) -> None:
        self._count("punch")
        self._inner.punch(handles)

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        self._count("map")
        self._inner.map(address, handles)

    def unmap(self, address: int, count: int) -> None:
        self._count("unmap")
        self._inner.unmap(address, count)

    def zero(self, address: int, size_bytes: int) -> None:
        self._count("zero")
        self._inner.zero(address, size_bytes)

    def export(self, handle: Handle) -> tuple[int, int]:
        self._count("export")
        return self._inner.export(handle)

    def export_many(self, handles: Sequence[Handle]) -> tuple[list[int], list[int], list[int]]:
        self._count("export_many")
        return self._inner.export_many(handles)

    def adopt(self, fd: int, offset: int) -> Handle:
        self._count("adopt")
        return self._inner.adopt(fd, offset)

    def adopt_many(self, fds: Sequence[int], fd_index: Sequence[int], offsets: Sequence[int]) -> list[Handle]:
        self._count("adopt_many")
        return self._inner.adopt_many(fds, fd_index, offsets)

    def mark(self) -> Mark | None:
        self._count("mark")
        return self._inner.mark()

    def fence(self) -> None:
        self._count("fence")
        self._inner.fence()

    def pin(self, address: int, size_bytes: int) -> None:
        self._count("pin")
        self._inner.pin(address, size_bytes)

    def unpin(self, address: int) -> None:
        self._count("unpin")
        self._inner.unpin(address)

    def copy_queue(self, inline_bytes: int = 0) -> CopyQueue:
        self._count("copy_queue")
        return _FaultyQueue(self._inner.copy_queue(inline_bytes), self._failure)

    def resident_bytes(self) -> int:
        self._count("resident_bytes")
        return self._inner.resident_bytes()

    def free_bytes(self) -> int | None:
        self._count("free_bytes")
        return self._inner.free_bytes()

    def close(self) -> None:
        self._count("close")
        self._inner.close()

    def _count(self, name: str) -> None:
        failure = self._failure(name)
        if failure is not None:
            raise failure

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
