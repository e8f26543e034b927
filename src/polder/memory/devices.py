"""From a device's name to its backend."""

from __future__ import annotations

from polder.memory.backend import Backend
from polder.memory.cpu import CpuBackend

__all__ = ["open_backend"]


def open_backend(device: str, page_bytes: int) -> Backend:
    """The backend of "cpu:0", "host:0" or "cuda:INDEX". Raises ConfigError for a page size that the device cannot have."""
    kind, _, index = device.partition(":")
    if kind in ("cpu", "host"):
        return CpuBackend(page_bytes=page_bytes, device=device)
    from polder.memory.cuda import CudaBackend  # only hosts with a driver have the bindings

    return CudaBackend(int(index), page_bytes=page_bytes)
