"""How functions of this package are compiled: without the GIL, and kept on disk.

numba comes with vLLM. It is imported when the first function is called, since vLLM 0.32 looks through all modules when a
worker starts, and an object of numba's compiler (llvmlite) ends that look with an error.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

__all__ = ["compiled"]

F = TypeVar("F", bound=Callable[..., Any])


def compiled(function: F) -> F:
    """The function, compiled when it is first called; it calls no other one. Its sums may be in any order."""

    @functools.cache
    def machine_code() -> Callable[..., Any]:
        import numba

        return cast("Callable[..., Any]", numba.njit(nogil=True, fastmath=True, cache=True)(function))

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        return machine_code()(*args)

    return cast("F", call)
