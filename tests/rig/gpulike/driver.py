"""Polder's CUDA backend on a CPU, over the driver of tests/fixtures/fakecuda.

That driver maps memory of this machine, so vLLM's CPU tensors can lie over it, and carries copies out in streams of its own. The
variable FAKECUDA_LIBRARY names the built library; its own variables (fakecuda/fake.h) say how large its device is, how late its
work, and what its calls cost. FAKECUDA_GRANULARITY is the smallest page in bytes.

The broker and the workers of a fleet must both be told: `serve_broker` is for the broker's process, gpulike/driven.py for workers.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

__all__ = ["library", "open_backends", "serve_broker"]


@functools.cache
def library() -> ctypes.CDLL:
    """The driver, under its own name and for all to see: cuda-bindings, which looks for libcuda.so.1, finds it."""
    loaded = ctypes.CDLL(os.environ["FAKECUDA_LIBRARY"], mode=ctypes.RTLD_GLOBAL)
    loaded.fakecuda_calls.restype = ctypes.c_long
    loaded.fakecuda_violations.restype = ctypes.c_long
    loaded.fakecuda_violation.restype = ctypes.c_char_p
    return loaded


def open_backends(modules: list[ModuleType], compute_stream: Callable[[int], int]) -> None:
    """From now on these modules get a CudaBackend where they open a backend of the CPU. Tensors over it are on the CPU."""
    library()
    from polder.memory.cuda import CudaBackend
    from polder.memory.devices import open_backend as stock

    def open_backend(device: str, page_bytes: int) -> Any:
        if not device.startswith("cpu"):
            return stock(device, page_bytes)
        backend = CudaBackend(0, page_bytes=page_bytes, compute_stream=compute_stream)
        backend.device = device
        return backend

    for module in modules:
        module.open_backend = open_backend  # type: ignore[attr-defined]


def serve_broker(**config: Any) -> None:
    """polder.broker.server.serve, with pages of the fake driver where there is one (`config`: of BrokerConfig)."""
    import polder.broker.device_pages as device_pages
    from polder.broker.config import BrokerConfig
    from polder.broker.server import serve

    if os.environ.get("FAKECUDA_LIBRARY"):
        open_backends([device_pages], lambda _: 0)
    serve(BrokerConfig(**config))
