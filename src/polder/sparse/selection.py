"""A query's share of attention for each unit, and the best units that are not there yet: compiled, without the GIL.

The logits of the prefix come from the keys' codes, those of the first and last tokens, which are always attended to,
from exact keys. Each head has one softmax over all of them, and a unit's score is the sum of its tokens' shares over
all heads of the layer. Attention mass decides which units are best, not how many are enough: a selection with 96 % of the
mass can still change every token.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from polder.sparse.codes import KeyCodes
from polder.sparse.compiled import compiled

__all__ = ["best", "unit_shares"]

Floats = npt.NDArray[np.float32]

CHUNK = 256
"""Tokens whose logits are computed together: their accumulators stay in the first cache."""


def unit_shares(
    query: Floats, codes: KeyCodes, exact: Floats, exact_tokens: int, *, scale: float, unit: int
) -> tuple[Floats, float]:
    """(share of attention of each unit [units], as a mean of the heads; that of the exact keys).

    `query`: [heads, d], heads of one KV head side by side. `exact`: [KV heads, at least exact_tokens, d]. Both are
    C-contiguous.
    """
    shares = np.zeros(codes.nibbles.shape[2] // unit, np.float32)
    scaled = query * np.float32(scale)
    rest = _add_shares(scaled, codes.nibbles, codes.low, codes.step, exact, exact_tokens, unit, shares)
    return shares, float(rest)


def best(shares: Floats, count: int) -> npt.NDArray[np.int64]:
    """The `count` units with the highest shares, the highest first."""
    count = min(count, len(shares))
    if not count:
        return np.empty(0, np.int64)
    found = np.argpartition(shares, len(shares) - count)[len(shares) - count :]
    ordered: npt.NDArray[np.int64] = found[np.argsort(-shares[found], kind="stable")]
    return ordered


@compiled
def _add_shares(query: Any, nibbles: Any, low: Any, step: Any, exact: Any, rests: int, unit: int, shares: Any) -> float:
    kv_heads, halves, tokens = nibbles.shape
    heads, d = query.shape
    group = heads // kv_heads
    logits = np.empty((group, tokens + rests), np.float32)
    even, odd = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    total_rest = np.float32(0.0)
    for h in range(kv_heads):
        for start in range(0, tokens, CHUNK):
            size = min(CHUNK, tokens - start)
            for g in range(group):
                constant = np.float32(0.0)
                for c in range(d):
                    constant += query[h * group + g, c] * low[h, c]
                for t in range(size):
                    logits[g, start + t] = constant
            for c in range(halves):
                row = nibbles[h, c, start : start + size]
                for t in range(size):
                    even[t] = np.float32(row[t] & 15)
                    odd[t] = np.float32(row[t] >> 4)
                for g in range(group):
                    a = query[h * group + g, 2 * c] * step[h, 2 * c]
                    b = query[h * group + g, 2 * c + 1] * step[h, 2 * c + 1]
                    into = logits[g, start : start + size]
                    for t in range(size):
                        into[t] += a * even[t] + b * odd[t]
        for g in range(group):
            values = logits[g]
            for r in range(rests):
                value = np.float32(0.0)
                for c in range(d):
                    value += query[h * group + g, c] * exact[h, r, c]
                values[tokens + r] = value
            highest = values[0]
            for t in range(tokens + rests):
                highest = max(highest, values[t])
            bits = values.view(np.int32)
            for t in range(tokens + rests):  # e to the power of what is at most 0; errs by 3e-6 of it
                x = max((values[t] - highest) * np.float32(1.4426950408889634), np.float32(-125.0))
                whole = np.int32(x) - np.int32(1)
                part = x - np.float32(whole)
                power = np.float32(1.8775767e-3)
                power = power * part + np.float32(8.9893397e-3)
                power = power * part + np.float32(5.5826318e-2)
                power = power * part + np.float32(2.4015361e-1)
                power = power * part + np.float32(6.9315308e-1)
                power = power * part + np.float32(9.9999994e-1)
                values[t] = power
                bits[t] += whole << np.int32(23)
            rest = np.float32(0.0)
            for r in range(tokens, tokens + rests):
                rest += values[r]
            total = rest
            for t in range(tokens):
                total += values[t]
            of_all = np.float32(1.0) / (total * np.float32(heads))
            for u in range(shares.shape[0]):
                mass = np.float32(0.0)
                for t in range(u * unit, (u + 1) * unit):
                    mass += values[t]
                shares[u] += mass * of_all
            total_rest += rest * of_all
    return float(total_rest)
