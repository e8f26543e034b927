"""Which cores a thread that copies runs on."""

from __future__ import annotations

import contextlib
import os

__all__ = ["leave_bound_core", "usable_cores"]


def leave_bound_core() -> None:
    """The calling thread may use all cores that its process or the parent may.

    vLLM's CPU workers bind their main thread to the first of their cores, and threads inherit that. A copy there takes turns with
    the one thread that all others of a pass wait for, while a core beside it may be idle. The parent was not bound; what it may
    use is what the engine was started with (taskset, a cpuset).
    """
    with contextlib.suppress(OSError):  # a core went offline meanwhile
        os.sched_setaffinity(0, usable_cores())


def usable_cores() -> set[int]:
    """The cores of the calling thread, of its process's main thread and of the parent."""
    cores = os.sched_getaffinity(0)
    for process in (os.getpid(), os.getppid()):
        with contextlib.suppress(OSError):
            cores |= os.sched_getaffinity(process)
    return cores
