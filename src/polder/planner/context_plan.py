"""What to expect of a model on a device: the longest context, and its concurrency, TTFT and TBT.

A **regular** block has the KV of all L layers in device memory. A **windowed** block has room for w layers there, which
rotate, and the KV of all L layers in external memory: the host's, or an idle neighbour's (SwiftCache, arXiv 2606.16135,
section 3.2, with w = 1). Windowed blocks are copied in every step, so a context gets no more of them than it needs.

A matrix product takes the longer of two times, reading its weights and its FLOPs; attention that of its FLOPs and of
reading the KV, plus writing what the link brings. Launches, scheduling and sampling are not included:
times are lower bounds, best for steps of 5 ms and more.
"""

from __future__ import annotations

import sys
from bisect import bisect_right
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from polder.errors import BudgetError, ConfigError
from polder.planner.context_cost import LayerWork, Stream, streamed_seconds
from polder.planner.devices import Device, Link
from polder.planner.model_shape import ModelShape
from polder.units import format_bytes

__all__ = ["Capacity", "Outlook", "PassTime", "Setup", "Source", "kv_bytes_left"]

UTILIZATION = 0.92
"""vLLM's default part of the device's memory."""
BLOCK_TOKENS = 16
FIRST_CONTEXT = 8192


class Capacity(NamedTuple):
    """Room for KV in blocks."""

    layers: int
    window_layers: int
    """w"""
    local_layer_blocks: int
    """K_master, equation (3): blocks of a single layer that the device holds."""
    external_blocks: int
    """Sum of K_i, equation (2): blocks of all layers that external memory holds."""

    @property
    def blocks(self) -> int:
        """The most blocks of one context: as many windowed ones as possible, equation (4), then regular ones, (5)."""
        windowed = min(self.external_blocks, self.local_layer_blocks // self.window_layers)
        return windowed + (self.local_layer_blocks - self.window_layers * windowed) // self.layers

    def windowed(self, blocks: int) -> int:
        """The fewest windowed ones of n = `blocks` that fit: ceil((n L - K_master) / (L - w))."""
        missing = max(0, blocks * self.layers - self.local_layer_blocks)
        return -(-missing // max(1, self.layers - self.window_layers))


class PassTime(NamedTuple):
    """Seconds of one or more forward passes."""

    seconds: float
    compute_s: float
    """Time of the same passes with all KV local."""
    link_s: float

    @property
    def hidden_part(self) -> float | None:
        """Part of the copies' time that is under computing; None when nothing is copied.

        0 also where copies cost more than their own time, because they write to the memory that attention reads.
        """
        return max(0.0, 1 - (self.seconds - self.compute_s) / self.link_s) if self.link_s else None


@dataclass(frozen=True, kw_only=True)
class Source:
    """External memory for windowed KV. Without a link there is none: stock vLLM."""

    name: str = "stock vLLM"
    size_bytes: int = 0
    link: Link | None = None


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """One context with one source. A field is None where it does not apply: no room, or nothing is streamed."""

    source: str
    context_tokens: int
    fits: bool
    at_once: int
    """Sequences of that length that fit together."""
    windowed_part: float | None = None
    """Part of one sequence's blocks."""
    ttft_s: float | None = None
    """Alone on the device, nothing of the prompt cached."""
    ttft_hidden_part: float | None = None
    """Part of the copies' time that is under computing."""
    tbt_s: float | None = None
    """For one sequence."""
    tbt_hidden_part: float | None = None
    tbt_all_s: float | None = None
    """For as many as fit together."""


def kv_bytes_left(shape: ModelShape, device: Device, chunk_tokens: int) -> int:
    """What weights and the activations of one chunk leave for KV. Raises BudgetError when that is nothing."""
    left = int(UTILIZATION * device.memory_bytes) - shape.weight_bytes - chunk_tokens * shape.activation_bytes_per_token
    if left <= 0:
        raise BudgetError(
            f"{shape.name}: {format_bytes(shape.weight_bytes)} of weights and a chunk's activations are {format_bytes(-left)} "
            f"more than {UTILIZATION:.0%} of {format_bytes(device.memory_bytes)}: choose a larger device or a smaller --chunk"
        )
    return left


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model on a device. Raises ConfigError for a window that is no window."""

    shape: ModelShape
    device: Device
    window_layers: int
    chunk_tokens: int

    def check(self, source: Source) -> None:
        """Raises ConfigError for windowed KV of a model that Polder's window does not take."""
        if source.link is not None and not self.shape.kv.plain:
            raise ConfigError(
                f"{self.shape.name} has {'latent attention' if self.shape.kv.latent_dim else 'windows or KV of another type'}: "
                "Polder's window is for full attention only. Leave out --host and --neighbours"
            )

    def __post_init__(self) -> None:
        layers = self.shape.layers
        if not 1 <= self.window_layers <= layers:
            raise ConfigError(f"window: {self.window_layers} of {layers} layers; write a number from 1 to that")

    @cached_property
    def local_bytes(self) -> int:
        """Raises BudgetError when the weights leave nothing for KV."""
        return kv_bytes_left(self.shape, self.device, self.chunk_tokens)

    def capacity(self, source: Source) -> Capacity:
        layer_bytes = BLOCK_TOKENS * self.shape.kv_bytes_of_layer  # M_block, equation (1)
        return Capacity(
            layers=self.shape.layers,
            window_layers=self.window_layers,
            local_layer_blocks=self.local_bytes // layer_bytes,
            external_blocks=source.size_bytes // (layer_bytes * self.shape.layers),
        )

    def longest_tokens(self, source: Source) -> int:
        """That memory holds; a model's own limit may be less."""
        if not self.shape.kv.windowed_layers:
            return self.capacity(source).blocks * BLOCK_TOKENS
        # Layers with a window keep no more than it; one with nothing but such layers has no bound.
        kv = self.shape.kv
        rest = self.local_bytes - kv.windowed_layers * kv.window_tokens * self.shape.kv_bytes_of_layer
        full = (kv.layers - kv.windowed_layers) * self.shape.kv_bytes_of_layer
        longest = rest // full if full and rest > 0 else self.local_bytes // self.shape.kv_bytes_per_token
        if not full:
            longest = max(longest, self.shape.trained_tokens or 0)
        return longest // BLOCK_TOKENS * BLOCK_TOKENS

    def longest_within(self, source: Source, goal_s: float) -> int:
        """The longest context whose lone sequence gets its tokens in time, in whole blocks; 0 when none does."""
        tokens = range(BLOCK_TOKENS, self.longest_tokens(source) + 1, BLOCK_TOKENS)
        return BLOCK_TOKENS * bisect_right(tokens, goal_s, key=lambda n: self.decode(source, n).seconds)

    def outlooks(self, source: Source, asked_tokens: int | None) -> list[Outlook]:
        """For contexts that double up to the longest that memory and the model allow, that one, and the one that was
        asked for."""
        longest = min(self.longest_tokens(source), self.shape.trained_tokens or sys.maxsize)
        shown = {longest, asked_tokens or 0} - {0}
        context = FIRST_CONTEXT
        while context < longest:
            shown.add(context)
            context *= 2
        return [self.outlook(source, context) for context in sorted(shown)]

    def outlook(self, source: Source, context_tokens: int) -> Outlook:
        capacity, blocks = self.capacity(source), -(-context_tokens // BLOCK_TOKENS)
        at_once = capacity.blocks // blocks
        if self.shape.kv.windowed_layers:
            at_once = self.local_bytes // self.shape.kv_bytes(context_tokens)
        if at_once == 0:
            return Outlook(source=source.name, context_tokens=context_tokens, fits=False, at_once=0)
        prefill, decode = self.prefill(source, context_tokens), self.decode(source, context_tokens)
        return Outlook(
            source=source.name,
            context_tokens=context_tokens,
            fits=True,
            at_once=at_once,
            windowed_part=capacity.windowed(blocks) / blocks,
            ttft_s=prefill.seconds,
            ttft_hidden_part=prefill.hidden_part,
            tbt_s=decode.seconds,
            tbt_hidden_part=decode.hidden_part,
            tbt_all_s=self.decode(source, context_tokens, at_once).seconds,
        )

    def prefill(self, source: Source, context_tokens: int) -> PassTime:
        """A prompt alone on the device, in chunks. Each chunk reads what came before; the last tokens are windowed."""
        regular = context_tokens - self._windowed_tokens(source, context_tokens, 1)
        passes = []
        for start in range(0, context_tokens, self.chunk_tokens):
            end = min(start + self.chunk_tokens, context_tokens)
            pairs, loaded = (end - start) * (start + end) / 2, max(0, start - regular)
            stored = max(0, end - regular) - loaded
            passes.append(self._pass(source, end - start, end, pairs, 1, loaded, stored))
        return PassTime(*map(sum, zip(*passes, strict=True)))

    def decode(self, source: Source, context_tokens: int, sequences: int = 1) -> PassTime:
        """One step in which each sequence gets a token: weights and all KV are read once, windowed KV comes in."""
        total = context_tokens * sequences
        loaded = self._windowed_tokens(source, context_tokens, sequences)
        return self._pass(source, sequences, total, total, sequences, loaded, sequences if loaded else 0)

    def _windowed_tokens(self, source: Source, context_tokens: int, sequences: int) -> int:
        blocks = self.capacity(source).windowed(sequences * -(-context_tokens // BLOCK_TOKENS))
        return min(blocks * BLOCK_TOKENS, context_tokens * sequences)

    def _pass(
        self, source: Source, rows: int, read: int, pairs: float, sequences: int, loaded: int, stored: int
    ) -> PassTime:
        """One forward pass that computes `rows` tokens.

        In each layer attention reads the KV of `read` tokens for `pairs` pairs of a query and a key; windowed KV of
        `loaded` tokens is copied in, of `stored` tokens out.
        """
        shape, device, kv = self.shape, self.device, self.shape.kv_bytes_of_layer
        local = LayerWork(
            before_s=self._product_s(shape.qkv_parameters, shape.qkv_parameters, rows, shape.weight_element_bytes),
            attention_s=shape.kv.attended(read / sequences)
            / (read / sequences)
            * max(read * kv / device.memory_bytes_per_s, self._attention_s(pairs)),
            after_s=self._product_s(*shape.used_parameters(rows), rows, shape.weight_element_bytes),
        )
        head = shape.head_parameters
        head_s = self._product_s(head, head, sequences, shape.element_bytes)
        compute_s = shape.layers * local.compute_s + head_s
        if source.link is None or not loaded + stored:
            return PassTime(compute_s, compute_s, 0.0)
        windowed = replace(
            local,
            attention_s=max((read + loaded) * kv / device.memory_bytes_per_s, self._attention_s(pairs)),
            load_bytes=loaded * kv,
            store_bytes=stored * kv,
        )
        layers = [windowed] * (shape.layers - 1) + [replace(windowed, after_s=windowed.after_s + head_s)]
        stream = Stream(link_bytes_per_s=source.link.bytes_per_s, window_layers=self.window_layers)
        copied_s = (loaded + stored) * shape.kv_bytes_per_token / source.link.bytes_per_s
        return PassTime(streamed_seconds(layers, stream), compute_s, copied_s)

    def _attention_s(self, pairs: float) -> float:
        return self.shape.attention_flops_of_layer * pairs / self.device.attention_flops_per_s

    def _product_s(self, read: int, used: int, rows: int, element_bytes: float) -> float:
        """A product of `rows` vectors with matrices: `read` parameters come from memory, each vector uses `used`."""
        return max(read * element_bytes / self.device.memory_bytes_per_s, 2 * used * rows / self.device.flops_per_s)
