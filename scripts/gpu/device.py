"""One GPU, real or fake, with the few things that the stages compute on it.

The fake one is the driver of tests/fixtures/fakecuda: its streams have threads and its addresses are the host's. Stages for both
use no torch on the fake one, whose torch knows no GPU.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from stage import Skipped  # first: it makes the packages below importable

from polder.memory.backend import Mark  # isort: skip
from polder.memory.cuda import CudaBackend  # isort: skip


class Gpu(Protocol):
    """Compute runs in one stream of its own, as vLLM's does."""

    backend: CudaBackend

    def busy(self, seconds: float) -> Mark:
        """Launches work that lasts about so long and touches no memory of ours; the mark is reached when it is over."""

    def fill(self, address: int, size_bytes: int, value: int, *, after_s: float = 0.0) -> None:
        """Launches work that sets bytes, after work of `after_s` seconds in the same stream."""

    def byte(self, address: int, size_bytes: int) -> int:
        """After all work: the value of all bytes, or -1 when they differ."""

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def open_gpu(kind: str) -> Iterator[Gpu]:
    """`kind`: "cuda" or "fake". Raises Skipped where there is no such device."""
    if kind == "cpu":
        raise Skipped("needs a GPU, or --device fake")
    gpu: Any = _RealGpu() if kind == "cuda" else _FakeGpu()
    try:
        yield gpu
    finally:
        gpu.synchronize()
        gpu.backend.close()
    if kind == "fake" and gpu.violation():
        raise RuntimeError(f"the fake driver found a missing order: {gpu.violation()}")


@contextlib.contextmanager
def mapped(gpu: Gpu, pages: int) -> Iterator[int]:
    """The address of so many pages."""
    backend = gpu.backend
    address, handles = backend.reserve(pages * backend.page_bytes), backend.create(pages)
    backend.map(address, handles)
    try:
        yield address
    finally:
        gpu.synchronize()
        backend.unmap(address, pages)
        backend.destroy(handles)
        backend.free(address, pages * backend.page_bytes)


class HostMemory:
    """Touched memory of the host, aligned to pages. `bytes` are its bytes; `pin` and `unpin` are for copies both ways."""

    def __init__(self, gpu: Gpu, size_bytes: int) -> None:
        self._backend = gpu.backend
        self.bytes = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
        self.bytes[:] = 1
        self.address, self._size_bytes = int(self.bytes.ctypes.data), size_bytes

    def pin(self) -> None:
        self._backend.pin(self.address, self._size_bytes)

    def unpin(self) -> None:
        self._backend.unpin(self.address)


class _RealGpu:
    def __init__(self) -> None:
        try:
            import torch
        except ImportError as error:
            raise Skipped("no torch") from error
        if not torch.cuda.is_available():
            raise Skipped("torch finds no NVIDIA GPU")
        self._torch = torch
        self._stream = torch.cuda.Stream()
        self.backend = CudaBackend(0, compute_stream=lambda _: int(self._stream.cuda_stream))
        self._cycles_per_s = 1e9
        begin = time.perf_counter()
        self.busy(0.2).wait()
        self._cycles_per_s *= 0.2 / (time.perf_counter() - begin)

    def busy(self, seconds: float) -> Mark:
        with self._torch.cuda.stream(self._stream):
            self._torch.cuda._sleep(int(seconds * self._cycles_per_s))
        return self.backend.mark()

    def fill(self, address: int, size_bytes: int, value: int, *, after_s: float = 0.0) -> None:
        if after_s:
            self.busy(after_s)
        with self._torch.cuda.stream(self._stream):
            self.tensor(address, size_bytes).fill_(value)

    def byte(self, address: int, size_bytes: int) -> int:
        self.synchronize()
        values = self.tensor(address, size_bytes).unique().cpu().tolist()
        return int(values[0]) if len(values) == 1 else -1

    def tensor(self, address: int, size_bytes: int) -> Any:
        from polder.memory.tensor import tensor_over

        return tensor_over(address, size_bytes, self.backend.device, None)

    def synchronize(self) -> None:
        self._torch.cuda.synchronize()


class _FakeGpu:
    def __init__(self) -> None:
        from tests.memory.device import Device
        from tests.memory.machines import LIBRARY, FakeCuda, build_fakecuda

        if LIBRARY not in os.environ:  # children find it there
            folder = Path(tempfile.mkdtemp(prefix="fakecuda-"))
            atexit.register(shutil.rmtree, folder, ignore_errors=True)
            os.environ[LIBRARY] = str(build_fakecuda(folder))
        self._device = Device(FakeCuda(os.environ[LIBRARY]))
        self.backend = self._device.backend
        self._spare = ctypes.create_string_buffer(64)

    def busy(self, seconds: float) -> Mark:
        self._device.fake.launch(self._device.stream, ctypes.addressof(self._spare), 0, 64, delay_us=int(seconds * 1e6))
        return self.backend.mark()

    def fill(self, address: int, size_bytes: int, value: int, *, after_s: float = 0.0) -> None:
        self._device.launch(address, 0, size_bytes, value=value, delay_us=int(after_s * 1e6))

    def byte(self, address: int, size_bytes: int) -> int:
        data = self._device.read(address, size_bytes)
        return data[0] if data.count(data[0]) == size_bytes else -1

    def synchronize(self) -> None:
        self._device.call("cuCtxSynchronize")

    def violation(self) -> str:
        return self._device.fake.violation()
