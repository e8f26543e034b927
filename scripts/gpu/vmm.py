"""What virtual memory management costs: create, export, import, map, access, unmap, zero; and whether map and unmap wait for work.

Runs of 1 to 512 adjacent pages, on an idle device and while a kernel runs that touches none of them.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from device import Gpu, open_gpu
from stage import Stage, main

BUSY_S = 0.5


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Microseconds, and what came back."""
    begin = time.perf_counter()
    found = function()
    return (time.perf_counter() - begin) * 1e6, found


def stage(stage: Stage) -> None:
    pages = 16 if stage.tiny else 512
    with open_gpu(stage.device) as gpu:
        backend = gpu.backend
        us, handles = timed(lambda: backend.create(pages))
        stage.note("create", us / pages, "us a page")
        us, exported = timed(lambda: backend.export_many(handles))
        stage.note("export", us / pages, "us a page")
        fds, numbers, offsets = exported
        try:
            _import_here(stage, gpu, fds, numbers, offsets)
            _import_elsewhere(stage, gpu, handles, fds)
        finally:
            for fd in fds:
                os.close(fd)
        address = backend.reserve(pages * backend.page_bytes)
        for busy in (False, True):
            for run in (r for r in (1, 8, 64, 512) if r <= pages):
                _runs(stage, gpu, address, handles, run, busy=busy)
        backend.map(address, handles)
        us, _ = timed(lambda: backend.zero(address, pages * backend.page_bytes))
        stage.note("zero", us / pages, "us a page, one call")
        backend.unmap(address, pages)
        backend.free(address, pages * backend.page_bytes)
        us, _ = timed(lambda: backend.destroy(handles))
        stage.note("destroy", us / pages, "us a page")


def _runs(stage: Stage, gpu: Gpu, address: int, handles: list[Any], run: int, *, busy: bool) -> None:
    """Maps and unmaps all pages in runs; each driver call is timed by itself."""
    driver, size = gpu.backend.driver, gpu.backend.page_bytes
    spent = {"map": 0.0, "access": 0.0, "unmap": 0.0}
    under_way = {"map and access": False, "unmap": False}
    with _work(gpu) if busy else contextlib.nullcontext() as mark:
        for first in range(0, len(handles), run):
            at = address + first * size
            for i in range(run):
                spent["map"] += timed(
                    lambda at=at + i * size, h=handles[first + i]: driver.call("cuMemMap", at, size, 0, h.key, 0)
                )[0]
            spent["access"] += timed(
                lambda at=at: driver.call("cuMemSetAccess", at, run * size, [gpu.backend._access], 1)
            )[0]
        under_way["map and access"] = mark is not None and not mark.done()
        for first in range(0, len(handles), run):
            at = address + first * size
            spent["unmap"] += timed(lambda at=at: driver.call("cuMemUnmap", at, run * size))[0]
        under_way["unmap"] = mark is not None and not mark.done()
    for name, us in spent.items():
        stage.note(f"{name}, runs of {run}, {'busy' if busy else 'idle'}", us / len(handles), "us a page")
    if busy:
        for name, still in under_way.items():
            stage.note(f"a kernel elsewhere still ran after {name}, runs of {run}", still)


@contextlib.contextmanager
def _work(gpu: Gpu) -> Iterator[Any]:
    mark = gpu.busy(BUSY_S)
    yield mark
    mark.wait()


def _import_here(stage: Stage, gpu: Gpu, fds: list[int], numbers: list[int], offsets: list[int]) -> None:
    """In the process that exported them: what a broker within an engine would do."""
    try:
        us, adopted = timed(lambda: gpu.backend.adopt_many(fds, numbers, offsets))
    except Exception as error:
        stage.note("import in the exporting process", f"refused: {error}")
        return
    stage.note("import in the exporting process", us / len(fds), "us a page")
    gpu.backend.drop(adopted)


def _import_elsewhere(stage: Stage, gpu: Gpu, handles: list[Any], fds: list[int]) -> None:
    """Another process maps the pages and writes; this one sees the bytes. It is then killed at work: are its kernels over when
    the kernel says that it has ended?"""
    size = gpu.backend.page_bytes
    here, there = socket.socketpair()
    few = fds[:8]
    command = [sys.executable, str(Path(__file__)), "--child", str(there.fileno()), stage.device]
    with subprocess.Popen(command, pass_fds=(there.fileno(),)) as child:
        there.close()
        socket.send_fds(here, [b"x"], few)
        here.settimeout(60.0)
        stage.note("import in another process", float(here.recv(64).decode()), "us a page, the first included")
        address = gpu.backend.reserve(len(few) * size)
        gpu.backend.map(address, handles[: len(few)])
        stage.check("bytes of another process arrive", holds=gpu.byte(address, size) == 42)
        here.send(b"work")  # it now writes 43 for two seconds
        here.recv(1)
        pidfd = os.pidfd_open(child.pid)
        child.kill()
        select.select([pidfd], [], [], 30.0)
        os.close(pidfd)
        gpu.backend.zero(address, size)
        time.sleep(0.2 if stage.tiny else 2.5)
        late = gpu.byte(address, size)
        stage.check("a killed process writes nothing after its pidfd has fired", holds=late == 0, detail=late)
        gpu.backend.unmap(address, len(few))
        gpu.backend.free(address, len(few) * size)
    here.close()


def child(descriptor: int, device: str) -> None:
    """Adopts the pages that come by the socket, writes into the first, and then works on it until it is killed."""
    line = socket.socket(fileno=descriptor)
    _, fds, _, _ = socket.recv_fds(line, 1, 64)
    with open_gpu(device) as gpu:
        size = gpu.backend.page_bytes
        us, handles = timed(lambda: gpu.backend.adopt_many(fds, list(range(len(fds))), [0] * len(fds)))
        address = gpu.backend.reserve(len(handles) * size)
        gpu.backend.map(address, handles)
        gpu.fill(address, size, 42)
        gpu.synchronize()
        line.send(str(us / len(fds)).encode())
        line.recv(16)
        for _ in range(20):
            gpu.fill(address, size, 43, after_s=0.1)
        line.send(b"x")
        gpu.synchronize()


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] == "--child":
        child(int(sys.argv[2]), sys.argv[3])
    else:
        sys.exit(main("vmm", stage))
