"""The device thread of gpulike/late.py as a stream of the fake driver: a write gets there when that stream carries it out.

So Polder's copies, marks and unmapping meet compute on the same device, and the driver finds what is not ordered, by the ranges
that each layer reads and writes. What this process itself must know before it computes (bytes that a copy brings) it waits for
without telling the driver, which would take such a wait for an order that a GPU has not.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable
from typing import Any

from gpulike import driver, late

__all__ = ["DrivenDevice", "install"]

_CALL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_Range = tuple[int, int, int]
"""(written from, read from, bytes); 0: not."""


class DrivenDevice(late.Device):
    """late.Device, with a stream in place of the thread."""

    def __init__(self) -> None:
        from polder.memory.cuda import Driver

        self._library = driver.library()
        self._changed = threading.Condition()
        self.launched = self._done = self._wanted = self.violations = 0
        self._step_begins = True
        own = Driver(0)
        with own.current():
            self.stream = int(own.call("cuStreamCreate", own.api.CUstream_flags.CU_STREAM_NON_BLOCKING))
        self._library.fakecuda_call.argtypes = (
            *(ctypes.c_void_p, _CALL, ctypes.c_void_p, ctypes.c_long, ctypes.c_size_t),
            *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
        )
        self._calls: dict[int, Any] = {}  # number -> function that the driver will call
        self._over: list[int] = []
        self._numbers = itertools.count()

    def launch(self, layer: late.Layer) -> None:
        def carry_out() -> None:
            violations = late.carry_out(layer)
            with self._changed:
                self.violations += violations
                self._done += 1
                self._changed.notify_all()

        self.launched += 1
        ranges = [(0, address, size) for address, size, _ in layer.read]
        ranges += [(write.address, 0, len(write.before)) for write in layer.writes]
        self.call(carry_out, ranges)

    def read(self, ranges: list[tuple[int, int]]) -> None:
        """A kernel that reads memory, (address, bytes) each."""
        self.call(lambda: None, [(0, address, size) for address, size in ranges])

    def reach(self) -> None:
        """Returns when the stream has come to where it is now. The driver does not learn of it."""
        reached = threading.Event()
        self.call(reached.set, [])
        reached.wait()

    def call(self, work: Callable[[], Any], ranges: list[_Range]) -> None:
        number = next(self._numbers)

        def carry_out(_: object) -> None:
            work()
            self._over.append(number)

        while self._over:  # not in the call itself: it would free what it runs in
            del self._calls[self._over.pop()]
        function = self._calls[number] = _CALL(carry_out)
        count = len(ranges)
        written, read, sizes = (ctypes.c_uint64 * count)(), (ctypes.c_uint64 * count)(), (ctypes.c_size_t * count)()
        for at, (dst, src, size) in enumerate(ranges):
            written[at], read[at], sizes[at] = dst, src, size
        status = self._library.fakecuda_call(self.stream, function, None, 0, count, written, read, sizes)
        if status:
            raise RuntimeError(f"the fake driver refuses a launch: {status}")

    def figures(self) -> dict[str, Any]:
        """What the driver found, in words, and calls that it was asked for."""
        calls = ("cuMemMap", "cuMemUnmap", "cuMemcpyAsync", "cuMemcpyBatchAsync_v2", "cuStreamWaitEvent")
        found = self._library.fakecuda_violation() if self._library.fakecuda_violations() else b""
        return {"driver": found.decode(), **{name: self._library.fakecuda_calls(name.encode()) for name in calls}}


def install() -> DrivenDevice:
    """Replaces what opens memory, copies blocks and touches the KV cache in this worker process."""
    import polder.broker.device_pages as device_pages
    import polder.engines.vllm.process as process
    import polder.engines.vllm.tiers.worker as tier_worker
    from polder.memory.cuda import CudaBackend
    from polder.memory.cuda_stream import StreamJob
    from polder.tiers.movers import CudaMover
    from polder.weights.store import WeightStore

    device = DrivenDevice()
    driver.open_backends([process, device_pages], lambda _: device.stream)  # the broker may be a thread of this process
    late.install(device)

    def mover() -> CudaMover:
        return CudaMover(process.present(process.here.memory).backend)

    tier_worker.CpuMover = mover  # type: ignore[misc, assignment]
    hold, before = StreamJob.hold, WeightStore.before

    def hold_and_reach(self: StreamJob) -> Any:
        stall = hold(self)
        device.reach()  # this process is about to compute over the bytes
        return stall

    def before_and_read(self: WeightStore, layer: int) -> None:
        before(self, layer)
        device.read([(int(dst), int(size)) for dst, _, size in zip(*self._pieces[layer], strict=True)])

    StreamJob.hold = hold_and_reach  # type: ignore[method-assign]
    WeightStore.before = before_and_read  # type: ignore[method-assign]
    if os.environ.get("GPULIKE_FENCES", "on") == "off":
        CudaBackend.mark = lambda self: None  # type: ignore[method-assign, assignment, return-value]
        CudaBackend.fence = lambda self: None  # type: ignore[method-assign]
    return device
