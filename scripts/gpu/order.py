"""Order on the device: copies, compute, unmapping and replays of graphs find each other's bytes, and only wait where they must.

Each check has a control without the wait. Where the control finds the right bytes as well, the check shows nothing on this device.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from device import Gpu, HostMemory, mapped, open_gpu
from stage import Stage, main

from polder.errors import EnvironmentFault  # isort: skip
from polder.memory.backend import Mark  # isort: skip
from polder.memory.copy import CopyEngine  # isort: skip
from polder.memory.cuda_stream import StreamMark  # isort: skip


def stage(stage: Stage) -> None:
    rounds = 5 if stage.tiny else 50
    delay_s = 0.002 if stage.tiny else 0.005
    with open_gpu(stage.device) as gpu:
        copies = CopyEngine(gpu.backend)
        with mapped(gpu, 2) as address:
            _copy_after_compute(stage, gpu, copies, address, rounds, delay_s)
            _compute_after_copy(stage, gpu, copies, address, rounds)
            _fence_and_copies(stage, gpu, copies, address)
        _unmap_after_fence(stage, gpu, rounds, delay_s)
        if stage.device == "cuda":
            _replay(stage, gpu, rounds)
        else:
            stage.say("graphs: only on a GPU")
        copies.close()


def _submit(copies: CopyEngine, dst: int, src: int, size: int, after: Mark | None) -> int:
    return copies.submit(np.array([dst], np.uint64), np.array([src], np.uint64), size, after)


def _copy_after_compute(stage: Stage, gpu: Gpu, copies: CopyEngine, address: int, rounds: int, delay_s: float) -> None:
    """Stores of tiers: what the last step wrote leaves for the host."""
    size = gpu.backend.page_bytes
    host = HostMemory(gpu, size)
    host.pin()

    def right(value: int, *, with_mark: bool) -> bool:
        gpu.fill(address, size, value, after_s=delay_s)
        copies.wait(_submit(copies, host.address, address, size, gpu.backend.mark() if with_mark else None))
        gpu.synchronize()
        return bool((host.bytes == value).all())

    found = sum(right(1 + at % 250, with_mark=True) for at in range(rounds))
    stage.check("a copy after a mark has what was computed", holds=found == rounds, detail=f"{found} of {rounds}")
    if stage.device == "cuda":  # the fake driver counts that as a mistake of ours
        found = sum(right(1 + at % 250, with_mark=False) for at in range(rounds))
        stage.note("control without the mark: right by chance", f"{found} of {rounds}")
    host.unpin()


def _compute_after_copy(stage: Stage, gpu: Gpu, copies: CopyEngine, address: int, rounds: int) -> None:
    """Weights that stream in: compute is held until the layer is there, and the host is not."""
    size = gpu.backend.page_bytes
    host, found, waited = HostMemory(gpu, size), 0, 0.0
    host.pin()
    for at in range(rounds):
        host.bytes[:] = 1 + at % 250
        gpu.backend.zero(address, size)
        ticket = _submit(copies, address, host.address, size, gpu.busy(0.005))
        begin = time.perf_counter()
        copies.hold(ticket)
        waited = max(waited, time.perf_counter() - begin)
        gpu.fill(address + size, size, 9)  # compute behind the copy
        gpu.backend.fence()
        found += copies.done(ticket) and gpu.byte(address, size) == 1 + at % 250
        copies.wait(ticket)
    host.unpin()
    stage.check("compute that is held for a copy comes after it", holds=found == rounds, detail=f"{found} of {rounds}")
    stage.note("longest time that holding stopped the host", waited * 1e3, "ms")


def _fence_and_copies(stage: Stage, gpu: Gpu, copies: CopyEngine, address: int) -> None:
    """A fence waits for compute only: streaming overlaps because of that."""
    size = gpu.backend.page_bytes
    host = HostMemory(gpu, size)
    host.pin()
    gpu.synchronize()
    tickets = [_submit(copies, host.address, address, size, None) for _ in range(20 if stage.tiny else 500)]
    begin = time.perf_counter()
    gpu.backend.fence()
    stage.note("a fence while copies are under way", (time.perf_counter() - begin) * 1e3, "ms")
    stage.note("it returned before they were over", not copies.done(tickets[-1]))
    begin = time.perf_counter()
    copies.wait(tickets[-1])
    stage.note("they took longer by", (time.perf_counter() - begin) * 1e3, "ms")
    host.unpin()


def _unmap_after_fence(stage: Stage, gpu: Gpu, rounds: int, delay_s: float) -> None:
    """A block's page goes, another comes under the same address: compute never meets a hole, and finds the new page's bytes."""
    backend, size = gpu.backend, gpu.backend.page_bytes
    pages, address = backend.create(2), backend.reserve(2 * size)
    found = 0
    backend.map(address + size, [pages[1]])
    for at in range(rounds):
        backend.map(address, [pages[0]])
        gpu.fill(address, size, 1 + at % 250, after_s=delay_s)
        backend.fence()
        backend.unmap(address, 1)
        gpu.fill(address + size, size, 3)  # other pages stay in use
        backend.map(address, [pages[0]])
        found += gpu.byte(address, size) == 1 + at % 250
        backend.unmap(address, 1)
    gpu.synchronize()
    stage.check("pages come and go between kernels", holds=found == rounds, detail=f"{found} of {rounds}")
    backend.unmap(address + size, 1)
    backend.destroy(pages)
    backend.free(address, 2 * size)


def _replay(stage: Stage, gpu: Any, rounds: int) -> None:
    """A graph captured over addresses: its replays use whatever page is mapped there now."""
    import torch

    backend, size = gpu.backend, gpu.backend.page_bytes
    pages, address = backend.create(2), backend.reserve(2 * size)
    backend.map(address, pages)
    kv = gpu.tensor(address, size)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    gpu.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        kv.add_(1)
        refused = _raises(lambda: StreamMark(backend.driver, int(stream.cuda_stream)))
    stage.check("no mark while a graph is captured", holds=refused)
    backend.zero(address, 2 * size)
    found = 0
    for at in range(rounds):
        now = pages[at % 2]
        gpu.synchronize()
        backend.unmap(address, 1)
        backend.map(address, [now])
        with torch.cuda.stream(gpu._stream):
            graph.replay()
        found += gpu.byte(address, size) == (at // 2 + 1) % 256
    gpu.synchronize()
    stage.check("replays use the page that is mapped", holds=found == rounds, detail=f"{found} of {rounds}")
    copies = CopyEngine(backend)
    home, late = np.full(size, 5, np.uint8), 0
    for _ in range(rounds):
        backend.zero(address, size)
        ticket = _submit(copies, address, home.ctypes.data, size, gpu.busy(0.003))
        copies.hold(ticket)  # what a wait before the replay does
        with torch.cuda.stream(gpu._stream):
            graph.replay()
        late += gpu.byte(address, size) != 6
        copies.wait(ticket)
    stage.check(
        "a replay that is held for a copy comes after it", holds=late == 0, detail=f"{late} of {rounds} too early"
    )
    copies.close()
    backend.unmap(address, 2)
    backend.destroy(pages)
    backend.free(address, 2 * size)


def _raises(function: Callable[[], object]) -> bool:
    try:
        function()
    except EnvironmentFault:
        return True
    return False


if __name__ == "__main__":
    sys.exit(main("order", stage))
