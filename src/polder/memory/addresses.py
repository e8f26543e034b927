"""Bytes at an address of this process, as views that Python and numpy can read and write.

The views are cut from one array over the whole user address space, which is cheaper than to make a ctypes array for
each view.
"""

from __future__ import annotations

import ctypes

import numpy as np
import numpy.typing as npt

__all__ = ["bytes_at", "rows_at"]

_LOWEST = 1 << 12
_ALL = memoryview((ctypes.c_ubyte * ((1 << 47) - 2 * _LOWEST)).from_address(_LOWEST)).cast("B")


def bytes_at(address: int, size_bytes: int) -> memoryview:
    """A writable view. The memory must be mapped whenever the view is used."""
    start = address - _LOWEST
    return _ALL[start : start + size_bytes]


def rows_at(address: int, shape: tuple[int, int], stride_bytes: int) -> npt.NDArray[np.uint8]:
    """[rows, bytes] a writable array whose rows begin `stride_bytes` apart."""
    rows: npt.NDArray[np.uint8] = np.ndarray(shape, np.uint8, _ALL, address - _LOWEST, (stride_bytes, 1))
    return rows
