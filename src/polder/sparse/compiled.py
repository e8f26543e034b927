"""How functions of this package are compiled: without the GIL, kept on disk, and without a module that mypy cannot read.

numba comes with vLLM.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

__all__ = ["compiled"]

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function, compiled when it is first called. Its sums may be in any order."""
    return cast("F", numba.njit(nogil=True, fastmath=True, cache=True)(function))
