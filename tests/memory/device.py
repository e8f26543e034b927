"""A fake GPU at work: a backend, a compute stream of the calling thread, and memory with known bytes."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from polder.memory.cuda import CudaBackend
from polder.memory.cuda_stream import StreamQueue
from tests.memory.machines import FakeCuda

__all__ = ["BrokenBackend", "Device", "open_device"]


class BrokenBackend(CudaBackend):
    """For controls: its copies go through `queue`, which may forget something."""

    queue: type[StreamQueue] = StreamQueue

    def copy_queue(self, inline_bytes: int = 0) -> StreamQueue:
        return self.queue(self.driver, self._compute_stream)


class Device:
    """`backend` marks `stream`, in which `launch` computes."""

    def __init__(self, fake: FakeCuda, backend: CudaBackend | None = None) -> None:
        self.fake = fake
        self.stream = 0
        self.backend = backend or CudaBackend(0)
        self.backend._compute_stream = lambda _: self.stream
        self.backend.device = "cpu:0"  # where torch may touch its addresses
        self.page = self.backend.page_bytes
        self.stream = self.new_stream()
        self._kept: list[Any] = []

    def new_stream(self) -> int:
        driver = self.backend.driver
        with driver.current():
            return int(driver.call("cuStreamCreate", driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING))

    def call(self, name: str, *arguments: Any) -> Any:
        with self.backend.driver.current():
            return self.backend.driver.call(name, *arguments)

    @contextlib.contextmanager
    def mapped(self, count: int) -> Iterator[int]:
        """Address of `count` pages, zeroed. At the end all work is over."""
        address = self.backend.reserve(count * self.page)
        handles = self.backend.create(count)
        self.backend.map(address, handles)
        self.backend.zero(address, count * self.page)
        yield address
        with contextlib.suppress(Exception):  # the device may have failed
            self.call("cuCtxSynchronize")
        with contextlib.suppress(Exception):
            self.backend.unmap(address, count)
        self.backend.destroy(handles)
        self.backend.free(address, count * self.page)

    def host(self, *shape: int) -> npt.NDArray[np.uint8]:
        memory = np.zeros(shape, np.uint8)
        self._kept.append(memory)
        return memory

    def launch(self, dst: int, src: int, size: int, *, value: int = 0, delay_us: int = 0) -> None:
        """See FakeCuda.launch."""
        self.fake.launch(self.stream, dst, src, size, value=value, delay_us=delay_us)

    def read(self, address: int, size: int) -> bytes:
        """After all work."""
        self.call("cuCtxSynchronize")
        return ctypes.string_at(address, size)


@contextlib.contextmanager
def open_device(fake: FakeCuda, backend: CudaBackend | None = None) -> Iterator[Device]:
    device = Device(fake, backend)
    try:
        yield device
    finally:
        with contextlib.suppress(Exception):
            device.call("cuCtxSynchronize")
        device.call("cuStreamDestroy", device.stream)
        device.backend.close()
