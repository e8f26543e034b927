"""The CPU's physical pages: memory files ("segments") of which this process holds pages.

A segment is a memfd that was made here or received from another process. Page i lies at offset i * page_bytes. This
process keeps one descriptor of a segment, however often its pages are adopted, until the last handle is dropped.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
import weakref
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from polder.errors import EnvironmentFault, IntegrityError, OutOfPages, ProtocolError
from polder.memory import _libc
from polder.memory.page import Handle, Indices, contiguous

__all__ = ["Segments"]


class _Segment:
    """A memfd and, for each of its pages, how many handles of it this process holds."""

    def __init__(self, fd: int, identity: tuple[int, int], pages: int) -> None:
        self.fd, self.identity = fd, identity
        self.held = np.zeros(pages, dtype=np.int32)


class Segments:
    """The part of CpuBackend that makes and shares pages. Thread-safe. Its contract is in polder.memory.backend."""

    def __init__(self, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self._lock = threading.Lock()
        self._by_fd: dict[int, _Segment] = {}
        self._by_identity: dict[tuple[int, int], _Segment] = {}
        # A backend that is forgotten closes its files; at the end of the process the kernel does.
        weakref.finalize(self, _close_all, self._by_fd).atexit = False

    def create(self, count: int) -> list[Handle]:
        if not count:
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
            what = f"cannot make {count} pages of {self.page_bytes} bytes: {error}"
            no_room = isinstance(error, OverflowError) or error.errno in (errno.ENOMEM, errno.EFBIG, errno.ENOSPC)
            raise (OutOfPages if no_room else EnvironmentFault)(what) from error
        with self._lock:
            self._add(fd).held[:] = 1
        return [Handle(fd, i * self.page_bytes) for i in range(count)]

    def check_held(self, handles: Sequence[Handle]) -> None:
        """Raises IntegrityError when one of them is no handle of a page that is held here."""
        with self._lock:
            self._check_held(handles)

    def destroy(self, handles: Sequence[Handle]) -> None:
        with self._lock:
            self._counts(handles)  # refuses before a byte is lost
        for first, count in contiguous(handles, self.page_bytes):
            _libc.punch_hole(handles[first].key, handles[first].offset, count * self.page_bytes)
        self.drop(handles)

    def drop(self, handles: Sequence[Handle]) -> None:
        with self._lock:
            for segment, count in self._counts(handles):
                segment.held -= count
                if not segment.held.any():
                    del self._by_fd[segment.fd], self._by_identity[segment.identity]
                    os.close(segment.fd)

    def export_many(self, handles: Sequence[Handle]) -> tuple[list[int], list[int], list[int]]:
        with self._lock:
            self._check_held(handles)
            index: dict[int, int] = {}
            for handle in handles:
                index.setdefault(handle.key, len(index))
            fds = _duplicate(list(index))
        return fds, [index[handle.key] for handle in handles], [handle.offset for handle in handles]

    def adopt_many(self, fds: Sequence[int], fd_index: Sequence[int], offsets: Sequence[int]) -> list[Handle]:
        if len(fd_index) != len(offsets) or not all(0 <= i < len(fds) for i in fd_index):
            raise ProtocolError(
                f"{len(fds)} fds, {len(fd_index)} indices and {len(offsets)} offsets do not fit together"
            )
        stats = [os.fstat(fd) for fd in fds]
        for i, offset in zip(fd_index, offsets, strict=True):
            if offset % self.page_bytes or not 0 <= offset <= stats[i].st_size - self.page_bytes:
                raise ProtocolError(f"no page of {self.page_bytes} bytes at {offset} of {stats[i].st_size}")
        used = sorted(set(fd_index))
        handles = []
        with self._lock:
            unknown = [i for i in used if (stats[i].st_dev, stats[i].st_ino) not in self._by_identity]
            for fd in _duplicate([fds[i] for i in unknown]):
                self._add(fd)
            segments = {i: self._by_identity[stats[i].st_dev, stats[i].st_ino] for i in used}
            for i, offset in zip(fd_index, offsets, strict=True):
                segments[i].held[offset // self.page_bytes] += 1
                handles.append(Handle(segments[i].fd, offset))
        return handles

    def resident_bytes(self) -> int:
        with self._lock:
            return sum(os.fstat(fd).st_blocks * 512 for fd in self._by_fd)

    def close(self) -> None:
        with self._lock:
            _close_all(self._by_fd)
            self._by_identity.clear()

    # ------------------------------------------------------------------ with the lock held

    def _add(self, fd: int) -> _Segment:
        stat = os.fstat(fd)
        known = self._by_identity.get((stat.st_dev, stat.st_ino))
        if known is not None:  # one file came twice in one message
            os.close(fd)
            return known
        segment = _Segment(fd, (stat.st_dev, stat.st_ino), stat.st_size // self.page_bytes)
        self._by_fd[fd] = self._by_identity[segment.identity] = segment
        return segment

    def _by_segment(self, handles: Sequence[Handle]) -> Iterator[tuple[_Segment, Indices]]:
        table = np.array(handles, dtype=np.int64).reshape(-1, 2)
        for key in np.unique(table[:, 0]).tolist():
            segment = self._by_fd.get(key)
            if segment is None:
                raise IntegrityError(f"no segment {key} is held: its pages were destroyed or belong elsewhere")
            yield segment, table[table[:, 0] == key, 1] // self.page_bytes

    def _counts(self, handles: Sequence[Handle]) -> list[tuple[_Segment, npt.NDArray[np.int32]]]:
        """How often each page of each segment is named. Raises IntegrityError when it is named more often than it is
        held."""
        counts = [
            (segment, np.bincount(pages, minlength=len(segment.held)).astype(np.int32))
            for segment, pages in self._by_segment(handles)
        ]
        if any((count > segment.held).any() for segment, count in counts):
            raise IntegrityError("page handles were destroyed or dropped already")
        return counts

    def _check_held(self, handles: Sequence[Handle]) -> None:
        for segment, pages in self._by_segment(handles):
            if not (segment.held[pages] > 0).all():
                raise IntegrityError("page handles were destroyed or dropped already")


def _duplicate(fds: Sequence[int]) -> list[int]:
    """New close-on-exec descriptors of the same files, or none at all. Raises EnvironmentFault."""
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
