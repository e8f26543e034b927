"""Shared memory segments of given processes, and of nobody else."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

__all__ = ["segments_of"]

SHARED_MEMORY = "/dev/shm/"


def segments_of(pids: Iterable[int]) -> set[Path]:
    """Files in /dev/shm that these processes have open or mapped. Processes that have ended have none."""
    names: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                names.add(line.split(maxsplit=5)[-1])  # address, access, offset, device, inode, path
            for descriptor in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    names.add(os.readlink(f"/proc/{pid}/fd/{descriptor}"))
    return {Path(name) for name in names if name.startswith(SHARED_MEMORY) and Path(name).exists()}
