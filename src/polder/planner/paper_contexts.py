"""SwiftCache's table of longest contexts (section 5), beside what the same formulas give for the same set-ups.

The paper prints SwiftCache's longest context over that of an engine with all KV local, whose prefill is not chunked, in
chunks of 8K and of 32K tokens. A master and two workers have cards of one size. vLLM's part of the memory is 0.9 (its
default then), a block has 256 tokens, and the window is one layer. The paper does not say how much of their KV memory
the workers kept: here they lend all of it, and `implied_lent_bytes` is what would give the paper's ratio.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from polder.planner.context import Capacity
from polder.planner.context_plan import kv_bytes_left
from polder.planner.model_shape import KNOWN, ModelShape

__all__ = ["PaperComparison", "compare_with_paper"]

UTILIZATION = 0.9
BLOCK_TOKENS = 256
CHUNK, LONG_CHUNK = 8192, 32768
GIB = 1 << 30


class Ratios(NamedTuple):
    """Longest context over that of a prefill ..."""

    no_chunk: float
    chunk_8k: float
    chunk_32k: float


PAPER = (  # GiB of a card, master, the paper's ratios
    (96, "Qwen3-32B", Ratios(6.66, 2.78, 3.30)),
    (96, "LWM-7B-1M", Ratios(2.22, 1.76, 1.81)),
    (80, "Qwen3-32B", Ratios(6.38, 3.62, 5.44)),
    (80, "LWM-7B-1M", Ratios(2.45, 1.58, 1.87)),
    (32, "Qwen3-14B", Ratios(4.59, 3.98, 4.43)),
    (32, "LWM-7B-1M", Ratios(2.12, 1.66, 1.90)),
    (24, "Qwen3-8B", Ratios(6.15, 3.11, 4.94)),
    (24, "LWM-7B-1M", Ratios(3.18, 1.96, 2.55)),
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
    baseline_tokens: tuple[int, ...]
    """In the order of the ratios."""
    lent_bytes: int
    implied_lent_bytes: int
    """With which the formulas give the paper's ratio to chunks of 8K, its best baseline."""


def compare_with_paper() -> Iterator[PaperComparison]:
    for memory_gib, master, paper in PAPER:
        memory_bytes, shape = memory_gib * GIB, KNOWN[master]
        workers = ("Qwen3-8B" if memory_gib == 24 else "Qwen3-14B", "Qwen3-8B")
        lent = sum(kv_bytes_left(KNOWN[worker], memory_bytes, CHUNK, UTILIZATION) for worker in workers)
        baselines = tuple(_all_local(shape, memory_bytes, chunk) for chunk in (None, CHUNK, LONG_CHUNK))
        context = _capacity(shape, memory_bytes, lent).longest_tokens
        implied = _capacity(shape, memory_bytes, 1 << 60).windowed(round(paper.chunk_8k * baselines[1]))
        yield PaperComparison(
            memory_gib=memory_gib,
            master=master,
            workers=workers,
            paper=paper,
            ours=Ratios(*(context / baseline for baseline in baselines)),
            context_tokens=context,
            baseline_tokens=baselines,
            lent_bytes=lent,
            implied_lent_bytes=implied * BLOCK_TOKENS * shape.kv_bytes_per_token,
        )


def _capacity(shape: ModelShape, memory_bytes: int, lent_bytes: int) -> Capacity:
    local = kv_bytes_left(shape, memory_bytes, CHUNK, UTILIZATION)
    return Capacity.of_bytes(shape, local_bytes=local, external_bytes=lent_bytes, block_tokens=BLOCK_TOKENS)


def _all_local(shape: ModelShape, memory_bytes: int, chunk_tokens: int | None) -> int:
    """The longest context whose KV and whose chunk's activations fit together: a context shorter than its chunk is one
    chunk."""
    free = kv_bytes_left(shape, memory_bytes, 0, UTILIZATION)
    whole = free // (shape.kv_bytes_per_token + shape.activation_bytes_per_token)
    if chunk_tokens is None or whole <= chunk_tokens:
        return whole
    return (free - chunk_tokens * shape.activation_bytes_per_token) // shape.kv_bytes_per_token
