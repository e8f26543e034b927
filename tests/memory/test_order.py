"""Order on the device: what is launched is not done, and copies and compute wait for each other only where they must."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from polder.errors import EnvironmentFault
from polder.memory.backend import Mark
from polder.memory.copy import CopyEngine
from polder.memory.cuda_stream import StreamJob, StreamQueue
from tests.memory.device import BrokenBackend, Device, open_device
from tests.memory.machines import FakeCuda, Machine

SIZE = 4096


@pytest.fixture
def device(fake: Machine) -> Iterator[Device]:
    assert fake.fake is not None
    with open_device(fake.fake) as device:
        yield device


@contextlib.contextmanager
def copies_of(device: Device) -> Iterator[CopyEngine]:
    engine = CopyEngine(device.backend)
    yield engine
    with contextlib.suppress(EnvironmentFault):
        engine.close()


def submit(copies: CopyEngine, dst: int, src: int, after: Mark | None = None, size: int = SIZE) -> int:
    return copies.submit(np.array([dst], np.uint64), np.array([src], np.uint64), size, after)


def test_a_mark_is_reached_when_what_was_launched_before_is_over(device: Device) -> None:
    with device.fake.gate(device.stream) as gate:
        mark = device.backend.mark()
        assert not mark.done()
        gate.set()
        mark.wait()
        assert mark.done()


def test_a_mark_waits_for_nothing_that_is_launched_later(device: Device) -> None:
    mark = device.backend.mark()
    with device.fake.gate(device.stream):
        mark.wait()


def test_a_fence_waits_for_compute_and_for_no_copy(device: Device) -> None:
    other = device.new_stream()
    with device.mapped(1) as address, copies_of(device) as copies, device.fake.gate(other) as gate:
        device.launch(address + SIZE, 0, SIZE, value=5, delay_us=20_000)
        mine, device.stream = device.stream, other
        held_up = submit(copies, address, device.host(SIZE).ctypes.data, after=device.backend.mark())
        device.stream = mine
        device.backend.fence()
        assert not copies.done(held_up), "the fence has waited for a copy"
        device.call("cuStreamSynchronize", device.stream)  # for the fake: `read` would wait for the gate
        gate.set()
        copies.wait(held_up)
        assert set(device.read(address + SIZE, SIZE)) == {5}
    device.call("cuStreamDestroy", other)


def test_a_copy_after_a_mark_has_the_bytes_that_compute_wrote(device: Device) -> None:
    home = device.host(SIZE)
    with device.mapped(1) as address, copies_of(device) as copies:
        device.launch(address, 0, SIZE, value=7, delay_us=5_000)
        copies.wait(submit(copies, home.ctypes.data, address, after=device.backend.mark()))
        assert (home == 7).all()


def test_a_copy_without_a_mark_is_noticed(device: Device) -> None:
    """The control: the driver tells, and the bytes are old."""
    home = device.host(SIZE)
    with device.mapped(1) as address, copies_of(device) as copies:
        device.launch(address, 0, SIZE, value=7, delay_us=50_000)
        copies.wait(submit(copies, home.ctypes.data, address))
        assert (home == 0).all()
    assert "read while it is written" in device.fake.violation()
    device.fake.reset()


def test_compute_that_is_held_finds_what_was_copied(device: Device) -> None:
    home = device.host(SIZE)
    home[:] = 9
    device.fake.delays(1, 3_000)
    with device.mapped(1) as address, copies_of(device) as copies:
        ticket = submit(copies, address, home.ctypes.data)
        stall = copies.hold(ticket)
        device.launch(address + SIZE, address, SIZE, value=1)
        assert set(device.read(address + SIZE, SIZE)) == {10}
        assert stall is None or (stall() or 0.0) > 0.0
    device.fake.delays(0, 0)


def test_compute_that_is_not_held_is_noticed(device: Device) -> None:
    home = device.host(SIZE)
    with device.mapped(1) as address, copies_of(device) as copies:
        submit(copies, address, home.ctypes.data)
        device.launch(address + SIZE, address, SIZE, value=1)
    assert "read while it is written" in device.fake.violation()
    device.fake.reset()


def test_a_copy_that_overwrites_what_compute_still_reads_waits_for_the_mark(device: Device) -> None:
    home = device.host(SIZE)
    home[:] = 3
    with device.mapped(1) as address, copies_of(device) as copies:
        device.launch(address, 0, SIZE, value=1)
        device.launch(address + SIZE, address, SIZE, delay_us=5_000)
        submit(copies, address, home.ctypes.data, after=device.backend.mark())
        assert set(device.read(address + SIZE, SIZE)) == {1}
        assert set(device.read(address, SIZE)) == {3}


def test_a_mark_that_is_forgotten_still_orders(device: Device) -> None:
    home = device.host(SIZE)
    with device.mapped(1) as address, copies_of(device) as copies, device.fake.gate(device.stream) as gate:
        device.launch(address, 0, SIZE, value=7)
        ticket = submit(copies, home.ctypes.data, address, after=device.backend.mark())
        assert not copies.done(ticket)
        gate.set()
        copies.wait(ticket)
        assert (home == 7).all()


def test_a_mark_of_something_else_is_waited_for_by_the_host(device: Device) -> None:
    class HostMark:
        waited = False

        def done(self) -> bool:
            return self.waited

        def wait(self) -> None:
            self.waited = True

    mark = HostMark()
    with device.mapped(1) as address, copies_of(device) as copies:
        copies.wait(submit(copies, address, device.host(SIZE).ctypes.data, after=mark))
        assert mark.waited


def test_unmapping_under_work_is_noticed_and_after_a_fence_it_is_not(device: Device) -> None:
    backend = device.backend
    address, handles = backend.reserve(2 * device.page), backend.create(2)
    backend.map(address, handles)
    device.launch(address, 0, SIZE, value=1)
    backend.fence()
    backend.unmap(address, 1)
    assert device.fake.violation() == ""
    device.launch(address + device.page, 0, SIZE, value=1)
    backend.unmap(address + device.page, 1)
    with contextlib.suppress(EnvironmentFault):  # the work may find nothing there
        device.call("cuCtxSynchronize")
    assert "is unmapped" in device.fake.violation()
    device.fake.reset()
    backend.destroy(handles)
    backend.free(address, 2 * device.page)


def test_while_compute_is_captured_there_are_no_marks_and_no_holds(device: Device) -> None:
    with device.mapped(1) as address, copies_of(device) as copies:
        device.fake.delays(1, 20_000)
        ticket = submit(copies, address, device.host(SIZE).ctypes.data)
        device.call("cuStreamBeginCapture", device.stream, device.backend.driver.api.CUstreamCaptureMode(2))
        try:
            with pytest.raises(EnvironmentFault, match="captured"):
                device.backend.mark()
        finally:
            device.call("cuStreamEndCapture", device.stream)
        device.backend.mark().wait()
        copies.wait(ticket)
    device.fake.delays(0, 0)


def test_a_failed_device_is_an_error_of_every_wait(device: Device) -> None:
    backend = device.backend
    address = backend.reserve(device.page)
    with copies_of(device) as copies:
        device.launch(address, 0, SIZE, value=1)  # nothing is mapped there
        with pytest.raises(EnvironmentFault):
            backend.fence()
        ticket = submit(copies, device.host(SIZE).ctypes.data, device.host(SIZE).ctypes.data)
        with pytest.raises(EnvironmentFault):
            copies.wait(ticket)
        with pytest.raises(EnvironmentFault):
            backend.mark()
        device.fake.reset()
    backend.free(address, device.page)


@pytest.mark.parametrize(("call", "nth"), [("cuEventCreate", 1), ("cuEventCreate", 2), ("cuEventRecord", 2)])
def test_a_job_without_an_event_ends_with_its_copy_or_begins_none(device: Device, call: str, nth: int) -> None:
    """There may be no memory for an event. Whoever waited gives the block to others."""
    home = device.host(SIZE)
    home[:] = 6
    with device.mapped(1) as address, copies_of(device) as copies:
        device.launch(address, 0, SIZE, value=7)
        device.backend.mark().wait()
        device.fake.delays(3, 100_000)
        device.fake.fail(call, nth, 2)
        ticket = submit(copies, address, home.ctypes.data)
        with pytest.raises(EnvironmentFault):
            copies.wait(ticket)
        device.fake.delays(0, 0)
        device.fake.fail(call, 0)
        device.launch(address, 0, SIZE, value=9)
        assert set(device.read(address, SIZE)) == {9}
    assert device.fake.violation() == ""


def test_no_context_is_taken_to_make_and_share_memory(fake: Machine) -> None:
    """The broker's calls: half a GiB of each device would go to a context."""
    assert fake.fake is not None
    driver = fake.backend.driver  # type: ignore[attr-defined]
    handles = fake.backend.create(2)
    fds, index, offsets = fake.backend.export_many(handles)
    adopted = fake.backend.adopt_many(fds, index, offsets)
    assert driver.call("cuDevicePrimaryCtxGetState", 0)[1] == 0
    fake.backend.destroy([*handles, *adopted])
    for fd in fds:
        os.close(fd)
    address = fake.backend.reserve(fake.page)
    with fake.pages(1) as pages:
        fake.backend.map(address, pages)
        fake.backend.zero(address, fake.page)
        assert driver.call("cuDevicePrimaryCtxGetState", 0)[1] == 1
        fake.backend.unmap(address, 1)
    fake.backend.free(address, fake.page)


class _NoWaitQueue(StreamQueue):
    """A copy queue that forgets to wait for marks."""

    def _wait_for(self, after: Mark | None) -> None: ...


class _NoHoldJob(StreamJob):
    def hold(self) -> None: ...


class _NoHoldQueue(StreamQueue):
    """One whose jobs hold nothing."""

    job = _NoHoldJob


def ping_pong(fake: FakeCuda, seed: int, queue: type[StreamQueue]) -> bool:
    """Compute writes, a copy brings it home, the next copy brings other bytes, compute reads them. True when all is right."""
    backend = BrokenBackend(0)
    backend.queue = queue
    fake.delays(seed, 300)
    right = True
    with open_device(fake, backend) as device, device.mapped(1) as address, copies_of(device) as copies:
        home, source, out = device.host(4, SIZE), device.host(4, SIZE), device.host(4, SIZE)
        source[:] = np.arange(10, 14, dtype=np.uint8)[:, None]
        for turn in range(4):
            device.launch(address, 0, SIZE, value=turn + 1)
            submit(copies, home[turn].ctypes.data, address, after=backend.mark())
            ticket = submit(copies, address, source[turn].ctypes.data)
            copies.hold(ticket)
            device.launch(out[turn].ctypes.data, address, SIZE, value=1)
        copies.wait(ticket)
        backend.fence()
        right = bool((home == np.arange(1, 5)[:, None]).all() and (out == source + 1).all())
    fake.delays(0, 0)
    return right


def test_with_any_delays_copies_and_compute_see_each_others_bytes(fake_cuda: FakeCuda) -> None:
    fake_cuda.reset()
    assert all(ping_pong(fake_cuda, seed, StreamQueue) for seed in range(100))
    assert fake_cuda.violation() == ""


@pytest.mark.parametrize("queue", [_NoWaitQueue, _NoHoldQueue])
def test_without_one_of_the_waits_bytes_are_wrong(fake_cuda: FakeCuda, queue: type[StreamQueue]) -> None:
    fake_cuda.reset()
    right = [ping_pong(fake_cuda, seed, queue) for seed in range(20)]
    assert not all(right)
    assert fake_cuda.violation() != ""
    fake_cuda.reset()


def test_many_threads_wait_for_one_mark(device: Device) -> None:
    with device.fake.gate(device.stream) as gate:
        mark = device.backend.mark()
        threads = [threading.Thread(target=mark.wait) for _ in range(4)]
        for thread in threads:
            thread.start()
        gate.set()
        for thread in threads:
            thread.join(30.0)
            assert not thread.is_alive()
