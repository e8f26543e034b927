"""The layer stream on a device that computes later than it is told: bytes are right with any delays, the host waits for nothing."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from polder.memory.backend import Mark
from polder.memory.copy import CopyEngine
from polder.memory.cuda_stream import StreamJob, StreamQueue
from polder.stream.pipeline import LayerStream, Pieces
from tests.memory.device import BrokenBackend, Device, open_device
from tests.memory.machines import FakeCuda

SIZE = 2048


class Bench:
    """Layers at home in host memory, buffers on the device. Layer l's compute adds l + 1 to each of its bytes and writes them out.

    `expected[l]` is what the layer's bytes must be at home, where `writes_back`; else they never change there.
    """

    def __init__(self, device: Device, buffers: Sequence[int], address: int, *, writes_back: bool) -> None:
        self.device, self.where = device, [address + buffer * SIZE for buffer in buffers]
        self.layers, self.writes_back = len(buffers), writes_back
        self.home, self.out = device.host(self.layers, SIZE), device.host(self.layers, SIZE)
        self.home[:] = np.arange(1, self.layers + 1, dtype=np.uint8)[:, None] * 3
        self.expected, self.expected_out = self.home.copy(), self.out.copy()
        self.copies = CopyEngine(device.backend)
        self.stream = LayerStream(self.copies, self.load, buffers, store=self.store if writes_back else None)

    def load(self, layer: int) -> Pieces:
        return Pieces.of([(self.where[layer], self.home[layer].ctypes.data, SIZE)])

    def store(self, layer: int) -> Pieces:
        return Pieces.of([(self.home[layer].ctypes.data, self.where[layer], SIZE)])

    def compute(self, layer: int) -> None:
        self.stream.before(layer)
        self.device.launch(self.out[layer].ctypes.data, self.where[layer], SIZE, value=layer + 1)
        self.expected_out[layer] = self.expected[layer] + np.uint8(layer + 1)
        if self.writes_back:
            self.device.launch(self.where[layer], self.where[layer], SIZE, value=layer + 1)
            self.expected[layer] += np.uint8(layer + 1)
        self.stream.after(layer)

    def right(self) -> bool:
        self.stream.drain()
        self.device.backend.fence()
        return bool((self.out == self.expected_out).all() and (self.home == self.expected).all())


@contextlib.contextmanager
def bench(
    fake: FakeCuda, buffers: Sequence[int], *, writes_back: bool = False, queue: type[StreamQueue] = StreamQueue
) -> Iterator[Bench]:
    backend = BrokenBackend(0)
    backend.queue = queue
    with open_device(fake, backend) as device, device.mapped(1) as address:
        made = Bench(device, buffers, address, writes_back=writes_back)
        yield made
        made.copies.close()


def passes(fake: FakeCuda, seed: int, *, writes_back: bool, queue: type[StreamQueue] = StreamQueue) -> bool:
    """Three passes and a few given up half way, on random buffers. True when all bytes are right."""
    chance = random.Random(seed)
    buffers = [chance.randrange(3) for _ in range(chance.randint(3, 7))]
    fake.delays(seed, 200)
    with bench(fake, buffers, writes_back=writes_back, queue=queue) as made:
        for _ in range(3):
            for layer in range(made.layers):
                made.compute(layer)
            if not writes_back:
                for layer in range(chance.randrange(made.layers)):
                    made.compute(layer)
        right = made.right()
    fake.delays(0, 0)
    return right


@pytest.fixture
def fake(fake_cuda: FakeCuda) -> Iterator[FakeCuda]:
    fake_cuda.reset()
    yield fake_cuda
    fake_cuda.delays(0, 0)
    fake_cuda.reset()


@pytest.mark.parametrize("writes_back", [False, True])
def test_with_any_delays_each_layer_computes_over_its_own_bytes(fake: FakeCuda, writes_back: bool) -> None:
    for seed in range(100):
        assert passes(fake, seed, writes_back=writes_back), f"seed {seed}"
    assert fake.violation() == ""


class _NoWaitQueue(StreamQueue):
    """A copy queue that forgets to wait for marks."""

    def _wait_for(self, after: Mark | None) -> None: ...


class _NoHoldJob(StreamJob):
    def hold(self) -> None: ...


class _NoHoldQueue(StreamQueue):
    """One whose jobs hold no compute."""

    job = _NoHoldJob


@pytest.mark.parametrize("queue", [_NoWaitQueue, _NoHoldQueue])
def test_without_one_of_the_waits_layers_compute_over_others_bytes(fake: FakeCuda, queue: type[StreamQueue]) -> None:
    right = [passes(fake, seed, writes_back=True, queue=queue) for seed in range(20)]
    assert not all(right)
    assert fake.violation() != ""


def test_the_host_launches_a_whole_pass_while_the_device_has_not_begun(fake: FakeCuda) -> None:
    """A fence of the host, or of the context, would stand still here."""
    with bench(fake, [0, 1, 0, 1, 0, 2], writes_back=True) as made:
        with fake.gate(made.device.stream):
            for _ in range(2):
                for layer in range(made.layers):
                    made.compute(layer)
            assert made.stream.statistics().passes == 2
        assert made.right()
    assert fake.violation() == ""


def test_a_layer_is_fetched_while_another_one_computes(fake: FakeCuda) -> None:
    """What a context's fence made impossible: copies beside compute."""
    with bench(fake, [0, 1, 0]) as made:
        made.stream.fetch([0, 1])
        made.compute(0)
        with fake.gate(made.device.stream) as gate:
            made.stream.before(1)
            made.stream.after(1)
            made.copies.wait(3)  # layer 2, into the buffer that layer 0 has left
            gate.set()
        made.compute(2)
        assert made.right()
    assert fake.violation() == ""


def test_the_time_that_compute_stood_still_is_told_by_the_device(fake: FakeCuda) -> None:
    with bench(fake, [0, 1, 0, 1]) as made:
        fake.delays(3, 4_000)
        for _ in range(3):
            for layer in range(made.layers):
                made.compute(layer)
        assert made.right()
        made.compute(0)
        made.compute(made.layers - 1)  # a pass ends: what is known by now is counted
        statistics = made.stream.statistics()
        assert statistics.stalls > 0
        assert 0.0 < statistics.recent_pass_stall_seconds <= statistics.stall_seconds
        assert statistics.busy_seconds > 0.0


def test_a_layer_that_stays_is_not_changed_before_its_result_is_home(fake: FakeCuda) -> None:
    fake.delays(1, 3_000)
    with bench(fake, [0, 1], writes_back=True) as made:
        for _ in range(4):
            for layer in range(made.layers):
                made.compute(layer)
        assert made.right()
    assert fake.violation() == ""
