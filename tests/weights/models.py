"""A model made of random tensors, its weights in a store, and the pages that it lives on."""

from __future__ import annotations

import ctypes

import torch

from polder.memory.backend import Backend
from polder.memory.page import Handle
from polder.memory.span import Span
from polder.weights.store import Segment, WeightStore

PAGE = 4096


def random_layers(layers: int, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Of two or three pages each: weights of two types, a strided one, a tie, an integer buffer, an empty one."""
    torch.manual_seed(seed)
    made = []
    for layer in range(layers):
        weight = torch.randn(32, 100 + layer, dtype=torch.bfloat16)
        made.append(
            {
                "qkv.weight": weight,
                "qkv.tied": weight,
                "up.weight": torch.randn(20, 30)[:, ::2].t(),
                "up.scale": torch.randint(0, 255, (7, 3), dtype=torch.uint8),
                "bias": torch.empty(0),
            }
        )
    return made


class Model:
    """Checks what a layer's kernels would read. `others(segments)` is what their next owners do to given-up pages."""

    def __init__(self, backend: Backend, layers: int, *, spare: int = 0) -> None:
        self.backend = backend
        self.original = random_layers(layers)
        self.store = WeightStore(backend, self.original)
        self.pages = self.store.layout.layer_pages
        handles = backend.create((layers + spare) * self.pages)
        self.free: list[Segment] = [tuple(handles[i : i + self.pages]) for i in range(0, len(handles), self.pages)]
        self.all = set(self.free)
        self._others = Span(backend, self.pages)

    def some(self, count: int) -> list[Segment]:
        return self.free[:count]

    def give(self, count: int) -> None:
        segments = self.some(count)
        self.store.give(segments)
        del self.free[:count]

    def take(self, count: int) -> None:
        self.returned(self.store.take(count))

    def returned(self, segments: list[Segment]) -> None:
        for segment in segments:
            self._others.map(range(self.pages), list[Handle](segment))
            ctypes.memset(self._others.address(0), 0xEE, self.pages * PAGE)
            self._others.unmap(range(self.pages))
        self.free += segments

    def right(self, layer: int) -> bool:
        """Whether the layer's tensors have their original values."""
        return all(torch.equal(t, self.original[layer][name]) for name, t in self.store.tensors[layer].items())

    def run(self, *, until: int | None = None) -> None:
        """A pass, given up after `until` layers."""
        for layer in range(len(self.original))[:until]:
            self.store.before(layer)
            assert self.right(layer), f"layer {layer} has other weights"
            self.store.after(layer)

    def check(self) -> None:
        self.store.check_integrity()
        held = self.store.segments
        assert len(held) + len(self.free) == len(self.all)
        assert {*held, *self.free} == self.all

    def close(self) -> None:
        self.store.close()
        self._others.close()
        self.backend.destroy([page for segment in self.all for page in segment])
