"""Pages of the CPU's memory: stretches of a memfd ("segment") mapped over reserved addresses.

    reserve   mmap(PROT_NONE, NORESERVE)          cuMemAddressReserve
    create    memfd_create + ftruncate            cuMemCreate
    map       mmap(MAP_FIXED | MAP_SHARED)        cuMemMap + cuMemSetAccess
    unmap     mmap(MAP_FIXED, PROT_NONE)          cuMemUnmap
    destroy   fallocate(PUNCH_HOLE)               cuMemRelease

A segment holds all pages of one `create`, so any number of pages costs one descriptor, and neighbours map in one call.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Sequence

import numpy as np

from polder.errors import ConfigError, IntegrityError
from polder.memory import _libc
from polder.memory.backend import Dropped, Mark
from polder.memory.copy_thread import ThreadQueue
from polder.memory.page import PAGE_BYTES, Handle, Mask, contiguous
from polder.memory.segments import Segments

__all__ = ["CpuBackend"]

_ALIGNMENT = 2 << 20  # so that a 2 MiB page can be one huge page, whatever `page_bytes` is


class CpuBackend(Segments):
    """polder.memory.backend.Backend for the memory of this machine. Its pages: segments.py.

    MAP_FIXED replaces whatever is mapped at an address, so the kernel would not notice misuse. This class keeps a
    record of reserved and mapped slots, and refuses what the CUDA driver would refuse.
    """

    sparse = True

    def __init__(self, *, page_bytes: int = PAGE_BYTES, device: str = "cpu:0") -> None:
        """Raises ConfigError unless `page_bytes` is a positive multiple of 4096."""
        if page_bytes <= 0 or page_bytes % 4096:
            raise ConfigError(f"page size {page_bytes}: must be a positive multiple of 4096 bytes")
        super().__init__(page_bytes)
        self.device = device
        self.dropped: Dropped = deque()
        self._starts: list[int] = []  # of all reservations, rising
        self._mapped: dict[int, Mask] = {}  # start of a reservation -> which of its page slots are mapped

    def reserve(self, size_bytes: int) -> int:
        if size_bytes <= 0 or size_bytes % self.page_bytes:
            raise IntegrityError(f"cannot reserve {size_bytes} bytes: no multiple of a page of {self.page_bytes}")
        address = _libc.reserve(size_bytes, _ALIGNMENT)
        with self._lock:
            self._mapped[address] = np.zeros(size_bytes // self.page_bytes, dtype=np.bool_)
            bisect.insort(self._starts, address)
        return address

    def free(self, address: int, size_bytes: int) -> None:
        with self._lock:
            mapped = self._mapped.get(address)
            if mapped is None or len(mapped) * self.page_bytes != size_bytes:
                raise IntegrityError(f"{address:#x} with {size_bytes} bytes is no reservation")
            if mapped.any():
                raise IntegrityError(f"{int(mapped.sum())} pages are still mapped at {address:#x}")
            del self._mapped[address]
            self._starts.remove(address)
        _libc.unreserve(address, size_bytes)

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        if not handles:
            return
        self.check_held(handles)
        with self._lock:
            slots = self._slots(address, len(handles))
            if slots.any():
                raise IntegrityError(f"{int(slots.sum())} of {len(handles)} pages at {address:#x} are mapped already")
            slots[:] = True
        touched = 0
        try:
            for first, count in contiguous(handles, self.page_bytes):
                touched = first + count
                key, offset = handles[first]
                _libc.map_file(address + first * self.page_bytes, count * self.page_bytes, key, offset)
        except BaseException:
            _libc.map_nothing(address, touched * self.page_bytes)
            with self._lock:
                slots[:] = False
            raise

    def unmap(self, address: int, count: int) -> None:
        if count == 0:
            return
        with self._lock:
            slots = self._slots(address, count)
            if not slots.all():
                raise IntegrityError(f"{count - int(slots.sum())} of {count} pages at {address:#x} are not mapped")
        _libc.map_nothing(address, count * self.page_bytes)
        with self._lock:
            slots[:] = False

    def zero(self, address: int, size_bytes: int) -> None:
        _libc.zero_bytes(address, size_bytes)

    def mark(self) -> Mark | None:
        """The CPU's work is over when the call that did it returns."""
        return None

    def fence(self) -> None:
        """As `mark`: nothing to wait for."""

    def pin(self, address: int, size_bytes: int) -> None:
        """All memory is the device's."""

    def unpin(self, address: int) -> None:
        """As `pin`."""

    def free_bytes(self) -> int | None:
        """Memory of a machine is not taken page by page: what is free now says little."""
        return None

    def copy_queue(self, inline_bytes: int = 0) -> ThreadQueue:
        return ThreadQueue(f"polder-copy-{self.device}", inline_bytes)

    def _slots(self, address: int, count: int) -> Mask:
        """The mapped-flags of `count` pages at `address`, as a view. Raises unless one reservation holds them all."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            start = self._starts[at]
            first, rest = divmod(address - start, self.page_bytes)
            mapped = self._mapped[start]
            if rest == 0 and first + count <= len(mapped):
                return mapped[first : first + count]
        raise IntegrityError(f"{count} pages at {address:#x} are not page slots of one reservation")
