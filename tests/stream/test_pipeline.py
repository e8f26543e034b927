"""The layer stream keeps the promises of the essay at the top of polder/stream/pipeline.py."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.emulation.backends import FaultyBackend
from polder.errors import EnvironmentFault
from polder.memory import _libc
from polder.memory.backend import Backend
from polder.memory.copy import CopyEngine
from polder.memory.cpu import CpuBackend
from polder.stream.pipeline import LayerStream, Pieces
from tests.conftest import examples

SIZE = 64


class Bench:
    """Layers at home, buffers, and a stream between them. Layer l's bytes are all l + 1."""

    def __init__(self, buffers: Sequence[int], backend: Backend | None = None, *, writes_back: bool = False) -> None:
        self.layers, self.where = len(buffers), list(buffers)
        self.home = np.repeat(np.arange(1, self.layers + 1, dtype=np.uint8)[:, None], SIZE, axis=1)
        self.buffer = np.zeros((max(buffers) + 1, SIZE), dtype=np.uint8)
        self.backend = FaultyBackend(backend or CpuBackend(page_bytes=4096))
        self.copies = CopyEngine(self.backend)
        store = self.store if writes_back else None
        self.stream = LayerStream(self.copies, self.load, buffers, store=store)

    def load(self, layer: int) -> Pieces:
        return Pieces.of([(self.buffer[self.where[layer]].ctypes.data, self.home[layer].ctypes.data, SIZE)])

    def store(self, layer: int) -> Pieces:
        return Pieces.of([(self.home[layer].ctypes.data, self.buffer[self.where[layer]].ctypes.data, SIZE)])

    def has(self, layer: int) -> bool:
        return bool((self.buffer[self.where[layer]] == self.home[layer]).all())

    def run(self, layers: Sequence[int] | None = None) -> None:
        for layer in range(self.layers) if layers is None else layers:
            self.stream.before(layer)
            assert self.has(layer), f"layer {layer} found others' bytes"
            self.stream.after(layer)

    @contextlib.contextmanager
    def open(self) -> Iterator[Bench]:
        yield self
        self.copies.close()


def stepwise(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Each copy waits for one release."""
    steps, real = threading.Semaphore(0), _libc.copy_bytes

    def copy(*arguments: int) -> None:
        assert steps.acquire(timeout=30)
        real(*arguments)

    monkeypatch.setattr(_libc, "copy_bytes", copy)
    return steps


@examples(60)
@given(data=st.data(), buffers=st.lists(st.integers(0, 4), min_size=1, max_size=9))
def test_a_layer_never_finds_other_bytes_in_whatever_order_layers_run(data: st.DataObject, buffers: list[int]) -> None:
    with Bench(buffers).open() as bench:
        for _ in range(data.draw(st.integers(1, 4))):
            bench.run(range(data.draw(st.integers(0, bench.layers))))  # given up half way
            bench.run(data.draw(st.lists(st.integers(0, bench.layers - 1), max_size=6)))
        bench.run()


def test_each_sharing_layer_is_fetched_once_a_pass_and_the_others_once() -> None:
    with Bench([0, 1, 2, 1, 0, 3, 1]).open() as bench:
        for _ in range(10):
            bench.run()
        bench.stream.drain()
        statistics = bench.stream.statistics()
        # The last pass has fetched the first layers of the two shared buffers for a pass that does not come.
        assert statistics.loads == 2 + 10 * 5 + 2
        assert (statistics.passes, statistics.loaded_bytes) == (10, statistics.loads * SIZE)


def test_a_layer_waits_for_its_own_bytes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench([0, 1, 2]).open() as bench:
        steps = stepwise(monkeypatch)
        bench.stream.fetch([1, 0, 2])
        steps.release(1)
        bench.stream.before(1)
        assert bench.has(1)
        assert not bench.has(0)
        assert bench.stream.present() == [1]
        steps.release(2)
        bench.run()


def test_a_fetch_that_is_done_is_no_stall_and_one_that_is_not_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with Bench([0, 1]).open() as bench:
        steps = stepwise(monkeypatch)
        bench.stream.fetch([0])
        steps.release(1)
        bench.copies.wait(1)
        bench.stream.before(0)
        assert bench.stream.statistics().stalls == 0
        timer = threading.Timer(0.05, steps.release)
        timer.start()
        bench.stream.before(1)
        timer.join()
        statistics = bench.stream.statistics()
        assert statistics.stalls == 1
        assert statistics.stall_seconds > 0.0
        assert 0.0 <= statistics.overlap <= 1.0


def test_a_result_is_home_before_its_buffer_is_overwritten() -> None:
    """What the window does with KV: each layer adds to its bytes, and finds them again in the next pass."""
    with Bench([0, 1, 0, 1, 0], writes_back=True).open() as bench:
        expected = bench.home.copy()
        for _ in range(5):
            for layer in range(bench.layers):
                bench.stream.before(layer)
                bench.buffer[bench.where[layer]] += layer
                bench.stream.after(layer)
                expected[layer] += layer
        bench.stream.drain()
        assert (bench.home == expected).all()
        assert bench.stream.statistics().stored_bytes == 25 * SIZE


def test_compute_is_marked_before_a_buffer_is_overwritten() -> None:
    with Bench([0, 1, 0]).open() as bench:
        bench.run()
        marks = bench.backend.calls["mark"]
        bench.stream.before(1)
        bench.stream.after(1)
        assert bench.backend.calls["mark"] == marks, "a layer without traffic asks for nothing"
        bench.run()
        assert bench.backend.calls["mark"] == marks + 2


@pytest.mark.parametrize("nth", range(1, 9))
def test_a_failed_fetch_is_raised_and_then_done_anew(nth: int) -> None:
    with Bench([0, 1, 0, 1]).open() as bench:
        bench.backend.fail_next("copy", nth)
        raised = 0
        for layer in [*range(4)] * 3:
            try:
                bench.stream.before(layer)
            except EnvironmentFault:
                raised += 1
                bench.stream.before(layer)
            assert bench.has(layer)
            bench.stream.after(layer)
        bench.stream.drain()
        assert raised in (1, 2), "by its own layer, and perhaps by one that waited earlier"


def test_a_failed_fetch_of_a_later_layer_is_not_forgotten_when_an_earlier_one_raised_it() -> None:
    with Bench([0, 1]).open() as bench:
        bench.backend.fail_next("copy", 1)
        bench.stream.fetch([1, 0])
        for layer in (0, 1):
            with pytest.raises(EnvironmentFault):
                bench.stream.before(layer)
        bench.run()


def test_a_failed_store_is_raised_by_the_next_wait() -> None:
    with Bench([0, 1, 0], writes_back=True).open() as bench:
        bench.run([0, 1])
        bench.stream.drain()
        bench.backend.fail_next("copy", 1)
        bench.stream.after(1)
        with pytest.raises(EnvironmentFault):
            bench.stream.drain()


def test_drain_raises_after_all_is_over_and_failed_layers_are_fetched_anew() -> None:
    with Bench([0, 1, 2]).open() as bench:
        bench.backend.fail_next("copy", 2)
        bench.stream.fetch([0, 1, 2])
        with pytest.raises(EnvironmentFault):
            bench.stream.drain()
        assert 1 not in bench.stream.present()
        assert bench.copies.statistics().pending == 0
        bench.stream.drain()
        bench.run()


def test_only_present_layers_survive_a_new_assignment() -> None:
    with Bench([0, 1, 2, 3]).open() as bench:
        bench.run()
        bench.stream.drain()
        bench.where = [0, 1, 0, 1]
        bench.stream.assign(bench.where, present=[0])
        before = bench.stream.statistics().loads
        bench.run()
        assert bench.stream.statistics().loads - before == 1 + 2 + 2


def test_not_asking_gives_wrong_bytes() -> None:
    """The control: without `before` and `after` two layers that share a buffer find the same bytes."""
    with Bench([0, 1, 0]).open() as bench:
        bench.run([0])
        bench.stream.drain()
        assert not (bench.has(0) and bench.has(2))


@pytest.mark.parametrize("call", ["before", "after"])
def test_a_layer_without_traffic_submits_nothing(call: str) -> None:
    with Bench([0, 1]).open() as bench:
        bench.run()
        bench.stream.drain()
        submitted = bench.copies.statistics().submitted
        step: Callable[[int], None] = getattr(bench.stream, call)
        step(0)
        assert bench.copies.statistics().submitted == submitted
