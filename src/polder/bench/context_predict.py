"""What the plan says of a windowed context, from what stock takes for the same one with all of it local.

Computing is measured, by stock with memory enough; the copies' part is the plan's (planner/context_cost.py): each layer's windowed
blocks arrive before its attention, in the window's order, at the rate and with the cost that the engine measured at its start.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from polder.bench.context_plan import OUTPUT_TOKENS, ContextPlan
from polder.bench.harness.engines import BLOCK_TOKENS
from polder.planner.context_cost import Stream, even_step_seconds

__all__ = ["planned_tbt_ms", "planned_ttft_ms"]


def planned_tbt_ms(plan: ContextPlan, stream: Stream, length: int, step_ms: float) -> float:
    """A decode step in the middle of the answer. `step_ms`: with all KV local."""
    blocks = plan.windowed_blocks(stream.window_layers, length - OUTPUT_TOKENS // 2)
    return _step_ms(plan, stream, step_ms, loaded=blocks, stored=min(1, blocks))


def planned_ttft_ms(plan: ContextPlan, stream: Stream, length: int, ttfts_ms: Mapping[int, float]) -> float:
    """The prompt's chunks, one after the other. `ttfts_ms`: by length, with all KV local; two lengths or more.

    A chunk's computing grows with what comes before it, so the whole is a n + b n^2 in chunks, fitted to the measured ones.
    """
    chunks = np.array([(n - OUTPUT_TOKENS) / plan.batched_tokens for n in ttfts_ms])
    weights = 1 / np.array(list(ttfts_ms.values()))  # short ones count as much as long ones
    terms = np.stack([chunks, chunks**2], axis=1)
    (linear, square), *_ = np.linalg.lstsq(terms * weights[:, None], np.ones(len(chunks)), rcond=None)
    windowed = plan.windowed_blocks(stream.window_layers, length - OUTPUT_TOKENS)
    regular = -(-(length - OUTPUT_TOKENS) // BLOCK_TOKENS) - windowed
    total = 0.0
    for start in range(0, length - OUTPUT_TOKENS, plan.batched_tokens):
        end = min(start + plan.batched_tokens, length - OUTPUT_TOKENS)
        first, last = start / plan.batched_tokens, end / plan.batched_tokens
        compute_ms = linear * (last - first) + square * (last**2 - first**2)
        before, after = -(-start // BLOCK_TOKENS), -(-end // BLOCK_TOKENS)
        loaded, stored = max(0, before - regular), max(0, after - max(before, regular))
        total += _step_ms(plan, stream, compute_ms, loaded=loaded, stored=stored)
    return float(total)


def _step_ms(plan: ContextPlan, stream: Stream, compute_ms: float, *, loaded: int, stored: int) -> float:
    """`loaded`, `stored`: blocks of a layer."""
    layers = plan.recipe.layers
    block_bytes = BLOCK_TOKENS * plan.recipe.kv_bytes_per_token / layers
    load_bytes, store_bytes = loaded * block_bytes, stored * block_bytes
    return 1e3 * even_step_seconds(compute_ms / 1e3, layers, stream, load_bytes=load_bytes, store_bytes=store_bytes)
