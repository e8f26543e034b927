"""CUDA's copy queue and marks: streams and events.

A queue is a stream of its own, with an event before and after each job. A mark is an event on the compute stream. A
host thread that waits is blocked (CU_EVENT_BLOCKING_SYNC); by the driver's default it would spin on a core.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from polder.errors import EnvironmentFault
from polder.memory.backend import Mark, Stall

if TYPE_CHECKING:
    from polder.memory.cuda import Driver

__all__ = ["StreamJob", "StreamMark", "StreamQueue"]

_BLOCKING_SYNC, _DISABLE_TIMING = 1, 2  # CU_EVENT_*


class _Event:
    """A CUevent. It is destroyed with this object; the driver allows that while streams still wait for it."""

    def __init__(self, driver: Driver, flags: int) -> None:
        """With the driver's context current."""
        self._driver = driver
        self.handle = driver.call("cuEventCreate", flags)

    def record(self, stream: Any) -> _Event:
        """With the driver's context current."""
        self._driver.call("cuEventRecord", self.handle, stream)
        return self

    def done(self) -> bool:
        """Also True when the device has failed: a wait tells."""
        return int(self._driver.api.cuEventQuery(self.handle)[0]) != int(self._driver.api.CUresult.CUDA_ERROR_NOT_READY)

    def wait(self) -> None:
        with self._driver.current():
            self._driver.call("cuEventSynchronize", self.handle)

    def seconds_since(self, begin: _Event) -> float:
        with self._driver.current():
            return float(self._driver.call("cuEventElapsedTime", begin.handle, self.handle)) / 1e3

    def __del__(self) -> None:
        handle, self.handle = self.__dict__.get("handle"), None
        if handle is not None:
            with contextlib.suppress(Exception):  # at the end of the interpreter even the driver's functions are gone
                self._driver.api.cuEventDestroy(handle)


class StreamMark:
    """See polder.memory.backend.Mark."""

    def __init__(self, driver: Driver, stream: int) -> None:
        """Raises EnvironmentFault while the stream is being captured into a graph, and when the device has failed."""
        with driver.current():
            _refuse_capture(driver, stream)
            self._event = _Event(driver, _BLOCKING_SYNC | _DISABLE_TIMING).record(stream)

    def done(self) -> bool:
        return self._event.done()

    def wait(self) -> None:
        self._event.wait()

    def hold(self, driver: Driver, stream: Any) -> None:
        """Lets a stream wait. With the driver's context current."""
        driver.call("cuStreamWaitEvent", stream, self._event.handle, 0)


class StreamJob:
    """See polder.memory.backend.CopyJob."""

    def __init__(
        self,
        driver: Driver,
        compute_stream: Callable[[int], int],
        begin: _Event | None,
        end: _Event | None,
        error: Exception | None,
    ) -> None:
        self._driver, self._compute_stream = driver, compute_stream
        self._begin, self._end = begin, end
        self._lock = threading.Lock()
        self._over = end is None
        self._seconds = 0.0
        self._error = error

    def done(self) -> bool:
        end = self._end
        return self._over or end is None or end.done()

    def wait(self) -> float:
        with self._lock:
            if not self._over:
                self._finish()
        if self._error is not None:
            raise self._error
        return self._seconds

    def hold(self) -> Stall | None:
        end = self._end
        if self._error is not None:
            raise self._error
        if self._over or end is None:
            return None
        stream = self._compute_stream(self._driver.index)
        with self._driver.current():
            _refuse_capture(self._driver, stream)
            before = _Event(self._driver, 0).record(stream)
            self._driver.call("cuStreamWaitEvent", stream, end.handle, 0)
            behind = _Event(self._driver, 0).record(stream)
        return lambda: behind.seconds_since(before) if behind.done() else None

    def _finish(self) -> None:
        assert self._begin is not None
        assert self._end is not None
        try:
            self._end.wait()
            self._seconds = self._end.seconds_since(self._begin)
        except Exception as error:
            self._error = self._error or error
        self._over = True
        self._begin = self._end = None  # what still waits for them keeps them


class StreamQueue:
    """See polder.memory.backend.CopyQueue. The copies run on the GPU's copy engines, beside its kernels."""

    job = StreamJob

    def __init__(self, driver: Driver, compute_stream: Callable[[int], int]) -> None:
        self._driver, self._compute_stream = driver, compute_stream
        api = driver.api
        with driver.current():
            self._stream = driver.call("cuStreamCreate", api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        # Sources are read in the order of the stream: they may be written by a job before.
        self._attributes = api.CUmemcpyAttributes()
        self._attributes.srcAccessOrder = api.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM

    def put(
        self, dst: Sequence[int], src: Sequence[int], length: Sequence[int], after: Mark | None = None
    ) -> StreamJob:
        begin = end = error = None
        try:
            with self._driver.current():
                self._wait_for(after)
                # Both before the copy: there may be no memory for an event, and then nothing must be under way.
                begin, last = _Event(self._driver, 0), _Event(self._driver, _BLOCKING_SYNC)
                begin.record(self._stream)
                try:
                    self._copy(list(dst), list(src), list(length))
                except Exception as refused:
                    error = refused
                # Also after an error: part of the copies may be under way, and the job is over when they are.
                end = self._recorded(last)
        except Exception as refused:
            error = error or refused
        return self.job(self._driver, self._compute_stream, begin, end, error)

    def _recorded(self, event: _Event) -> _Event:
        """Raises when the event cannot be recorded, but after the copies before it are over: nobody could wait for
        them."""
        try:
            return event.record(self._stream)
        except Exception:
            self._driver.call("cuStreamSynchronize", self._stream)
            raise

    def close(self) -> None:
        if self._stream is None:
            return
        with self._driver.current():
            try:
                self._driver.call("cuStreamSynchronize", self._stream)
            finally:
                self._driver.call("cuStreamDestroy", self._stream)
                self._stream = None

    def _wait_for(self, after: Mark | None) -> None:
        if isinstance(after, StreamMark):
            after.hold(self._driver, self._stream)
        elif after is not None:  # not of a stream: only the host can wait for it
            after.wait()

    def _copy(self, dst: list[int], src: list[int], length: list[int]) -> None:
        """Copies one piece by a plain copy, more by a batch: 0.5 us a piece to submit, not 2 to 5 (CUDA 12.8)."""
        if len(dst) == 1:
            self._driver.call("cuMemcpyAsync", dst[0], src[0], length[0], self._stream)
        elif dst:
            api = self._driver.api
            to, of = [api.CUdeviceptr(a) for a in dst], [api.CUdeviceptr(a) for a in src]
            self._driver.call("cuMemcpyBatchAsync", to, of, length, len(dst), [self._attributes], [0], 1, self._stream)


def _refuse_capture(driver: Driver, stream: Any) -> None:
    """Raises EnvironmentFault while the stream is captured into a graph.

    An event that is recorded then belongs to the graph. Waiting for it is an error, and a replay orders nothing
    outside.
    """
    status = driver.call("cuStreamIsCapturing", stream)
    if int(status) != 0:
        raise EnvironmentFault("the compute stream is being captured into a graph, where copies cannot be ordered")
