"""How long a context with a window may be, so that its tokens come in time.

A decode step computes the model once, attends to the whole context, and waits for the windowed part of it:

    step = even_step_seconds(step_s + token_s * tokens, bytes of the windowed blocks)

An engine measures all of these when it starts: passes of its model without and with a context, the window's copies
without computing, and both at once. The cost of threads and wake-ups is in no formula. So some real steps with windowed
blocks are measured too, and no step is predicted to be faster than those. Sampling, scheduling and other requests of
the batch are not included.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass

from polder.planner.context_cost import Stream, even_step_seconds

__all__ = ["StepFigures", "decode_step_seconds", "longest_within"]


@dataclass(frozen=True, kw_only=True)
class StepFigures:
    """Measured on one engine."""

    layers: int
    window_layers: int
    block_bytes: int
    """Bytes of one layer of a block."""
    block_tokens: int
    step_s: float
    """One token through the model, with next to no context."""
    token_s: float
    """Additional time for each token of context."""
    overhead_s: float
    """Cost of a layer with copies, besides their bytes."""
    link_bytes_per_s: float
    contention_s_per_byte: float = 0.0
    """Additional time for each byte copied meanwhile."""
    windowed_steps: tuple[tuple[int, float], ...] = ()
    """(windowed blocks, by how much a step with them took longer), in rising order."""

    @property
    def stream(self) -> Stream:
        return Stream(
            link_bytes_per_s=self.link_bytes_per_s,
            window_layers=self.window_layers,
            overhead_s=self.overhead_s,
            contention_s_per_byte=self.contention_s_per_byte,
            least_s=tuple((float(blocks * self.block_bytes), more_s) for blocks, more_s in self.windowed_steps),
        )


def decode_step_seconds(figures: StepFigures, context_tokens: int, windowed_blocks: int) -> float:
    """Predicted seconds of one sequence's next token."""
    return even_step_seconds(
        figures.step_s + figures.token_s * context_tokens,
        figures.layers,
        figures.stream,
        load_bytes=windowed_blocks * figures.block_bytes,
        store_bytes=min(1, windowed_blocks) * figures.block_bytes,
    )


def longest_within(figures: StepFigures, goal_s: float, most_tokens: int, windowed_blocks: Callable[[int], int]) -> int:
    """The longest context, in whole blocks and `most_tokens` at most, that needs no window or whose tokens come within
    `goal_s`.

    `windowed_blocks(tokens)`: how many a context of so many tokens needs; it must not fall. A context without windowed
    blocks is in time by definition: no window could make it faster.
    """
    size = figures.block_tokens

    def in_time(tokens: int) -> bool:
        windowed = windowed_blocks(tokens)
        return not windowed or decode_step_seconds(figures, tokens, windowed) <= goal_s

    if in_time(most_tokens):
        return most_tokens
    blocks = range(1, most_tokens // size + 1)
    return size * bisect_left(blocks, True, key=lambda count: not in_time(count * size))
