"""Weights that leave and come back on a device that computes later than it is told, with any delays."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from polder.memory.cuda_stream import StreamJob, StreamQueue
from polder.weights.store import Segment, WeightStore
from tests.memory.device import BrokenBackend, Device, open_device
from tests.memory.machines import FakeCuda

LAYERS, ELEMENTS = 5, 600


@pytest.fixture
def fake(fake_cuda: FakeCuda) -> Iterator[FakeCuda]:
    fake_cuda.reset()
    yield fake_cuda
    fake_cuda.delays(0, 0)
    fake_cuda.reset()


class Model:
    """Each layer's compute writes its weights, plus its number, to `out`."""

    def __init__(self, device: Device) -> None:
        self.device = device
        draw = torch.Generator().manual_seed(1)
        self.original = [
            {"w": torch.randint(0, 100, (ELEMENTS,), dtype=torch.uint8, generator=draw)} for _ in range(LAYERS)
        ]
        self.store = WeightStore(device.backend, self.original)
        self.free: list[Segment] = [tuple(device.backend.create(self.store.layout.layer_pages)) for _ in range(LAYERS)]
        self.out = device.host(LAYERS, ELEMENTS)
        self.expected = np.stack([layer["w"].numpy() + at for at, layer in enumerate(self.original)])

    def run(self, until: int = LAYERS) -> None:
        for layer in range(until):
            self.store.before(layer)
            weight = self.store.tensors[layer]["w"]
            self.device.launch(self.out[layer].ctypes.data, weight.data_ptr(), ELEMENTS, value=layer)
            self.store.after(layer)

    def give(self, count: int) -> None:
        self.store.give([self.free.pop() for _ in range(count)])

    def take(self, count: int) -> None:
        self.free += self.store.take(count)

    def right(self) -> bool:
        self.device.backend.fence()
        return bool((self.out == self.expected).all())

    def close(self) -> None:
        self.free += self.store.segments
        self.store.close()
        self.device.backend.destroy([page for segment in self.free for page in segment])


def life(fake: FakeCuda, seed: int, queue: type[StreamQueue] = StreamQueue) -> bool:
    """Passes, whole ones and others, while segments come and go between them. True when every layer computed over its own bytes."""
    chance = random.Random(seed)
    backend = BrokenBackend(0)
    backend.queue = queue
    fake.delays(seed, 200)
    with open_device(fake, backend) as device:
        model = Model(device)
        model.give(chance.randint(2, LAYERS))
        right = True
        for _ in range(4):
            model.run(chance.choice([LAYERS, LAYERS, 3]))
            held = len(model.store.segments)
            if chance.random() < 0.5 and held > 2:
                model.take(chance.randint(1, held - 2))
            elif held < LAYERS:
                model.give(chance.randint(1, LAYERS - held))
            model.run()
            right &= model.right()
        model.close()
    fake.delays(0, 0)
    return right


def test_layers_compute_over_their_own_bytes_and_nothing_is_unmapped_under_them(fake: FakeCuda) -> None:
    for seed in range(100):
        assert life(fake, seed), f"seed {seed}"
    assert fake.violation() == ""


class _NoHoldJob(StreamJob):
    def hold(self) -> None: ...


class _NoHoldQueue(StreamQueue):
    job = _NoHoldJob


def test_compute_that_waits_for_no_copy_has_other_weights(fake: FakeCuda) -> None:
    """The control."""
    assert not all(life(fake, seed, _NoHoldQueue) for seed in range(20))
    assert fake.violation() != ""
