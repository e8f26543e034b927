"""CUDA's copy queue: a stream of its own, with an event before and after each job."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from polder.memory.cuda import Driver

__all__ = ["StreamJob", "StreamQueue"]


class StreamJob:
    """See polder.memory.backend.CopyJob. The events are destroyed as soon as one thread has seen the job's end."""

    def __init__(self, driver: Driver, begin: Any, end: Any, error: Exception | None) -> None:
        self._driver, self._begin, self._end = driver, begin, end
        self._lock = threading.Lock()
        self._over = end is None
        self._seconds = 0.0
        self._error = error

    def done(self) -> bool:
        if self._over:
            return True
        # Whoever holds the lock waits for this very job, so it is not known to be done.
        if not self._lock.acquire(blocking=False):
            return False
        try:
            return self._over or int(self._driver.api.cuEventQuery(self._end)[0]) != self._not_ready()
        finally:
            self._lock.release()

    def wait(self) -> float:
        with self._lock:
            if not self._over:
                self._finish()
        if self._error is not None:
            raise self._error
        return self._seconds

    def _finish(self) -> None:
        try:
            with self._driver.current():
                self._driver.call("cuEventSynchronize", self._end)
                self._seconds = float(self._driver.call("cuEventElapsedTime", self._begin, self._end)) / 1e3
                self._driver.call("cuEventDestroy", self._begin)
                self._driver.call("cuEventDestroy", self._end)
        except Exception as error:
            self._error = self._error or error
        self._over = True

    def _not_ready(self) -> int:
        return int(self._driver.api.CUresult.CUDA_ERROR_NOT_READY)


class StreamQueue:
    """See polder.memory.backend.CopyQueue. The copies run on the GPU's copy engines, beside its kernels."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        api = driver.api
        with driver.current():
            self._stream = driver.call("cuStreamCreate", api.CUstream_flags.CU_STREAM_NON_BLOCKING)
        # Sources are read in the order of the stream: they may be written by a job before.
        self._attributes = api.CUmemcpyAttributes()
        self._attributes.srcAccessOrder = api.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM

    def put(self, dst: Sequence[int], src: Sequence[int], length: Sequence[int]) -> StreamJob:
        begin = end = error = None
        try:
            with self._driver.current():
                begin = self._record()
                try:
                    self._copy(list(dst), list(src), list(length))
                except Exception as refused:
                    error = refused
                # Also after an error: part of the copies may be under way, and the job is over when they are.
                end = self._record()
        except Exception as refused:
            error = error or refused
        return StreamJob(self._driver, begin, end, error)

    def close(self) -> None:
        if self._stream is None:
            return
        with self._driver.current():
            try:
                self._driver.call("cuStreamSynchronize", self._stream)
            finally:
                self._driver.call("cuStreamDestroy", self._stream)
                self._stream = None

    def _record(self) -> Any:
        event = self._driver.call("cuEventCreate", 0)
        self._driver.call("cuEventRecord", event, self._stream)
        return event

    def _copy(self, dst: list[int], src: list[int], length: list[int]) -> None:
        """One piece: a plain copy. More: one batch, whose pieces cost 0.5 us each to submit instead of 2 to 5 (CUDA 12.8)."""
        if len(dst) == 1:
            self._driver.call("cuMemcpyAsync", dst[0], src[0], length[0], self._stream)
        elif dst:
            api = self._driver.api
            to, of = [api.CUdeviceptr(a) for a in dst], [api.CUdeviceptr(a) for a in src]
            self._driver.call("cuMemcpyBatchAsync", to, of, length, len(dst), [self._attributes], [0], 1, self._stream)
