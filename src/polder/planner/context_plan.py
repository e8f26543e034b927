"""What to expect of a model on a device, with all KV local and with a window over each source of external memory.

Sizes and sustained speeds in, figures out. Capacities: planner/context.py; times: planner/context_cost.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from polder.errors import BudgetError, ConfigError
from polder.planner.context import Capacity
from polder.planner.context_cost import PassTime, Stream, decode_seconds, prefill_seconds
from polder.planner.devices import Device, Link
from polder.planner.model_shape import ModelShape
from polder.units import format_bytes

__all__ = ["Outlook", "Setup", "Source", "contexts_to_show", "kv_bytes_left", "link_of"]

UTILIZATION = 0.92
"""vLLM's default part of the device's memory."""
BLOCK_TOKENS = 16
FIRST_CONTEXT = 8192


def kv_bytes_left(shape: ModelShape, memory_bytes: int, chunk_tokens: int, utilization: float = UTILIZATION) -> int:
    """What weights and the activations of one chunk leave for KV. Raises BudgetError when that is nothing."""
    left = int(utilization * memory_bytes) - shape.weight_bytes - chunk_tokens * shape.activation_bytes_per_token
    if left <= 0:
        raise BudgetError(
            f"{shape.name}: {format_bytes(shape.weight_bytes)} of weights and a chunk's activations are {format_bytes(-left)} "
            f"more than {utilization:.0%} of {format_bytes(memory_bytes)}: choose a larger device or a smaller --chunk"
        )
    return left


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


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A model on a device. `local_bytes` raises BudgetError when the weights leave nothing for KV."""

    shape: ModelShape
    device: Device
    window_layers: int
    chunk_tokens: int

    @cached_property
    def local_bytes(self) -> int:
        return kv_bytes_left(self.shape, self.device.memory_bytes, self.chunk_tokens)

    def capacity(self, source: Source) -> Capacity:
        return Capacity.of_bytes(
            self.shape,
            local_bytes=self.local_bytes,
            external_bytes=source.size_bytes,
            block_tokens=BLOCK_TOKENS,
            window_layers=self.window_layers,
        )

    def outlook(self, source: Source, context_tokens: int) -> Outlook:
        capacity = self.capacity(source)
        at_once = capacity.at_once(context_tokens)
        if at_once == 0:
            return Outlook(source=source.name, context_tokens=context_tokens, fits=False, at_once=0)
        windowed = capacity.windowed(context_tokens)
        windowed_tokens = min(windowed * BLOCK_TOKENS, context_tokens)
        stream = self._stream(source)
        prefill = prefill_seconds(self.shape, self.device, context_tokens, self.chunk_tokens, windowed_tokens, stream)
        decode = self._decode(source, context_tokens, 1)
        return Outlook(
            source=source.name,
            context_tokens=context_tokens,
            fits=True,
            at_once=at_once,
            windowed_part=windowed / capacity.blocks(context_tokens),
            ttft_s=prefill.seconds,
            ttft_hidden_part=prefill.hidden_part,
            tbt_s=decode.seconds,
            tbt_hidden_part=decode.hidden_part,
            tbt_all_s=self._decode(source, context_tokens, at_once).seconds,
        )

    def longest_within(self, source: Source, tbt_goal_s: float) -> int:
        """The longest context whose lone sequence gets its tokens in time, in whole blocks; 0 when none does."""
        low, high = 0, self.capacity(source).longest_tokens // BLOCK_TOKENS
        while low < high:
            blocks = (low + high + 1) // 2
            if self._decode(source, blocks * BLOCK_TOKENS, 1).seconds <= tbt_goal_s:
                low = blocks
            else:
                high = blocks - 1
        return low * BLOCK_TOKENS

    def _decode(self, source: Source, context_tokens: int, sequences: int) -> PassTime:
        windowed = self.capacity(source).windowed(context_tokens, sequences) * BLOCK_TOKENS
        windowed = min(windowed, context_tokens * sequences)
        return decode_seconds(self.shape, self.device, context_tokens, sequences, windowed, self._stream(source))

    def _stream(self, source: Source) -> Stream:
        if source.link is None:
            return Stream()
        return Stream(link_bytes_per_s=source.link.bytes_per_s, window_layers=self.window_layers)


def contexts_to_show(longest_tokens: int, asked_tokens: int | None) -> Sequence[int]:
    """Doubling up to the longest, the longest, and the one that was asked for."""
    shown = {longest_tokens, asked_tokens or 0} - {0}
    context = FIRST_CONTEXT
    while context < longest_tokens:
        shown.add(context)
        context *= 2
    return sorted(shown)


def link_of(device: Device, kind: str) -> Link:
    """The device's "host" or "peer" link. Raises ConfigError when it is not known."""
    link = device.host_link if kind == "host" else device.peer_link
    if link is None:
        raise ConfigError(f"link: the {kind} link of {device.name} is not known: give --link {kind}=55GB/s")
    return link
