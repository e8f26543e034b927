"""What copies and sums cost: GB/s of both directions by the size of a piece, together and alone, pinned or not; sums.

The link's bandwidth says whether loading a block can be faster than computing it (planner/gate.py).
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Callable

import numpy as np
from device import Gpu, HostMemory, mapped, open_gpu
from stage import Stage, main

from polder.memory.copy import CopyEngine  # isort: skip

PIECES = (64 << 10, 256 << 10, 2 << 20)


def stage(stage: Stage) -> None:
    pages = 4 if stage.tiny else 128
    with open_gpu(stage.device) as gpu, mapped(gpu, 2 * pages) as address:
        size = pages * gpu.backend.page_bytes
        gpu.backend.zero(address, 2 * size)
        host = HostMemory(gpu, 2 * size)
        here, there = CopyEngine(gpu.backend), CopyEngine(gpu.backend)
        for pinned in (False, True):
            if pinned:
                begin = time.perf_counter()
                host.pin()
                stage.note("registering touched memory", (time.perf_counter() - begin) * 2**30 / (2 * size), "s a GiB")
            kind = "pinned" if pinned else "pageable"
            for piece in PIECES:
                load = _rate(here, address, host.address, size, piece)
                store = _rate(here, host.address, address, size, piece)
                stage.note(f"to the device, {kind}, pieces of {piece >> 10} KiB", load / 1e9, "GB/s")
                stage.note(f"from the device, {kind}, pieces of {piece >> 10} KiB", store / 1e9, "GB/s")
        both = _both(here, there, address, host.address, size)
        stage.note("both ways together, pinned, pieces of 2048 KiB", both / 1e9, "GB/s")
        device = _rate(here, address + size, address, size, 2 << 20)
        stage.note("within the device, pieces of 2048 KiB", device / 1e9, "GB/s")
        _delay(stage, here, address, host.address)
        host.unpin()
        if stage.device == "cuda":
            _sums(stage, gpu, address)
        _registration(stage, gpu, size, here, address)
        here.close()
        there.close()


def _best(function: Callable[[], None], times: int = 3) -> float:
    """Seconds of the fastest of so many calls, after one that is not counted."""
    function()
    spent = []
    for _ in range(times):
        begin = time.perf_counter()
        function()
        spent.append(time.perf_counter() - begin)
    return min(spent)


def _pieces(address: int, size: int, piece: int) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """Every second piece first: neighbours would be merged into one copy."""
    at = np.arange(address, address + size, piece, dtype=np.uint64)
    return np.concatenate([at[::2], at[1::2]])


def _rate(copies: CopyEngine, dst: int, src: int, size: int, piece: int) -> float:
    """Bytes a second."""
    to, of = _pieces(dst, size, piece), _pieces(src, size, piece)
    return size / _best(lambda: copies.wait(copies.submit(to, of, piece)))


def _both(one: CopyEngine, other: CopyEngine, device: int, host: int, size: int) -> float:
    to, of = _pieces(device, size, 2 << 20), _pieces(host, size, 2 << 20)
    home, away = _pieces(host + size, size, 2 << 20), _pieces(device + size, size, 2 << 20)

    def together() -> None:
        loading, storing = one.submit(to, of, 2 << 20), other.submit(home, away, 2 << 20)
        one.wait(loading)
        other.wait(storing)

    return 2 * size / _best(together)


def _delay(stage: Stage, copies: CopyEngine, device: int, host: int) -> None:
    """Of one block that is loaded and waited for: submission, copy and wake-up."""
    to, of = np.array([device], np.uint64), np.array([host], np.uint64)
    stage.note(
        "one piece of 64 KiB, from submission to the end of the wait",
        _best(lambda: copies.wait(copies.submit(to, of, 64 << 10)), 20) * 1e6,
        "us",
    )
    stage.note("submitting it", _best(lambda: copies.submit(to, of, 64 << 10) and None, 20) * 1e6, "us")
    copies.wait(copies.submit(to, of, 64 << 10))


def _sums(stage: Stage, gpu: Gpu, address: int) -> None:
    """Checksum of a block of an 8B model: 32 layers of 64 KiB."""
    from polder.tiers.movers import CudaMover

    mover = CudaMover(gpu.backend)
    block = [(address + layer * (64 << 10), 64 << 10) for layer in range(32)]
    stage.note("sum of a block of 2 MiB in 32 layers", _best(lambda: mover.checksum(block, 1) and None, 10) * 1e3, "ms")
    stage.check("sums on the device and on the host agree", holds=_agree(mover, block, address, gpu))


def _agree(mover: object, block: list[tuple[int, int]], address: int, gpu: Gpu) -> bool:
    size = sum(size for _, size in block)
    home = np.zeros(size, np.uint8)
    copies = CopyEngine(gpu.backend)
    copies.wait(copies.submit(np.array([home.ctypes.data], np.uint64), np.array([address], np.uint64), size))
    copies.close()
    at = home.ctypes.data
    pieces = [(at + layer * (64 << 10), 64 << 10) for layer in range(len(block))]
    return bool(mover.checksum(block, 7) == mover.checksum_in_host(pieces, 7))  # type: ignore[attr-defined]


def _registration(stage: Stage, gpu: Gpu, size: int, copies: CopyEngine, device: int) -> None:
    """Shared memory as the tiers and the weights have it: a memfd that nobody has touched, and one that is read-only afterwards."""
    file = os.memfd_create("registered")
    os.ftruncate(file, size)
    region = np.frombuffer(mmap.mmap(file, size), np.uint8)
    address = int(region.ctypes.data)
    begin = time.perf_counter()
    gpu.backend.pin(address, size)
    stage.note("registering an untouched memfd", (time.perf_counter() - begin) * 2**30 / size, "s a GiB")
    page = gpu.backend.page_bytes
    region[:page] = 77
    status = ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), mmap.PROT_READ)
    copies.wait(copies.submit(np.array([device], np.uint64), np.array([address], np.uint64), page))
    right = status == 0 and gpu.byte(device, page) == 77
    stage.check("memory that became read-only after it was registered can be copied", holds=right)
    gpu.backend.unpin(address)
    os.close(file)


if __name__ == "__main__":
    sys.exit(main("copies", stage))
