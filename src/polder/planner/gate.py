"""How much of a hit in the tiers is worth loading. A tier that is slower than recomputing is not used (law 7).

A prefix of n blocks was found in tiers. Its first c blocks are loaded, the other n - c blocks are computed, and the
request waits for both. A load takes as long as its slowest link, including what is queued there:

    seconds(c) = overhead + max over links of (queued + bytes(c)) / bandwidth + (n - c) * tokens * seconds_per_token

The best c is chosen. It is 0, n, or a number between if a fast tier holds the head of the prefix and a slow one the
tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from polder.arrays import IntArray

__all__ = ["Cut", "best_cut"]


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The decision: load the first `blocks` blocks."""

    blocks: int
    load_s: float
    """Expected time until they are there."""
    recompute_s: float
    """Expected time to compute the same blocks."""


def best_cut(
    links: IntArray,
    *,
    block_bytes: float,
    block_tokens: int,
    seconds_per_byte: Mapping[int, float],
    queued_bytes: Mapping[int, float],
    seconds_per_token: float,
    overhead_s: float,
) -> Cut:
    """The best number of blocks to load.

    `links`: shape [n], the link of block i of the prefix. A link that is missing from `seconds_per_byte` was never
    measured. It costs nothing here, so that the first load measures it.
    """
    n = len(links)
    counts = np.arange(n + 1, dtype=np.float64)
    load = np.zeros(n + 1)
    for link in np.unique(links).tolist():
        cost = seconds_per_byte.get(link, 0.0)
        mine = np.concatenate(([0], np.cumsum(links == link)))
        load = np.maximum(load, np.where(mine > 0, cost * (queued_bytes.get(link, 0.0) + mine * block_bytes), 0.0))
    load[1:] += overhead_s
    recompute = counts * (block_tokens * seconds_per_token)
    # Of equal choices the longer load wins: it saves compute that other requests can use.
    gain = recompute - load
    best = int(n - np.argmax(gain[::-1]))
    return Cut(blocks=best, load_s=float(load[best]), recompute_s=float(recompute[best]))
