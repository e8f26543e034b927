"""Names for the array types that this project uses, and a generator of well mixed 64-bit words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

__all__ = ["BoolArray", "ErrorArray", "FloatArray", "IntArray", "UintArray", "splitmix64"]

BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
UintArray = npt.NDArray[np.uint64]
ErrorArray = npt.NDArray[np.int32]
"""errno values, 0 for success."""


def splitmix64(words: UintArray) -> UintArray:
    """A hash of each 64-bit word (Steele et al., OOPSLA 2014): the same on every machine, unlike Python's `hash`."""
    z = words + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UintArray = z ^ (z >> np.uint64(31))
    return mixed
