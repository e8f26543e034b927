"""Which cores a thread that copies runs on."""

from __future__ import annotations

import contextlib
import os

__all__ = ["leave_bound_core", "usable_cores"]


def leave_bound_core() -> None:
    """Lets the calling thread run on all cores that its process or the parent may use.

    vLLM's CPU workers bind their main thread to the first of their cores, and new threads inherit that. A copy there
    would compete with the thread that all other threads of a forward pass wait for, while other cores may be idle. The
    parent is not bound: it may use the cores that the engine was started with (taskset, a cpuset).
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
