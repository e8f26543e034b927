"""The system calls of virtual memory that Python's mmap module does not offer: fixed addresses, holes, populating."""

from __future__ import annotations

import ctypes
import errno
import os

from polder.errors import EnvironmentFault, OutOfPages

__all__ = [
    "copy_bytes",
    "make_read_only",
    "map_file",
    "map_nothing",
    "punch_hole",
    "reserve",
    "unreserve",
    "zero_bytes",
]

# <linux/mman.h>, <linux/falloc.h>; the same numbers on x86-64 and arm64.
_PROT_NONE, _PROT_READ, _PROT_RW = 0, 1, 3
_MAP_SHARED, _MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x01, 0x02, 0x10, 0x20, 0x4000
_MADV_HUGEPAGE, _MADV_POPULATE_READ = 14, 22
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_FAILED = ctypes.c_void_p(-1).value

# CDLL functions release the GIL for the duration of the call.
_c = ctypes.CDLL(None, use_errno=True)
_c.mmap.restype = ctypes.c_void_p
_c.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_int64)
_c.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_c.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_c.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_c.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_c.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)
_c.memset.restype = ctypes.c_void_p
_c.memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_c.memmove.restype = ctypes.c_void_p


def reserve(size_bytes: int, alignment: int) -> int:
    """Addresses without memory, any access to which faults. Raises OutOfPages."""
    start = _mmap(None, size_bytes + alignment, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE, -1, 0)
    address = -(-start // alignment) * alignment
    unreserve(start, address - start)
    unreserve(address + size_bytes, start + alignment - address)
    return address


def unreserve(address: int, size_bytes: int) -> None:
    if size_bytes and _c.munmap(address, size_bytes) != 0:
        raise _error(f"munmap of {size_bytes} bytes at {address:#x}")


def map_file(address: int, size_bytes: int, fd: int, offset: int) -> None:
    """Maps a piece of a file, shared and writable, over reserved addresses and populates it. Raises OutOfPages."""
    _mmap(address, size_bytes, _PROT_RW, _MAP_SHARED | _MAP_FIXED, fd, offset)
    # Only advice: with `advise` in transparent_hugepage/shmem_enabled, mapping and unmapping are ten times faster.
    _c.madvise(address, size_bytes, _MADV_HUGEPAGE)
    # Not MAP_POPULATE, which takes as long and does not report a lack of memory: the first access would then be a SIGBUS.
    # EINVAL: Linux before 5.14. There pages are populated at the first access.
    if _c.madvise(address, size_bytes, _MADV_POPULATE_READ) != 0 and ctypes.get_errno() != errno.EINVAL:
        raise _error(f"populating {size_bytes} bytes")


def map_nothing(address: int, size_bytes: int) -> None:
    """Back to addresses without memory."""
    _mmap(address, size_bytes, _PROT_NONE, _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED, -1, 0)


def make_read_only(address: int, size_bytes: int) -> None:
    """Mapped memory, whole pages of the system."""
    if _c.mprotect(address, size_bytes, _PROT_READ) != 0:
        raise _error(f"mprotect of {size_bytes} bytes")


def punch_hole(fd: int, offset: int, size_bytes: int) -> None:
    """Returns a piece of a memory file to the system; it reads as zeroes afterwards."""
    if _c.fallocate(fd, _KEEP_SIZE | _PUNCH_HOLE, offset, size_bytes) != 0:
        raise _error(f"punching a hole of {size_bytes} bytes")


def zero_bytes(address: int, size_bytes: int) -> None:
    _c.memset(address, 0, size_bytes)


def copy_bytes(dst: int, src: int, size_bytes: int) -> None:
    _c.memmove(dst, src, size_bytes)


def _mmap(address: int | None, size_bytes: int, protection: int, flags: int, fd: int, offset: int) -> int:
    result = _c.mmap(address, size_bytes, protection, flags, fd, offset)
    if result is None or result == _FAILED:
        raise _error(f"mmap of {size_bytes} bytes")
    return int(result)


def _error(what: str) -> EnvironmentFault:
    code = ctypes.get_errno()
    text = f"{what}: {errno.errorcode.get(code, code)}, {os.strerror(code)}"
    if code == errno.ENOMEM:
        # ENOMEM has two causes, and the second is common: each run of adjacent pages is one mapping.
        return OutOfPages(f"{text} (too little memory, or more mappings than vm.max_map_count)")
    return EnvironmentFault(text)
