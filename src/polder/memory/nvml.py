"""Memory of a GPU, from NVIDIA's management library. The driver's cuMemGetInfo would need a context, which takes
half a GiB of each device."""

from __future__ import annotations

import ctypes
import functools
import uuid as uuids

__all__ = ["free_bytes", "memory"]


class _Memory(ctypes.Structure):
    """nvmlMemory_t."""

    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        return library if library.nvmlInit_v2() == 0 else None
    except (OSError, AttributeError):
        return None


def free_bytes(uuid: bytes) -> int | None:
    """Free bytes of the device with this UUID, see `memory`."""
    found = memory(uuid)
    return None if found is None else found[1]


def memory(uuid: bytes) -> tuple[int, int] | None:
    """(total, free) bytes of the device with this UUID (16 bytes, cuDeviceGetUuid). None without the library, or when
    it does not know the device."""
    library = _library()
    if library is None:
        return None
    device, found = ctypes.c_void_p(), _Memory()
    for kind in ("GPU", "MIG"):
        name = f"{kind}-{uuids.UUID(bytes=uuid)}".encode()
        if (
            library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(device)) == 0
            and library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(found)) == 0
        ):
            return int(found.total), int(found.free)
    return None
