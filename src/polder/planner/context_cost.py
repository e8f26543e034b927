"""How long a step takes when windowed KV streams through it, by the order of computing and copies.

A windowed block has w slots, and the copies are one FIFO queue. The copy of layer l + w begins when attention l is done
and what layer l added is on its way to external memory (SwiftCache, section 3.3, with w = 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["LayerWork", "Stream", "even_step_seconds", "streamed_seconds"]


@dataclass(frozen=True, kw_only=True)
class LayerWork:
    """One layer of one forward pass."""

    before_s: float
    """Computing that needs no KV: the QKV projection."""
    attention_s: float
    after_s: float
    """Output projection and MLP: under these, too, the next layers' KV comes in."""
    load_bytes: float = 0
    """Windowed KV that its attention waits for."""
    store_bytes: float = 0
    """Windowed KV that it adds."""

    @property
    def compute_s(self) -> float:
        return self.before_s + self.attention_s + self.after_s


@dataclass(frozen=True, kw_only=True)
class Stream:
    """How windowed KV arrives. The default is for a context that has none."""

    link_bytes_per_s: float = math.inf
    window_layers: int = 1
    overhead_s: float = 0.0
    """Cost of launching a layer's copies, for the thread that launches the layers."""
    contention_s_per_byte: float = 0.0
    """Slowdown of computing by each byte copied meanwhile: copies take memory bandwidth, and on a CPU cores."""
    least_s: tuple[tuple[float, float], ...] = ()
    """Measured: (bytes of a layer, by how much a step with them takes longer), rising. No step is planned to be
    faster."""


def streamed_seconds(layers: Sequence[LayerWork], stream: Stream) -> float:
    """Seconds of one forward pass, from the first copy, queued at its start, to the end of computing and of the last
    store."""
    queue_s = computed_s = 0.0  # when the queue of copies, and the device, are free again
    attended_s: list[float] = []

    def store(layer: int) -> float:
        return max(queue_s, attended_s[layer]) + layers[layer].store_bytes / stream.link_bytes_per_s

    for number, layer in enumerate(layers):
        if number >= stream.window_layers:
            queue_s = store(number - stream.window_layers)
        queue_s += layer.load_bytes / stream.link_bytes_per_s
        attended_s.append(max(computed_s + layer.before_s, queue_s) + layer.attention_s)
        computed_s = attended_s[-1] + layer.after_s
        if layer.load_bytes or layer.store_bytes:
            computed_s += stream.overhead_s
    for number in range(max(0, len(layers) - stream.window_layers), len(layers)):
        queue_s = store(number)
    return max(computed_s, queue_s)


def even_step_seconds(compute_s: float, layers: int, stream: Stream, *, load_bytes: float, store_bytes: float) -> float:
    """A pass whose computing was measured as a whole, over equal layers: a quarter is before attention, a quarter is
    attention.

    `load_bytes` and `store_bytes`: windowed KV of one layer.
    """
    layer_s = compute_s / layers + stream.contention_s_per_byte * (load_bytes + store_bytes)
    layer = LayerWork(
        before_s=layer_s / 4,
        attention_s=layer_s / 4,
        after_s=layer_s / 2,
        load_bytes=load_bytes,
        store_bytes=store_bytes,
    )
    planned_s = streamed_seconds([layer] * layers, stream)
    if not stream.least_s or not load_bytes + store_bytes:
        return planned_s
    sizes, more = zip(*stream.least_s, strict=True)
    return max(planned_s, compute_s + float(np.interp(load_bytes, sizes, more)))
