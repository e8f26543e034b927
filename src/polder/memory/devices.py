"""From a device's name to its backend."""

from __future__ import annotations

from polder.memory.backend import Backend
from polder.memory.cpu import CpuBackend

__all__ = ["device_uuid", "open_backend"]


def open_backend(device: str, page_bytes: int) -> Backend:
    """The backend of "cpu:0", "host:0" or "cuda:INDEX". Raises ConfigError for an impossible page size."""
    kind, _, index = device.partition(":")
    if kind in ("cpu", "host"):
        return CpuBackend(page_bytes=page_bytes, device=device)
    from polder.memory.cuda import CudaBackend  # only hosts with a driver have the bindings

    return CudaBackend(int(index), page_bytes=page_bytes)


def device_uuid(device: str) -> str:
    """The UUID of a GPU as 32 hexadecimal digits, the same in all processes whatever their CUDA_VISIBLE_DEVICES.

    Empty for other devices, and when the driver does not report it.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return ""
    try:
        from cuda.bindings import driver

        driver.cuInit(0)
        _, number = driver.cuDeviceGet(int(index))
        status, uuid = driver.cuDeviceGetUuid(number)
        return bytes(uuid.bytes).hex() if int(status) == 0 else ""
    except Exception:  # the bindings' own: no library, or one without this call
        return ""
