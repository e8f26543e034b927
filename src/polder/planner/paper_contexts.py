"""The table of longest contexts of SwiftCache, section 5, beside what the same formulas give for the same set-ups.

A master and two workers on cards of one size; the paper prints SwiftCache's longest context over that of an engine with all KV
local whose prefill is not chunked, in chunks of 8K and of 32K tokens. vLLM's part of the memory is 0.9 (its default then), blocks
have 256 tokens, and the window one layer, as in the paper's code. How much of their KV memory the workers kept is not published;
here they lend all of it, and `implied_lent_bytes` is what would give the paper's ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from polder.planner.context import (
    Capacity,
    block_bytes_of_layer,
    full_blocks,
    local_layer_blocks,
    longest_context,
    split,
)
from polder.planner.context_plan import local_kv_bytes
from polder.planner.model_shape import KNOWN, ModelShape

__all__ = ["PaperComparison", "compare_with_paper"]

UTILIZATION = 0.9
BLOCK_TOKENS = 256
GIB = 1 << 30
CHUNKS = (8192, 32768)
WIDE, NARROW = ("Qwen3-14B", "Qwen3-8B"), ("Qwen3-8B", "Qwen3-8B")


class Ratios(NamedTuple):
    """Longest context over that of a prefill ..."""

    no_chunk: float
    chunk_8k: float
    chunk_32k: float


PAPER = (  # GiB of a card, master, workers, the paper's ratios
    (96, "Qwen3-32B", WIDE, Ratios(6.66, 2.78, 3.30)),
    (96, "LWM-7B-1M", WIDE, Ratios(2.22, 1.76, 1.81)),
    (80, "Qwen3-32B", WIDE, Ratios(6.38, 3.62, 5.44)),
    (80, "LWM-7B-1M", WIDE, Ratios(2.45, 1.58, 1.87)),
    (32, "Qwen3-14B", WIDE, Ratios(4.59, 3.98, 4.43)),
    (32, "LWM-7B-1M", WIDE, Ratios(2.12, 1.66, 1.90)),
    (24, "Qwen3-8B", NARROW, Ratios(6.15, 3.11, 4.94)),
    (24, "LWM-7B-1M", NARROW, Ratios(3.18, 1.96, 2.55)),
)


@dataclass(frozen=True, kw_only=True)
class PaperComparison:
    memory_gib: int
    master: str
    workers: tuple[str, str]
    paper: Ratios
    ours: Ratios
    context_tokens: int
    """With all of the workers' KV memory, prefill in chunks of 8K."""
    baseline_tokens: tuple[int, int, int]
    """In the order of the ratios."""
    lent_bytes: int
    implied_lent_bytes: int
    """With which the formulas give the paper's ratio to chunks of 8K, its best baseline."""


def compare_with_paper() -> Sequence[PaperComparison]:
    return [_compare(*row) for row in PAPER]


def _compare(memory_gib: int, master: str, workers: tuple[str, str], paper: Ratios) -> PaperComparison:
    memory_bytes, shape = memory_gib * GIB, KNOWN[master]
    lent = sum(local_kv_bytes(KNOWN[worker], memory_bytes, CHUNKS[0], UTILIZATION) for worker in workers)
    baselines = (
        _all_local(shape, memory_bytes, None),
        _all_local(shape, memory_bytes, CHUNKS[0]),
        _all_local(shape, memory_bytes, CHUNKS[1]),
    )
    context = longest_context(_capacity(shape, memory_bytes, lent))
    unlimited = _capacity(shape, memory_bytes, 1 << 60)
    implied = split(round(paper.chunk_8k * baselines[1]), unlimited).windowed_tokens * shape.kv_bytes_per_token
    return PaperComparison(
        memory_gib=memory_gib,
        master=master,
        workers=workers,
        paper=paper,
        ours=Ratios(*(context / baseline for baseline in baselines)),
        context_tokens=context,
        baseline_tokens=baselines,
        lent_bytes=lent,
        implied_lent_bytes=implied,
    )


def _capacity(shape: ModelShape, memory_bytes: int, lent_bytes: int) -> Capacity:
    block_bytes = block_bytes_of_layer(BLOCK_TOKENS, shape.kv_heads, shape.head_dim, shape.element_bytes)
    local = local_kv_bytes(shape, memory_bytes, CHUNKS[0], UTILIZATION)
    return Capacity(
        block_tokens=BLOCK_TOKENS,
        layers=shape.layers,
        local_layer_blocks=local_layer_blocks(local, block_bytes),
        external_blocks=full_blocks(lent_bytes, block_bytes, shape.layers),
    )


def _all_local(shape: ModelShape, memory_bytes: int, chunk_tokens: int | None) -> int:
    """The longest context whose KV and whose chunk's activations fit together: a context shorter than its chunk is one chunk."""
    free = local_kv_bytes(shape, memory_bytes, 0, UTILIZATION)
    whole = free // (shape.kv_bytes_per_token + shape.activation_bytes_per_token)
    if chunk_tokens is None or whole <= chunk_tokens:
        return whole
    return (free - chunk_tokens * shape.activation_bytes_per_token) // shape.kv_bytes_per_token
