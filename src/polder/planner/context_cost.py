"""How long a step takes when windowed KV streams through it: rooflines for each layer, and the order of the copies.

A matrix product takes the longer of two times: reading its weights, and its FLOPs. Attention takes the longer of its
FLOPs and of reading the KV, plus writing once what the link brings. Launches, scheduling and sampling are left out: the
times are lower bounds, best for steps of 5 ms and more. The device's speeds are sustained ones (planner/devices.py).

A windowed block has w slots, and the copies are one FIFO queue. The copy of layer l + w begins when attention l is done
and what layer l added is on its way to external memory (SwiftCache, section 3.3, with w = 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from polder.planner.devices import Device
from polder.planner.model_shape import ModelShape

__all__ = [
    "LayerWork",
    "PassTime",
    "Stream",
    "decode_seconds",
    "even_step_seconds",
    "prefill_seconds",
    "streamed_seconds",
]


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


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """One or more passes."""

    seconds: float = 0.0
    compute_s: float = 0.0
    """Time of the same passes with all KV local."""
    link_s: float = 0.0

    def __add__(self, other: PassTime) -> PassTime:
        return PassTime(
            seconds=self.seconds + other.seconds,
            compute_s=self.compute_s + other.compute_s,
            link_s=self.link_s + other.link_s,
        )

    @property
    def hidden_part(self) -> float | None:
        """Part of the copies' time that is under computing; None when nothing is copied.

        0 also where copies cost more than their own time, because they write to the memory that attention reads.
        """
        return max(0.0, 1 - (self.seconds - self.compute_s) / self.link_s) if self.link_s else None


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


def decode_seconds(
    shape: ModelShape, device: Device, context_tokens: int, sequences: int, windowed_tokens: int, stream: Stream
) -> PassTime:
    """One step in which each sequence gets a token: weights and all KV are read once, all sequences' windowed KV comes
    in."""
    total = context_tokens * sequences
    stored = sequences if windowed_tokens else 0
    roofline = _Roofline(shape, device, rows=sequences, read_tokens=total, pairs=total, sequences=sequences)
    return roofline.seconds(stream, loaded=windowed_tokens, stored=stored)


def prefill_seconds(
    shape: ModelShape, device: Device, context_tokens: int, chunk_tokens: int, windowed_tokens: int, stream: Stream
) -> PassTime:
    """A prompt alone on the device, in chunks; its last `windowed_tokens` are windowed. Each chunk reads what came
    before."""
    total = PassTime()
    regular = context_tokens - windowed_tokens
    for start in range(0, context_tokens, chunk_tokens):
        end = min(start + chunk_tokens, context_tokens)
        pairs = (end - start) * (start + end) / 2
        roofline = _Roofline(shape, device, rows=end - start, read_tokens=end, pairs=pairs, sequences=1)
        loaded = max(0, start - regular)
        total += roofline.seconds(stream, loaded=loaded, stored=max(0, end - regular) - loaded)
    return total


@dataclass(frozen=True)
class _Roofline:
    """One forward pass over some sequences; counts are for all of them together."""

    shape: ModelShape
    device: Device
    rows: int
    """Tokens that are computed."""
    read_tokens: int
    """KV that attention reads in a layer."""
    pairs: float
    """Pairs of a query and a key."""
    sequences: int

    def seconds(self, stream: Stream, *, loaded: int, stored: int) -> PassTime:
        """`loaded`, `stored`: tokens whose windowed KV is copied."""
        copied = self.shape.layers * (loaded + stored) * self.shape.kv_bytes_of_layer
        return PassTime(
            seconds=streamed_seconds(self._layers(loaded, stored), stream),
            compute_s=sum(layer.compute_s for layer in self._layers(0, 0)),
            link_s=copied / stream.link_bytes_per_s,
        )

    def _layers(self, loaded: int, stored: int) -> list[LayerWork]:
        shape, device = self.shape, self.device
        kv = shape.kv_bytes_of_layer
        layer = LayerWork(
            before_s=self._product_s(shape.qkv_parameters, self.rows),
            attention_s=max(
                (self.read_tokens + loaded) * kv / device.memory_bytes_per_s,
                shape.attention_flops_of_layer * self.pairs / device.attention_flops_per_s,
            ),
            after_s=self._product_s(shape.layer_parameters - shape.qkv_parameters, self.rows),
            load_bytes=loaded * kv,
            store_bytes=stored * kv,
        )
        head_s = self._product_s(shape.head_parameters, self.sequences)
        return [layer] * (shape.layers - 1) + [replace(layer, after_s=layer.after_s + head_s)]

    def _product_s(self, parameters: int, rows: int) -> float:
        """A product of `rows` vectors with a matrix of so many parameters."""
        read_s = parameters * self.shape.element_bytes / self.device.memory_bytes_per_s
        return max(read_s, 2 * parameters * rows / self.device.flops_per_s)
