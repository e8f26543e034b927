"""One rank's windowed KV on real pages, mapped by WorkerWindow itself, with a model of what every block's bytes must be."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import numpy as np
import numpy.typing as npt

from polder.emulation.backends import FaultyBackend
from polder.engines.vllm.plans import WindowPlan
from polder.engines.vllm.window import worker as window_worker
from polder.engines.vllm.window.worker import WorkerWindow
from polder.errors import EnvironmentFault
from polder.memory.devices import open_backend
from polder.memory.span import Span
from tests.engines.test_geometry import PAGE, layer_major

__all__ = ["Rank"]

Bytes = npt.NDArray[np.uint8]
REGULAR_UNITS = 2
"""That stay mapped; the donors follow them, then the windowed units."""


class Rank:
    """Units: REGULAR_UNITS, then `donors`, then as many windowed ones as these carry. `truth[layer, block]`: its bytes."""

    def __init__(
        self,
        layers: int,
        window_layers: int,
        *,
        block_bytes: int = 1024,
        donors: int = 1,
        order: Sequence[int] = (),
        steps_in_flight: int = 1,
    ) -> None:
        """`order[layer]`: the layer's place in the buffer; as they are executed unless told otherwise."""
        self.layers, self.window_layers, self.block_bytes = layers, window_layers, block_bytes
        windowed = donors * (layers // window_layers)
        held = REGULAR_UNITS + donors
        geometry = layer_major(layers, block_bytes, held + windowed)
        self.first, self.blocks = held * geometry.unit_blocks, geometry.num_blocks
        self.regular = list(range(REGULAR_UNITS * geometry.unit_blocks))
        self.windowed = list(range(self.first, self.blocks))
        self._inner = open_backend("cpu:0", PAGE)
        self.backend = FaultyBackend(self._inner)
        self.span = Span(self._inner, geometry.total_slots)
        pages = self._inner.create(held * geometry.pages_per_unit)
        self.span.map(geometry.slots(range(held)), pages)
        self.store = np.zeros((layers, len(self.windowed), block_bytes), np.uint8)
        memory = SimpleNamespace(
            rank=0,
            geometry=geometry,
            span=self.span,
            backend=self.backend,
            handles_of=lambda unit: pages[unit * geometry.pages_per_unit : (unit + 1) * geometry.pages_per_unit],
            pages_of=dict.fromkeys(range(held)),
            plan=SimpleNamespace(links="", faults=""),
        )
        stride = geometry.places[0].layer_stride
        plan = WindowPlan(
            window_layers=window_layers,
            layers=tuple((f"model.layers.{n}.attn", at * stride) for n, at in enumerate(order or range(layers))),
            block_bytes=block_bytes,
            block_tokens=16,
            first_block=self.first,
            blocks=len(self.windowed),
            host_pages=((),),
        )
        region = SimpleNamespace(address=self.store.ctypes.data)
        with mock.patch.object(window_worker, "HostRegion", return_value=region):
            self.window = WorkerWindow(cast(Any, memory), plan, steps_in_flight=steps_in_flight)
        self.stream = self.window.stream
        each = layers // window_layers
        units = range(held, held + windowed)
        self.donors = {REGULAR_UNITS + n: list(units[n * each : (n + 1) * each]) for n in range(donors)}
        for layer in range(layers):
            for block in range(len(self.regular), self.first):
                self.local(layer, block)[:] = 0xAA  # of requests before
        self.span.unmap(geometry.slots(list(self.donors)))
        self.window.open(self.donors)
        self.random = np.random.default_rng(layers * 10 + window_layers)
        self.truth = self.random.integers(0, 256, (layers, self.blocks, block_bytes), np.uint8)
        self.store[:] = self.truth[:, self.first :]
        for layer in range(layers):
            for block in self.regular:
                self.local(layer, block)[:] = self.truth[layer, block]
        self.loaded_bytes = self.stored_bytes = 0
        self.named: set[int] = set()
        """Blocks that the stream has called doubtful and that nobody has written anew since."""

    @contextmanager
    def open(self) -> Iterator[Rank]:
        yield self
        self.backend.forgive()
        while True:
            try:
                self.window.copies.close()
                break
            except EnvironmentFault:
                continue
        self.span.close()
        self._inner.close()

    def local(self, layer: int, block: int) -> Bytes:
        """The block's bytes at the address where attention finds them."""
        address = self.window.homes.local[layer] + block * self.block_bytes
        return np.ctypeslib.as_array((ctypes.c_uint8 * self.block_bytes).from_address(address))

    def run(self, read: Sequence[int], written: Sequence[int], *, until: int | None = None, half: bool = False) -> bool:
        """A pass; given up before layer `until`, or with `half` between that layer's writing and its `after`."""
        reads, writes = (sorted({b for b in blocks if b >= self.first}) for blocks in (read, written))
        begun = self.stream.begin(read, written)
        assert begun == bool(reads or writes)
        until = self.layers if until is None else until
        if begun:
            self.loaded_bytes += min(self.window_layers, self.layers) * len(reads) * self.block_bytes
        for layer in range(until + half):
            if begun:
                self.stream.before(layer)
                self.stream.before(layer)  # as the hooks do: one for the update, one for attention
            for block in {*read}:
                if block not in self.named:
                    assert (self.local(layer, block) == self.truth[layer, block]).all(), f"layer {layer} block {block}"
            self._write(layer, {*read}, {*written}, lost=layer == until)
            if layer < until and begun:
                self.stream.after(layer)
                fetched = layer + self.window_layers < self.layers
                self.loaded_bytes += fetched * len(reads) * self.block_bytes
                self.stored_bytes += len(writes) * self.block_bytes
        if until == self.layers:
            self.named -= {*writes} - {*reads}
        return begun

    def _write(self, layer: int, read: Collection[int], written: Collection[int], *, lost: bool) -> None:
        """New tokens: the rest of a block that has some, all of another. `lost`: windowed ones never get home."""
        for block in sorted(written):
            local = self.local(layer, block)
            start = int(self.random.integers(0, self.block_bytes)) if block in read else 0
            local[start:] = self.random.integers(0, 256, self.block_bytes - start, np.uint8)
            if not (lost and block >= self.first):
                self.truth[layer, block, start:] = local[start:]

    def check(self) -> None:
        """At home everything is as it must be, but for what was named."""
        sound = [block for block in self.windowed if block not in self.named]
        at = np.array(sound, np.int64) - self.first
        wrong = np.argwhere((self.store[:, at] != self.truth[:, sound]).any(axis=2))
        assert not len(wrong), f"(layer, block) {[(int(layer), sound[n]) for layer, n in wrong[:8]]}"
        for layer in range(self.layers):
            for block in self.regular:
                assert (self.local(layer, block) == self.truth[layer, block]).all(), f"regular block {block}"
