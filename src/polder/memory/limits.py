"""Limits of the process that shared memory meets."""

from __future__ import annotations

import contextlib
import resource

__all__ = ["raise_open_files"]


def raise_open_files() -> int:
    """Raises the number of files that this process may have open as far as the system allows it; returns it.

    On CUDA each page is a descriptor while it is handed over, and the usual limit of 1024 is less than what four ranks
    fetch at the same time. Nothing here may use select(), which knows no descriptor above 1023.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        # Not an infinite one: some programs close every descriptor up to the limit when they start a child.
        wanted = hard if hard != resource.RLIM_INFINITY else max(soft, 1 << 16)
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, 1 << 16)), hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
