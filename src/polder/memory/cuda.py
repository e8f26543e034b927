"""Pages of a GPU's memory, by the driver's virtual memory management (CUDA Driver API, Virtual Memory Management).

Each page is one driver handle, because cuMemMap maps a handle as a whole. Mapping is one call for each page. Granting
access and unmapping are one call for each run of pages: these two are slow (36 and 26 us on an A100, kvcached). The
calls go through cuda-bindings, which releases the GIL.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from polder.errors import ConfigError, EnvironmentFault, IntegrityError, OutOfPages, ProtocolError
from polder.memory.backend import Dropped
from polder.memory.cuda_stream import StreamMark, StreamQueue
from polder.memory.nvml import free_bytes
from polder.memory.page import PAGE_BYTES, Handle

__all__ = ["CudaBackend", "CudaError", "Driver"]

_OUT_OF_MEMORY = 2
_PORTABLE = 0x01  # CU_MEMHOSTREGISTER_PORTABLE
_PINNED_AT_ONCE = 4 << 30
"""Bytes of one registration: a driver was seen to refuse 512 GiB at once."""


class CudaError(EnvironmentFault):
    """The driver refused a call. `name` is its own word for it, e.g. "CUDA_ERROR_INVALID_VALUE"."""

    def __init__(self, name: str, call: str) -> None:
        super().__init__(f"{call}: {name}")
        self.name = name


def torch_stream(index: int) -> int:
    """The compute stream of the calling thread: torch's current one, as the driver's number for it."""
    import torch

    return int(torch.cuda.current_stream(index).cuda_stream)


class Driver:
    """The driver's functions on the primary context of one device (torch uses the same), with errors as exceptions.

    The context is retained at its first use. Making, exporting and importing memory do not need it. So the broker,
    which does nothing else, takes no device memory for itself.
    """

    def __init__(self, index: int) -> None:
        """Raises EnvironmentFault when there is no driver, no bindings or no such device."""
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise EnvironmentFault(f"cuda-bindings is not installed, install polder-kv[cuda]: {error}") from error
        self.api: Any = driver
        try:
            self.call("cuInit", 0)
        except CudaError as error:
            raise EnvironmentFault(f"no usable NVIDIA GPU: {error}") from error
        except Exception as error:  # the bindings' own: the library is missing, or too old for a symbol
            raise EnvironmentFault(f"no NVIDIA driver found: {error}") from error
        self.index = index
        self._device = self.call("cuDeviceGet", index)
        self._lock = threading.Lock()
        self._context: Any = None

    def call(self, name: str, *arguments: Any) -> Any:
        """Calls `name`, returns its result (None, a value, or a tuple). Raises OutOfPages or CudaError."""
        status, *results = getattr(self.api, name)(*arguments)
        if int(status) == _OUT_OF_MEMORY:
            raise OutOfPages(f"{name}: CUDA_ERROR_OUT_OF_MEMORY")
        if int(status) != 0:
            raise CudaError(getattr(status, "name", str(int(status))), name)
        return results[0] if len(results) == 1 else tuple(results) or None

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Makes the context current in this thread for a while. The one before comes back, since it may be torch's."""
        with self._lock:
            if self._context is None:
                self._context = self.call("cuDevicePrimaryCtxRetain", self._device)
        self.call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self.call("cuCtxPopCurrent")

    def close(self) -> None:
        """Releases the context, if it was ever needed. May be repeated."""
        with self._lock:
            if self._context is not None:
                self._context = None
                self.call("cuDevicePrimaryCtxRelease", self._device)


class CudaBackend:
    """polder.memory.backend.Backend for one GPU."""

    sparse = False

    def __init__(
        self,
        index: int,
        *,
        page_bytes: int = PAGE_BYTES,
        compute_stream: Callable[[int], int] = torch_stream,
    ) -> None:
        """`compute_stream(index)`: the stream in which the calling thread's work on the device runs.

        Raises EnvironmentFault without a usable driver, ConfigError when the driver cannot map such small pages.
        """
        self.driver = Driver(index)
        self._compute_stream = compute_stream
        api = self.driver.api
        self.device, self.page_bytes = f"cuda:{index}", page_bytes
        self._fd_type = api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._properties = api.CUmemAllocationProp()
        self._properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._properties.location.id = index
        self._properties.requestedHandleTypes = self._fd_type
        self._access = api.CUmemAccessDesc()
        self._access.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._access.location.id = index
        self._access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        minimum = api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        granularity = int(self.driver.call("cuMemGetAllocationGranularity", self._properties, minimum))
        if page_bytes <= 0 or page_bytes % granularity:
            self.driver.close()
            raise ConfigError(f"page size {page_bytes}: {self.device} maps multiples of {granularity} bytes")
        self.dropped: Dropped = deque()
        self._lock = threading.Lock()
        self._held: Counter[int] = Counter()  # driver handle -> references of this process
        self._stream: Any = None  # for `zero`
        self._pinned: dict[int, list[int]] = {}  # address -> starts of its registrations

    # ------------------------------------------------------------------ addresses

    def reserve(self, size_bytes: int) -> int:
        return int(self.driver.call("cuMemAddressReserve", size_bytes, PAGE_BYTES, 0, 0))

    def free(self, address: int, size_bytes: int) -> None:
        self.driver.call("cuMemAddressFree", address, size_bytes)

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        if not handles:
            return
        self._check_held(handles)
        done = 0
        try:
            for handle in handles:
                self.driver.call("cuMemMap", address + done * self.page_bytes, self.page_bytes, 0, handle.key, 0)
                done += 1
            self.driver.call("cuMemSetAccess", address, done * self.page_bytes, [self._access], 1)
        except BaseException:
            if done:  # and not one page more: a run with a hole fails whole, and would leave the rest mapped for ever
                self.driver.call("cuMemUnmap", address, done * self.page_bytes)
            raise

    def unmap(self, address: int, count: int) -> None:
        if count:
            self.driver.call("cuMemUnmap", address, count * self.page_bytes)

    def zero(self, address: int, size_bytes: int) -> None:
        with self.driver.current():
            with self._lock:
                if self._stream is None:
                    flags = self.driver.api.CUstream_flags.CU_STREAM_NON_BLOCKING
                    self._stream = self.driver.call("cuStreamCreate", flags)
            self.driver.call("cuMemsetD8Async", address, 0, size_bytes, self._stream)
            done = StreamMark(self.driver, self._stream)
        done.wait()

    def mark(self) -> StreamMark:
        return StreamMark(self.driver, self._compute_stream(self.driver.index))

    def fence(self) -> None:
        self.mark().wait()

    def pin(self, address: int, size_bytes: int) -> None:
        with self.driver.current():
            done: list[int] = []
            try:
                for start in range(address, address + size_bytes, _PINNED_AT_ONCE):
                    size = min(_PINNED_AT_ONCE, address + size_bytes - start)
                    self.driver.call("cuMemHostRegister", start, size, _PORTABLE)
                    done.append(start)
            except BaseException:
                self._unregister(done)
                raise
        self._pinned[address] = done

    def unpin(self, address: int) -> None:
        if address not in self._pinned:
            raise IntegrityError(f"no memory is pinned at {address:#x}")
        with self.driver.current():
            self._unregister(self._pinned.pop(address))

    def _unregister(self, starts: Sequence[int]) -> None:
        for start in starts:
            self.driver.call("cuMemHostUnregister", start)

    # ------------------------------------------------------------------ physical memory

    def create(self, count: int) -> list[Handle]:
        keys: list[int] = []
        try:
            for _ in range(count):
                keys.append(int(self.driver.call("cuMemCreate", self.page_bytes, self._properties, 0)))
        except BaseException as error:
            self._release(keys)
            if isinstance(error, OutOfPages):
                raise OutOfPages(f"{self.device}: room for {len(keys)} of {count} pages") from error
            raise
        return self._hold(keys)

    def destroy(self, handles: Sequence[Handle]) -> None:
        wanted = Counter(handle.key for handle in handles)
        with self._lock:
            if not wanted <= self._held:
                raise IntegrityError(f"handles on {self.device} were destroyed already or belong elsewhere")
            self._held -= wanted
        self._release(list(wanted.elements()))

    def drop(self, handles: Sequence[Handle]) -> None:
        self.destroy(handles)

    def resident_bytes(self) -> int:
        with self._lock:
            return len(self._held) * self.page_bytes

    def free_bytes(self) -> int | None:
        return free_bytes(bytes(self.driver.call("cuDeviceGetUuid", self._properties.location.id).bytes))

    # ------------------------------------------------------------------ other processes

    def export_many(self, handles: Sequence[Handle]) -> tuple[list[int], list[int], list[int]]:
        self._check_held(handles)
        fds: list[int] = []
        try:
            for handle in handles:
                fds.append(int(self.driver.call("cuMemExportToShareableHandle", handle.key, self._fd_type, 0)))
                os.set_inheritable(fds[-1], False)
        except BaseException:
            for fd in fds:
                os.close(fd)
            raise
        return fds, list(range(len(fds))), [0] * len(fds)

    def adopt_many(self, fds: Sequence[int], fd_index: Sequence[int], offsets: Sequence[int]) -> list[Handle]:
        if len(fd_index) != len(offsets) or any(offsets) or not all(0 <= i < len(fds) for i in fd_index):
            raise ProtocolError(
                f"{len(fds)} fds, {len(fd_index)} indices and {len(offsets)} offsets (all 0) do not fit"
            )
        keys: list[int] = []
        try:
            for i in fd_index:
                keys.append(int(self.driver.call("cuMemImportFromShareableHandle", fds[i], self._fd_type)))
        except BaseException:
            self._release(keys)
            raise
        return self._hold(keys)

    def copy_queue(self, inline_bytes: int = 0) -> StreamQueue:
        return StreamQueue(self.driver, self._compute_stream)

    def close(self) -> None:
        with self._lock:
            keys = list(self._held.elements())
            self._held.clear()
        self._release(keys)
        if self._stream is not None:
            with self.driver.current():
                self.driver.call("cuStreamDestroy", self._stream)
            self._stream = None
        self.driver.close()

    def _check_held(self, handles: Sequence[Handle]) -> None:
        """The driver's behaviour on an invalid handle is undefined, so it never gets to see one."""
        with self._lock:
            if not all(handle.key in self._held for handle in handles):
                raise IntegrityError(f"handles on {self.device} were destroyed already or belong elsewhere")

    def _hold(self, keys: Sequence[int]) -> list[Handle]:
        with self._lock:
            self._held.update(keys)
        return [Handle(key) for key in keys]

    def _release(self, keys: Sequence[int]) -> None:
        for key in keys:
            self.driver.call("cuMemRelease", key)
