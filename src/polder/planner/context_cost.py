"""How long a step takes when windowed KV streams through it: rooflines for each layer, and the order of copies between them.

Computing is taken from a device's sustained figures (planner/devices.py): a matrix product takes the longer of reading its
weights and of its FLOPs, attention the longer of reading the KV (and of writing what the link brings, once) and of its FLOPs.
What an engine costs on top (launches, scheduling, sampling) is not in it: these are lower bounds, best for steps of 5 ms and more.

The copies are those of the window: w slots a windowed block, one FIFO queue. Layer l + w may come in when attention l is done
and what layer l has added is on its way home (SwiftCache, section 3.3, has w = 1).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from polder.planner.devices import Device
from polder.planner.model_shape import ModelShape

__all__ = ["LayerWork", "PassTime", "Stream", "decode_seconds", "even_step_seconds", "prefill_seconds", "step_seconds"]


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
    """How windowed KV arrives. The default is for a context without any."""

    link_bytes_per_s: float = math.inf
    window_layers: int = 1
    overhead_s: float = 0.0
    """Of a layer with copies: what it takes to launch them, by the thread that launches the layers."""
    contention_s_per_byte: float = 0.0
    """By which computing takes longer for each byte copied meanwhile: of memory bandwidth, and on a CPU of cores."""
    least_s: tuple[tuple[float, float], ...] = ()
    """Measured: (bytes of a layer, by how much a step with them takes longer), rising; beyond the last as long as that, or more."""


@dataclass(frozen=True, kw_only=True)
class PassTime:
    """Of one or more passes."""

    seconds: float = 0.0
    compute_s: float = 0.0
    """The same passes with all KV local."""
    link_s: float = 0.0

    def __add__(self, other: PassTime) -> PassTime:
        return PassTime(
            seconds=self.seconds + other.seconds,
            compute_s=self.compute_s + other.compute_s,
            link_s=self.link_s + other.link_s,
        )

    @property
    def hidden_part(self) -> float | None:
        """Part of the copies' time under which something is computed; None when nothing is copied.

        0 also where copies cost more than their own time: they write to the memory that attention reads.
        """
        return max(0.0, 1 - (self.seconds - self.compute_s) / self.link_s) if self.link_s else None


def step_seconds(layers: Sequence[LayerWork], stream: Stream) -> float:
    """Seconds of one forward pass, from the first copy (queued at its start) to the end of computing and of the last store."""
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
    """A pass whose computing was measured as a whole: equal layers, a quarter of each before its attention, a quarter in it.

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
    planned_s = step_seconds([layer] * layers, stream)
    if not stream.least_s or not load_bytes + store_bytes:
        return planned_s
    sizes, more = zip(*stream.least_s, strict=True)
    return max(planned_s, compute_s + float(np.interp(load_bytes, sizes, more)))


def decode_seconds(
    shape: ModelShape, device: Device, context_tokens: int, sequences: int, windowed_tokens: int, stream: Stream
) -> PassTime:
    """One step in which each sequence gets a token: weights and all KV are read once, all sequences' windowed KV comes in."""
    total = context_tokens * sequences
    work = _Work(
        tokens=sequences, sequences=sequences, read_tokens=total, pairs=total, loaded_tokens=windowed_tokens,
        stored_tokens=sequences if windowed_tokens else 0,
    )  # fmt: skip
    return _pass_time(shape, device, work, stream)


def prefill_seconds(
    shape: ModelShape, device: Device, context_tokens: int, chunk_tokens: int, windowed_tokens: int, stream: Stream
) -> PassTime:
    """A prompt alone on the device, in chunks; the last `windowed_tokens` of it are windowed. Each chunk reads what came before."""
    total = PassTime()
    regular = context_tokens - windowed_tokens
    for start in range(0, context_tokens, chunk_tokens):
        end = min(start + chunk_tokens, context_tokens)
        loaded = max(0, start - regular)
        work = _Work(
            tokens=end - start, sequences=1, read_tokens=end, pairs=(end - start) * (start + end) / 2,
            loaded_tokens=loaded, stored_tokens=max(0, end - regular) - loaded,
        )  # fmt: skip
        total += _pass_time(shape, device, work, stream)
    return total


@dataclass(frozen=True, kw_only=True)
class _Work:
    """One forward pass over some sequences, the counts of all of them together."""

    tokens: int
    sequences: int
    read_tokens: int
    """KV that attention reads in a layer."""
    pairs: float
    """Of a query and a key."""
    loaded_tokens: int
    stored_tokens: int


def _pass_time(shape: ModelShape, device: Device, work: _Work, stream: Stream) -> PassTime:
    streamed = _layers(shape, device, work)
    resident = _layers(shape, device, replace(work, loaded_tokens=0, stored_tokens=0))
    copied = shape.layers * (work.loaded_tokens + work.stored_tokens) * shape.kv_bytes_of_layer
    return PassTime(
        seconds=step_seconds(streamed, stream),
        compute_s=sum(layer.compute_s for layer in resident),
        link_s=copied / stream.link_bytes_per_s,
    )


def _layers(shape: ModelShape, device: Device, work: _Work) -> list[LayerWork]:
    kv = shape.kv_bytes_of_layer
    layer = LayerWork(
        before_s=_product_s(device, shape, shape.qkv_parameters, work.tokens),
        attention_s=max(
            (work.read_tokens + work.loaded_tokens) * kv / device.memory_bytes_per_s,
            shape.attention_flops_of_layer * work.pairs / device.attention_flops_per_s,
        ),
        after_s=_product_s(device, shape, shape.layer_parameters - shape.qkv_parameters, work.tokens),
        load_bytes=work.loaded_tokens * kv,
        store_bytes=work.stored_tokens * kv,
    )
    head_s = _product_s(device, shape, shape.head_parameters, work.sequences)
    return [layer] * (shape.layers - 1) + [replace(layer, after_s=layer.after_s + head_s)]


def _product_s(device: Device, shape: ModelShape, parameters: int, rows: int) -> float:
    """A product of `rows` vectors with a matrix of so many parameters."""
    read_s = parameters * shape.element_bytes / device.memory_bytes_per_s
    return max(read_s, 2 * parameters * rows / device.flops_per_s)
