"""The devices that one suite runs on: the CPU, a GPU that gcc built, and a real one where there is one."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib.util
import os
import resource
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polder.memory.backend import Backend
from polder.memory.cpu import CpuBackend
from polder.memory.page import Handle
from polder.memory.span import Span
from polder.memory.tensor import tensor_over

SOURCES = Path(__file__).parents[1] / "fixtures" / "fakecuda"
REPOSITORY = Path(__file__).parents[2]
CPU_PAGE = 16 << 10
FAKE_MB = 64
LIBRARY = "FAKECUDA_LIBRARY"
"""Environment variable that tells children where the built driver is."""


_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


class FakeCuda:
    """The fake driver, loaded into this process, and its extra functions."""

    def __init__(self, path: str) -> None:
        # Globally and under its soname, before cuda.bindings looks for libcuda.so.1: then that is what it finds.
        self.library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        self.library.fakecuda_calls.restype = ctypes.c_long
        self.library.fakecuda_fail.argtypes = (ctypes.c_char_p, ctypes.c_long, ctypes.c_int)
        self.library.fakecuda_used.restype = ctypes.c_size_t
        self.library.fakecuda_violations.restype = ctypes.c_long
        self.library.fakecuda_violation.restype = ctypes.c_char_p
        self.library.fakecuda_seed.argtypes = (ctypes.c_ulong, ctypes.c_long)
        address = ctypes.c_uint64
        self.library.fakecuda_launch.argtypes = (
            *(ctypes.c_void_p, address, address),
            *(ctypes.c_size_t, ctypes.c_int, ctypes.c_long),
        )
        self.library.fakecuda_call.argtypes = (
            *(ctypes.c_void_p, _CALL, ctypes.c_void_p, ctypes.c_long, ctypes.c_size_t),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        )
        self._gates: list[Any] = []  # the driver knows their addresses only

    def calls(self, name: str) -> int:
        return int(self.library.fakecuda_calls(name.encode()))

    def fail(self, name: str, nth: int, error: int = 999) -> None:
        self.library.fakecuda_fail(name.encode(), nth, error)

    def violation(self) -> str:
        """The first order that was missing since the last reset; "" if none was."""
        if not self.library.fakecuda_violations():
            return ""
        text: bytes = self.library.fakecuda_violation()
        return text.decode()

    def delays(self, seed: int, longest_us: int) -> None:
        """Of all work in streams from now on."""
        self.library.fakecuda_seed(seed, longest_us)

    def launch(self, stream: int, dst: int, src: int, size: int, *, value: int = 0, delay_us: int = 0) -> None:
        """Compute: dst[i] = src[i] + value, bytes; with src 0, dst[i] = value. Raises when the driver refuses."""
        status = self.library.fakecuda_launch(stream, dst, src, size, value, delay_us)
        assert status == 0, f"launch refused: {status}"

    @contextlib.contextmanager
    def gate(self, stream: int) -> Iterator[threading.Event]:
        """Work in a stream that lasts until the event is set, or the block ends."""
        opened = threading.Event()

        def work(_: object) -> None:
            opened.wait(60.0)

        function = _CALL(work)
        self._gates.append(function)
        status = self.library.fakecuda_call(stream, function, None, 0, 0, None, None, None)
        assert status == 0, f"launch refused: {status}"
        try:
            yield opened
        finally:
            opened.set()

    def reset(self) -> None:
        self.library.fakecuda_reset()

    def used(self, device: int) -> int:
        return int(self.library.fakecuda_used(device))


def build_fakecuda(directory: Path) -> Path:
    """Compiles the fake driver. Skips the test when this machine has no compiler or no cuda.h of CUDA 13."""
    include = _cuda_include()
    if include is None:
        pytest.skip("no cuda.h of CUDA 13 (looked in CUDA_HOME, /usr/local/cuda*, the triton package)")
    return build_library(directory / "libcuda.so.1", SOURCES, f"-I{include}")


def build_library(target: Path, sources: Path, *more: str) -> Path:
    """Compiles all C files of a folder. Skips the test without a compiler."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler to build a fake library with")
    flags = (
        f"-std=gnu11 -O1 -g -Wall -Wextra -Werror -fPIC -shared -fvisibility=hidden -Wl,-soname,{target.name} -pthread"
    )
    command = [compiler, *flags.split(), *more, "-o", str(target), *map(str, sorted(sources.glob("*.c")))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return target


def _cuda_include() -> Path | None:
    places = [Path(os.environ["CUDA_HOME"]) / "include"] if "CUDA_HOME" in os.environ else []
    places += sorted(Path("/usr/local").glob("cuda*/include"))
    triton = importlib.util.find_spec("triton")
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "include")
    for place in places:
        header = place / "cuda.h"
        if header.is_file():
            versions = [line for line in header.read_text().splitlines() if line.startswith("#define CUDA_VERSION ")]
            if versions and int(versions[0].split()[2]) >= 13000:
                return place
    return None


class Machine:
    """A kind of device: makes backends for it and looks at the bytes behind addresses."""

    def __init__(self, kind: str, fake: FakeCuda | None = None) -> None:
        self.kind, self.fake = kind, fake
        self._made: list[Backend] = []
        self.backend = self.another()
        self.page = self.backend.page_bytes

    def another(self) -> Backend:
        """One more backend of this kind: what another process would have."""
        made = make_backend(self.kind)
        self._made.append(made)
        return made

    @contextlib.contextmanager
    def span(self, slots: int, backend: Backend | None = None) -> Iterator[Span]:
        with contextlib.closing(Span(backend or self.backend, slots)) as span:
            yield span

    @contextlib.contextmanager
    def pages(self, count: int) -> Iterator[list[Handle]]:
        handles = self.backend.create(count)
        yield handles
        self.backend.destroy(handles)

    def fill(self, address: int, value: int, size: int | None = None) -> None:
        size = self.page if size is None else size
        if self.kind == "cuda":
            self.tensor(address, size).fill_(value)
            self.backend.fence()
        else:
            ctypes.memset(address, value, size)

    def bytes(self, address: int, size: int | None = None) -> set[int]:
        """The different byte values in a page, so {7} for one filled with sevens."""
        size = self.page if size is None else size
        if self.kind == "cuda":
            return set(self.tensor(address, size).unique().cpu().tolist())
        data = ctypes.string_at(address, size)
        return {data[0]} if data.count(data[0]) == size else set(data)

    def tensor(self, address: int, size: int) -> Any:
        return tensor_over(address, size, self.backend.device, None)

    def touch_kills(self, address: int) -> bool:
        """Whether a process dies by SIGSEGV when it reads a byte there."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of fork() beside threads: this child runs two calls
            child = os.fork()
        if child == 0:
            faulthandler.disable()
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            ctypes.string_at(address, 1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        return os.WIFSIGNALED(status) and os.WTERMSIG(status) == 11

    def close(self) -> None:
        for backend in self._made:
            backend.close()


def make_backend(kind: str) -> Backend:
    if kind == "cpu":
        return CpuBackend(page_bytes=CPU_PAGE)
    from polder.memory.cuda import CudaBackend

    if kind == "cuda":
        return CudaBackend(0)
    backend = CudaBackend(0, compute_stream=lambda _: 0)
    backend.device = "cpu:0"  # the fake's addresses are host addresses, and this torch may know no GPU
    return backend
