"""Torch tensors over addresses that Polder manages.

The tensor is passed to torch as a DLPack capsule, which names the device. Torch does not ask the driver about the
addresses, so they need not be mapped. An access to an unmapped part faults.

The capsule is built with ctypes after DLPack's C structure (dlpack.h, DLManagedTensor, version 0.x), which
`torch.utils.dlpack.from_dlpack` has accepted since 1.x.
"""

from __future__ import annotations

import atexit
import ctypes
from typing import TYPE_CHECKING

from polder.errors import ConfigError, EnvironmentFault

if TYPE_CHECKING:
    import torch

__all__ = ["live_tensors", "tensor_over"]

_DEVICE_TYPE = {"cpu": 1, "cuda": 2}  # kDLCPU, kDLCUDA
_INT = 0  # kDLInt


class _ManagedTensor(ctypes.Structure):
    """DLManagedTensor with its DLTensor, DLDevice and DLDataType laid out flat."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("dtype_code", ctypes.c_uint8),
        ("dtype_bits", ctypes.c_uint8),
        ("dtype_lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("manager_ctx", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


_alive: dict[int, tuple[_ManagedTensor, object, object]] = {}
"""Address of the structure -> (structure, its shape, the owner of the memory), kept until torch drops its last view."""

_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
_CAPSULE_NAME = b"dltensor"  # the capsule keeps the pointer only


def _forget(managed: int) -> None:
    """Called by torch, in any thread, when the last tensor over the memory has died. ctypes takes the GIL for it."""
    _alive.pop(managed, None)


_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_forget)


def tensor_over(address: int, size_bytes: int, device: str, owner: object) -> torch.Tensor:
    """A flat int8 tensor of `size_bytes` bytes at `address`, without a copy.

    `device` ("cpu:0", "cuda:1") is not checked against the address. `owner` must keep the addresses reserved; it is
    kept alive until the tensor and all views of it are gone, and released in the thread where the last one died.

    Raises ConfigError for a device that is neither cpu nor cuda, EnvironmentFault for cuda when torch was built
    without.
    """
    kind, _, index = device.partition(":")
    if kind not in _DEVICE_TYPE:
        raise ConfigError(f"device {device!r}: write cpu:0 or cuda:INDEX")
    import torch
    from torch.utils.dlpack import from_dlpack

    if kind == "cuda" and not torch.backends.cuda.is_built():
        raise EnvironmentFault(f"torch {torch.__version__} has no CUDA, needed for tensors on {device}")
    shape = (ctypes.c_int64 * 1)(size_bytes)
    managed = _ManagedTensor(
        data=address,
        device_type=_DEVICE_TYPE[kind],
        device_id=int(index or 0),
        ndim=1,
        dtype_code=_INT,
        dtype_bits=8,
        dtype_lanes=1,
        shape=shape,
        deleter=ctypes.cast(_deleter, ctypes.c_void_p).value,
    )
    key = ctypes.addressof(managed)
    _alive[key] = (managed, shape, owner)
    try:
        return from_dlpack(_new_capsule(key, _CAPSULE_NAME, None))
    except BaseException:
        _alive.pop(key, None)
        raise


def live_tensors() -> int:
    """How many memories handed to torch it still has views of. For tests."""
    return len(_alive)


@atexit.register
def _disarm() -> None:
    """Tensors in global variables may die after the interpreter, when a Python deleter would crash: take it from them.

    The structures must outlive the interpreter too, hence a reference that is never given back.
    """
    for managed, shape, _ in list(_alive.values()):
        managed.deleter = None
        for kept in (managed, shape):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
