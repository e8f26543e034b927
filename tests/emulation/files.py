"""The file of one emulated disk, call by call, for faults that only real threads meet."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from polder.diskstore.io import OpenFile, PageFile, open_page_file
from polder.emulation.disks import EmulatedDisk


class EmulatedFile:
    """A file on an emulated disk. Every call is one request, and the calling thread waits for it."""

    def __init__(self, inner: PageFile, disk: EmulatedDisk) -> None:
        self.alignment_bytes = inner.alignment_bytes
        self._inner, self._disk = inner, disk

    def preadv(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        self._request(buffers)
        return self._inner.preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        if self._disk.refusal:
            raise OSError(self._disk.refusal, os.strerror(self._disk.refusal))
        self._request(buffers)
        return self._inner.pwritev(buffers, offset)

    def close(self) -> None:
        self._inner.close()

    def _request(self, buffers: Sequence[memoryview]) -> None:
        size = np.array([sum(len(buffer) for buffer in buffers)], dtype=np.int64)
        done, errors = self._disk.serve(size, self._disk.clock.now())
        if np.isinf(done[0]):
            self._disk.wait()  # as in the kernel: it goes on when the disk does, however late that is
        else:
            self._disk.clock.sleep_until(float(done[0]))
        if errors[0]:
            raise OSError(int(errors[0]), os.strerror(int(errors[0])))


def emulated_files(disks: Mapping[Path, EmulatedDisk]) -> OpenFile:
    """An `open_file` for DiskStore: slabs in these directories lie on these disks, others are real files."""

    def open_file(path: Path) -> PageFile:
        inner = open_page_file(path)
        return EmulatedFile(inner, disks[path.parent]) if path.parent in disks else inner

    return open_file
