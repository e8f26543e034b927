"""What to expect of a model on a device, with all KV local and with Polder's window over each source of external memory.

Pure: sizes and sustained speeds in, figures out. `planner/context.py` has the capacities, `planner/context_cost.py` the times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polder.errors import BudgetError, ConfigError
from polder.planner.context import (
    Capacity,
    block_bytes_of_layer,
    contexts_at_once,
    full_blocks,
    local_layer_blocks,
    longest_context,
    split,
)
from polder.planner.context_cost import PassTime, Stream, decode_seconds, prefill_seconds
from polder.planner.devices import Device, Link
from polder.planner.model_shape import ModelShape
from polder.units import format_bytes

__all__ = [
    "STOCK",
    "Outlook",
    "Setup",
    "Source",
    "check_fits",
    "contexts_to_show",
    "lendable_bytes",
    "link_of",
    "local_kv_bytes",
]

UTILIZATION = 0.92
"""vLLM 0.32's default part of the device's memory."""
BLOCK_TOKENS = 16
FIRST_CONTEXT = 8192


def local_kv_bytes(shape: ModelShape, memory_bytes: int, chunk_tokens: int, utilization: float = UTILIZATION) -> int:
    """What weights and the activations of one chunk leave for KV; negative when they do not fit themselves."""
    return int(utilization * memory_bytes) - shape.weight_bytes - chunk_tokens * shape.activation_bytes_per_token


def lendable_bytes(shape: ModelShape, device: Device, chunk_tokens: int) -> int:
    """What an idle neighbour with that model can lend: all of its KV memory. Raises BudgetError when it has none."""
    return _above_zero(shape, device, local_kv_bytes(shape, device.memory_bytes, chunk_tokens))


@dataclass(frozen=True, kw_only=True)
class Source:
    """External memory for windowed KV. Without a link it is no memory: stock vLLM."""

    name: str
    size_bytes: int = 0
    link: Link | None = None


STOCK = Source(name="stock vLLM")


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """One context with one source. What is None does not apply: it does not fit, or nothing is streamed."""

    source: str
    context_tokens: int
    fits: bool
    at_once: int
    """Sequences of that length that fit together."""
    windowed_part: float | None = None
    """Of one sequence's blocks."""
    ttft_s: float | None = None
    """Alone on the device, nothing of the prompt cached."""
    ttft_hidden_part: float | None = None
    """Part of the copies' time that is under computing."""
    tbt_s: float | None = None
    """One sequence."""
    tbt_hidden_part: float | None = None
    tbt_all_s: float | None = None
    """As many as fit together."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    shape: ModelShape
    device: Device
    window_layers: int
    chunk_tokens: int

    @property
    def local_bytes(self) -> int:
        """Raises BudgetError when the weights leave nothing."""
        free = local_kv_bytes(self.shape, self.device.memory_bytes, self.chunk_tokens)
        return _above_zero(self.shape, self.device, free)

    def capacity(self, source: Source) -> Capacity:
        shape = self.shape
        block_bytes = block_bytes_of_layer(BLOCK_TOKENS, shape.kv_heads, shape.head_dim, shape.element_bytes)
        return Capacity(
            block_tokens=BLOCK_TOKENS,
            layers=shape.layers,
            window_layers=self.window_layers,
            local_layer_blocks=local_layer_blocks(self.local_bytes, block_bytes),
            external_blocks=full_blocks(source.size_bytes, block_bytes, shape.layers),
        )

    def longest(self, source: Source) -> int:
        return longest_context(self.capacity(source))

    def outlook(self, source: Source, context_tokens: int) -> Outlook:
        capacity = self.capacity(source)
        at_once = contexts_at_once(context_tokens, capacity)
        if at_once == 0:
            return Outlook(source=source.name, context_tokens=context_tokens, fits=False, at_once=0)
        regions = split(context_tokens, capacity)
        windowed = min(regions.windowed_tokens, context_tokens)
        prefill = prefill_seconds(
            self.shape, self.device, context_tokens, self.chunk_tokens, windowed, self._stream(source)
        )
        decode = self._decode(source, capacity, context_tokens, 1)
        return Outlook(
            source=source.name,
            context_tokens=context_tokens,
            fits=True,
            at_once=at_once,
            windowed_part=regions.windowed_part,
            ttft_s=prefill.seconds,
            ttft_hidden_part=prefill.hidden_part,
            tbt_s=decode.seconds,
            tbt_hidden_part=decode.hidden_part,
            tbt_all_s=self._decode(source, capacity, context_tokens, at_once).seconds,
        )

    def longest_within(self, source: Source, tbt_goal_s: float) -> int:
        """The longest context whose lone sequence gets its tokens in time, in whole blocks; 0 when none does."""
        capacity = self.capacity(source)
        low, high = 0, capacity.longest_blocks
        while low < high:
            blocks = (low + high + 1) // 2
            if self._decode(source, capacity, blocks * BLOCK_TOKENS, 1).seconds <= tbt_goal_s:
                low = blocks
            else:
                high = blocks - 1
        return low * BLOCK_TOKENS

    def _decode(self, source: Source, capacity: Capacity, context_tokens: int, sequences: int) -> PassTime:
        windowed = split(context_tokens, capacity, sequences=sequences).windowed_tokens
        windowed = min(windowed, context_tokens * sequences)
        return decode_seconds(self.shape, self.device, context_tokens, sequences, windowed, self._stream(source))

    def _stream(self, source: Source) -> Stream:
        if source.link is None:
            return Stream()
        return Stream(link_bytes_per_s=source.link.bytes_per_s, window_layers=self.window_layers)


def contexts_to_show(longest_tokens: int, asked_tokens: int | None) -> Sequence[int]:
    """Doubling up to the longest, the longest, and the one that was asked for."""
    shown = {longest_tokens} if longest_tokens else set()
    context = FIRST_CONTEXT
    while context < longest_tokens:
        shown.add(context)
        context *= 2
    return sorted(shown | ({asked_tokens} if asked_tokens else set()))


def check_fits(setup: Setup, sources: Sequence[Source], context_tokens: int) -> None:
    """Raises BudgetError with what each source makes possible when no one of them makes this context possible."""
    longest = {source.name: setup.longest(source) for source in sources}
    if context_tokens > max(longest.values()):
        possible = "; ".join(f"{tokens:,} with {name}" for name, tokens in longest.items())
        raise BudgetError(
            f"context: {context_tokens:,} tokens do not fit. The longest context possible is {possible}. "
            "More --host, more --neighbours or a smaller --window make longer ones possible"
        )


def link_of(device: Device, kind: str) -> Link:
    """The device's "host" or "peer" link. Raises ConfigError when it is not known."""
    link = device.host_link if kind == "host" else device.peer_link
    if link is None:
        raise ConfigError(f"link: nothing is known of the {kind} link of {device.name}: give --link {kind}=55GB/s")
    return link


def _above_zero(shape: ModelShape, device: Device, free_bytes: int) -> int:
    if free_bytes <= 0:
        raise BudgetError(
            f"{shape.name} on {device.name}: {format_bytes(shape.weight_bytes)} of weights and a chunk's activations are "
            f"{format_bytes(-free_bytes)} more than {UTILIZATION:.0%} of {format_bytes(device.memory_bytes)}"
        )
    return free_bytes
