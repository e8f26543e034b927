"""What disk I/O needs: aligned memory, files that bypass the page cache, and the interface of the engines that move
pieces between them (`ThreadEngine` in engine.py, `AioEngine` in aio.py)."""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray, UintArray
from polder.errors import ConfigError

__all__ = [
    *("ALIGNMENT_BYTES", "Arena", "DirectFile", "IoEngine", "OpenFile"),
    *("Outcome", "PageFile", "Transfer", "open_page_file"),
]

ALIGNMENT_BYTES = 4096
"""Alignment of addresses, offsets and lengths. Some disks accept 512; all accept this."""

_HUGE_PAGE_BYTES = 2 << 20


class PageFile(Protocol):
    """One disk's slab. The engines use it from several threads at once."""

    alignment_bytes: int
    """Memory addresses must be multiples of this; 1 if every address will do."""

    def preadv(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        """Fills `buffers` from `offset` on; returns the bytes read. Raises OSError."""

    def pwritev(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        """Writes `buffers` at `offset`; returns the bytes written. Raises OSError."""

    def close(self) -> None:
        """Closes the file; no call may be under way."""


OpenFile = Callable[[Path], PageFile]
"""How a store opens a slab: `open_page_file`, or a file that fails or is slow on purpose (polder.emulation). Raises
OSError."""


class DirectFile:
    """A file that is read and written past the page cache where its file system supports it."""

    def __init__(self, fd: int, alignment_bytes: int) -> None:
        self.alignment_bytes = alignment_bytes
        self.fd = fd

    def preadv(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        return os.preadv(self.fd, buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        return os.pwritev(self.fd, buffers, offset)

    def close(self) -> None:
        os.close(self.fd)


def open_page_file(path: Path) -> DirectFile:
    """Opens an existing slab with O_DIRECT, or through the page cache where that is refused. Raises OSError."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        try:
            # Some file systems accept the flag and refuse the read.
            with mmap.mmap(-1, ALIGNMENT_BYTES) as probe:
                os.preadv(fd, [probe], 0)
        except OSError:
            os.close(fd)
            raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return DirectFile(os.open(path, os.O_RDWR | os.O_CLOEXEC), 1)
    return DirectFile(fd, ALIGNMENT_BYTES)


class Arena:
    """Aligned memory for pages, on huge pages where the system has them: disks read into huge pages twice as fast."""

    addresses: IntArray
    """[pages] the address of each page."""

    def __init__(self, pages: int, page_bytes: int) -> None:
        """Raises ConfigError unless `page_bytes` is a multiple of ALIGNMENT_BYTES."""
        if pages < 1 or page_bytes < 1 or page_bytes % ALIGNMENT_BYTES:
            raise ConfigError(f"an arena of {pages} pages of {page_bytes} bytes: write multiples of {ALIGNMENT_BYTES}")
        self.page_bytes = page_bytes
        size = pages * page_bytes
        self._map = mmap.mmap(-1, size + _HUGE_PAGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without huge pages
            self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._map, dtype=np.uint8)
        start = -int(whole.ctypes.data) % _HUGE_PAGE_BYTES
        self.bytes: npt.NDArray[np.uint8] = whole[start : start + size].reshape(pages, page_bytes)
        """[pages, page_bytes] uint8. The memory lives as long as this array or a view of it."""
        self.addresses = int(self.bytes.ctypes.data) + np.arange(pages, dtype=np.int64) * page_bytes


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """n pieces of one disk that are to be read or written. A piece is a page or a part of one."""

    disk: int
    """Number of the disk. Transfers of one disk share its threads."""
    file: PageFile
    piece_bytes: int
    """A multiple of ALIGNMENT_BYTES."""
    offsets: IntArray
    """[n] bytes, multiples of `piece_bytes`."""
    addresses: IntArray
    """[n] the memory address of each piece."""
    memory: IntArray
    """[n] the address that the caller passed for the page that each piece belongs to; `unsettled` reports these."""
    seeds: UintArray
    """[n] seeds of the pieces' checksums."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    errors: npt.NDArray[np.int32]
    """[n] errno; 0 where the whole piece was moved."""
    digests: UintArray
    """[n] the xxh3 checksum of each moved piece, with its seed; undefined where there was an error."""
    seconds: float = 0.0
    """From the start of the batch until this disk had done its part; 0 where the engine cannot tell."""


class IoEngine(Protocol):
    """Moves batches of pieces. Thread-safe. It reports what a disk does wrong and never raises for it."""

    def read(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        """Reads all pieces, from all disks at the same time, in `timeout_s` at most."""

    def write(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        """Writes all pieces, to all disks at the same time, in `timeout_s` at most."""

    def unsettled(self) -> IntArray:
        """Memory that a request which timed out may still read or write: `Transfer.memory` of its pieces, each once."""

    def close(self) -> None: ...
