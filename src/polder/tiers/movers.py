"""How a worker copies blocks and computes their checksums: on a CPU and on a GPU."""

from __future__ import annotations

import contextlib
import threading

import numpy as np
import xxhash

from polder.memory import _libc
from polder.memory.addresses import bytes_at, rows_at
from polder.memory.backend import Backend
from polder.memory.copy import CopyEngine
from polder.memory.tensor import tensor_over
from polder.tiers.jobs import Pieces

__all__ = ["CpuMover", "CudaMover", "pair"]

_FACTOR = 0x9E3779B97F4A7C15
"""CudaMover multiplies its sum by this before each further piece."""


def pair(dst: Pieces, src: Pieces) -> tuple[list[int], list[int], list[int]]:
    """Cuts two lists of pieces where either has a border. Returns (destinations, sources, lengths). `dst` may be
    longer."""
    targets, sources, lengths = [], [], []
    to, room, ahead = 0, 0, iter(dst)
    for start, size in src:
        while size:
            if not room:
                to, room = next(ahead)
            part = min(size, room)
            targets.append(to)
            sources.append(start)
            lengths.append(part)
            to, room, start, size = to + part, room - part, start + part, size - part
    return targets, sources, lengths


class CpuMover:
    """Copies with numpy, which releases the GIL, and sums with xxh3.

    The pieces of a block mostly lie at equal distances on both sides, one for each layer, so one call copies them all.
    This matters because the engine's own thread runs beside this one, and each call contends for the GIL.
    """

    def copy(self, dst: Pieces, src: Pieces) -> None:
        to, start, sizes = pair(dst, src)
        first = 0
        while first < len(to):
            last = first + 1
            size = sizes[first]
            if last < len(to):
                steps = to[last] - to[first], start[last] - start[first]
                while (
                    last < len(to)
                    and sizes[last] == size
                    and (to[last] - to[last - 1], start[last] - start[last - 1]) == steps
                ):
                    last += 1
            rows = last - first
            if rows == 1:
                _libc.copy_bytes(to[first], start[first], size)
            else:
                target = rows_at(to[first], (rows, size), steps[0])
                target[:] = rows_at(start[first], (rows, size), steps[1])
            first = last

    def checksum(self, pieces: Pieces, seed: int) -> int:
        digest = xxhash.xxh3_64(seed=seed)
        for address, size in pieces:
            digest.update(bytes_at(address, size))
        return digest.intdigest()

    checksum_in_host = checksum


class CudaMover:
    """Copies in the copy engine's stream, and computes checksums on the device, because fetching the bytes to hash them
    would cost more than computing the block again. The checksum is not xxh3: it is the sum of the words times odd
    numbers, modulo 2^64, so every bit and its place count.

    Each thread computes checksums in a stream of its own. The default would be the legacy stream: there the checksum
    would wait for the engine's steps if the engine computes in that stream, and be ordered with nothing otherwise.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._copies = CopyEngine(backend)
        self._streams = threading.local()

    def copy(self, dst: Pieces, src: Pieces) -> None:
        to, start, sizes = pair(dst, src)
        addresses = np.array(to, dtype=np.uint64), np.array(start, dtype=np.uint64)
        self._copies.wait(self._copies.submit(*addresses, np.array(sizes, dtype=np.int64)))

    def checksum(self, pieces: Pieces, seed: int) -> int:
        import torch

        with self._stream():
            total = torch.tensor(_signed(seed), dtype=torch.int64, device=self._backend.device)
            for address, size in pieces:
                words = tensor_over(address, size, self._backend.device, None).view(torch.int64)
                weights = torch.arange(1, 2 * len(words), 2, dtype=torch.int64, device=words.device)
                total = total * _signed(_FACTOR) + (words * weights).sum()
            return int(total) & (2**64 - 1)

    def _stream(self) -> contextlib.AbstractContextManager[object]:
        """A context in which torch launches kernels in this thread's own stream."""
        import torch

        if not self._backend.device.startswith("cuda"):
            return contextlib.nullcontext()
        if not hasattr(self._streams, "own"):
            self._streams.own = torch.cuda.Stream(self._backend.device)
        own: contextlib.AbstractContextManager[object] = torch.cuda.stream(self._streams.own)
        return own

    def checksum_in_host(self, pieces: Pieces, seed: int) -> int:
        total = seed
        for address, size in pieces:
            words = np.frombuffer(bytes_at(address, size), dtype=np.uint64)
            weights = np.arange(1, 2 * len(words), 2, dtype=np.uint64)
            total = (total * _FACTOR + int((words * weights).sum(dtype=np.uint64))) & (2**64 - 1)
        return total


def _signed(word: int) -> int:
    """The signed 64-bit integer with the same bits as the unsigned `word`."""
    return word - (word >> 63 << 64)
