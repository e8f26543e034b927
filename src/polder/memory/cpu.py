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
import contextlib
import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from polder.errors import ConfigError, EnvironmentFault, IntegrityError, OutOfPages, ProtocolError
from polder.memory import _libc
from polder.memory.copy_thread import ThreadQueue
from polder.memory.page import PAGE_BYTES, Handle, contiguous

__all__ = ["CpuBackend"]

_ALIGNMENT = 2 << 20  # so that a 2 MiB page can be one huge page, whatever `page_bytes` is


class _Segment:
    """A memfd and, for each of its pages, how many handles of it this process holds."""

    def __init__(self, fd: int, identity: tuple[int, int], pages: int) -> None:
        self.fd, self.identity = fd, identity
        self.held = np.zeros(pages, dtype=np.int32)


class _Reservation:
    """A reserved range, and which of its page slots are mapped."""

    def __init__(self, slots: int) -> None:
        self.mapped = np.zeros(slots, dtype=np.bool_)


class CpuBackend:
    """polder.memory.backend.Backend for the memory of this machine.

    Unlike the driver it could not tell misuse from use, since MAP_FIXED replaces whatever lies there. So it keeps count of
    what is reserved and mapped, and refuses what the driver would refuse.
    """

    sparse = True

    def __init__(self, *, page_bytes: int = PAGE_BYTES, device: str = "cpu:0") -> None:
        """Raises ConfigError unless `page_bytes` is a positive multiple of 4096."""
        if page_bytes <= 0 or page_bytes % 4096:
            raise ConfigError(f"page size {page_bytes}: must be a positive multiple of 4096 bytes")
        self.device, self.page_bytes = device, page_bytes
        self._lock = threading.Lock()
        self._segments: dict[int, _Segment] = {}
        self._by_identity: dict[tuple[int, int], _Segment] = {}
        self._reservations: dict[int, _Reservation] = {}
        self._starts: list[int] = []
        weakref.finalize(self, _close_all, self._segments).atexit = False

    # ------------------------------------------------------------------ addresses

    def reserve(self, size_bytes: int) -> int:
        if size_bytes <= 0 or size_bytes % self.page_bytes:
            raise IntegrityError(f"cannot reserve {size_bytes} bytes: no multiple of a page of {self.page_bytes}")
        address = _libc.reserve(size_bytes, _ALIGNMENT)
        with self._lock:
            self._reservations[address] = _Reservation(size_bytes // self.page_bytes)
            bisect.insort(self._starts, address)
        return address

    def free(self, address: int, size_bytes: int) -> None:
        with self._lock:
            reservation = self._reservations.get(address)
            if reservation is None or len(reservation.mapped) * self.page_bytes != size_bytes:
                raise IntegrityError(f"{address:#x} with {size_bytes} bytes is no reservation")
            if reservation.mapped.any():
                raise IntegrityError(f"{int(reservation.mapped.sum())} pages are still mapped at {address:#x}")
            del self._reservations[address]
            self._starts.remove(address)
        _libc.unreserve(address, size_bytes)

    def map(self, address: int, handles: Sequence[Handle]) -> None:
        if not handles:
            return
        with self._lock:
            self._check_held(handles)
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

    def fence(self) -> None:
        """Nothing to wait for: the CPU's work is over when the call that did it returns."""

    # ------------------------------------------------------------------ physical memory

    def create(self, count: int) -> list[Handle]:
        if count == 0:
            return []
        fd = -1
        try:
            fd = os.memfd_create("polder", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            os.ftruncate(fd, count * self.page_bytes)
            # No process that adopts the segment can shrink it under the others, who would die by SIGBUS.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        except (OSError, OverflowError) as error:
            if fd >= 0:
                os.close(fd)
            what = f"{self.device}: cannot make {count} pages of {self.page_bytes} bytes: {error}"
            no_room = isinstance(error, OverflowError) or error.errno in (errno.ENOMEM, errno.EFBIG, errno.ENOSPC)
            raise (OutOfPages if no_room else EnvironmentFault)(what) from error
        with self._lock:
            segment = self._add(fd)
            segment.held[:] = 1
        return [Handle(fd, i * self.page_bytes) for i in range(count)]

    def destroy(self, handles: Sequence[Handle]) -> None:
        self.punch(handles)
        self.drop(handles)

    def drop(self, handles: Sequence[Handle]) -> None:
        with self._lock:
            counts = [(s, np.bincount(pages, minlength=len(s.held))) for s, pages in self._by_segment(handles)]
            if any((count > segment.held).any() for segment, count in counts):
                raise IntegrityError(f"handles on {self.device} were destroyed or dropped already")
            for segment, count in counts:
                segment.held -= count.astype(np.int32)
                if not segment.held.any():
                    del self._segments[segment.fd], self._by_identity[segment.identity]
                    os.close(segment.fd)

    def punch(self, handles: Sequence[Handle]) -> None:
        with self._lock:
            self._check_held(handles)
        for first, count in contiguous(handles, self.page_bytes):
            _libc.punch_hole(handles[first].key, handles[first].offset, count * self.page_bytes)

    def resident_bytes(self) -> int:
        with self._lock:
            return sum(os.fstat(fd).st_blocks * 512 for fd in self._segments)

    # ------------------------------------------------------------------ other processes

    def export(self, handle: Handle) -> tuple[int, int]:
        fds, _, offsets = self.export_many([handle])
        return fds[0], offsets[0]

    def export_many(self, handles: Sequence[Handle]) -> tuple[list[int], list[int], list[int]]:
        with self._lock:
            self._check_held(handles)
            index: dict[int, int] = {}
            for handle in handles:
                index.setdefault(handle.key, len(index))
            fds = _duplicate(list(index))
        return fds, [index[handle.key] for handle in handles], [handle.offset for handle in handles]

    def adopt(self, fd: int, offset: int) -> Handle:
        return self.adopt_many([fd], [0], [offset])[0]

    def adopt_many(self, fds: Sequence[int], fd_index: Sequence[int], offsets: Sequence[int]) -> list[Handle]:
        if len(fd_index) != len(offsets) or not all(0 <= i < len(fds) for i in fd_index):
            raise ProtocolError(
                f"{len(fds)} fds, {len(fd_index)} indices and {len(offsets)} offsets do not fit together"
            )
        stats = [os.fstat(fd) for fd in fds]
        for i, offset in zip(fd_index, offsets, strict=True):
            if offset % self.page_bytes or not 0 <= offset <= stats[i].st_size - self.page_bytes:
                raise ProtocolError(f"no page of {self.page_bytes} bytes at {offset} of {stats[i].st_size}")
        handles = []
        with self._lock:
            segments = {}
            for i in sorted(set(fd_index)):
                known = self._by_identity.get((stats[i].st_dev, stats[i].st_ino))
                segments[i] = known or self._add(_duplicate([fds[i]])[0])
            for i, offset in zip(fd_index, offsets, strict=True):
                segments[i].held[offset // self.page_bytes] += 1
                handles.append(Handle(segments[i].fd, offset))
        return handles

    def copy_queue(self) -> ThreadQueue:
        return ThreadQueue(f"polder-copy-{self.device}")

    def close(self) -> None:
        with self._lock:
            _close_all(self._segments)
            self._by_identity.clear()

    # ------------------------------------------------------------------ with the lock held

    def _add(self, fd: int) -> _Segment:
        stat = os.fstat(fd)
        segment = _Segment(fd, (stat.st_dev, stat.st_ino), stat.st_size // self.page_bytes)
        self._segments[fd] = self._by_identity[segment.identity] = segment
        return segment

    def _slots(self, address: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """The mapped-flags of `count` pages at `address`, as a view. Raises unless one reservation holds them all."""
        at = bisect.bisect_right(self._starts, address) - 1
        if at >= 0:
            start = self._starts[at]
            first, rest = divmod(address - start, self.page_bytes)
            mapped = self._reservations[start].mapped
            if rest == 0 and first + count <= len(mapped):
                return mapped[first : first + count]
        raise IntegrityError(f"{count} pages at {address:#x} are not page slots of one reservation")

    def _by_segment(
        self, handles: Sequence[Handle]
    ) -> Iterator[tuple[_Segment, np.ndarray[tuple[int], np.dtype[np.int64]]]]:
        table = np.array(handles, dtype=np.int64).reshape(-1, 2)
        for key in np.unique(table[:, 0]).tolist():
            segment = self._segments.get(key)
            if segment is None:
                raise IntegrityError(
                    f"no segment {key} on {self.device}: its handles were destroyed or belong elsewhere"
                )
            yield segment, table[table[:, 0] == key, 1] // self.page_bytes

    def _check_held(self, handles: Sequence[Handle]) -> None:
        for segment, pages in self._by_segment(handles):
            if not (segment.held[pages] > 0).all():
                raise IntegrityError(f"handles on {self.device} were destroyed or dropped already")


def _duplicate(fds: Sequence[int]) -> list[int]:
    """New close-on-exec descriptors of the same files, or none at all."""
    copies: list[int] = []
    try:
        for fd in fds:
            copies.append(os.dup(fd))
    except OSError as error:
        for copy in copies:
            os.close(copy)
        raise EnvironmentFault(f"cannot duplicate a file descriptor: {error}") from error
    return copies


def _close_all(segments: dict[int, _Segment]) -> None:
    while segments:
        with contextlib.suppress(OSError):
            os.close(segments.popitem()[0])
