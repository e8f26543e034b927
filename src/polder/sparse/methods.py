"""Ways to make units and to select them: Polder's own, and those that it is compared with.

| method | units | index |
|---|---|---|
| `polder` | key bisection | 4-bit keys of all tokens |
| `quest`  | neighbours in the text | the least and the greatest value of each channel: bounds of a logit (Quest, InfLLM's blocks) |
| `medoid` | key bisection | the token nearest to a unit's mean, which stands for all of it (Swarm's index) |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.sparse.codes import KeyCodes, encode
from polder.sparse.ordering import bisect, query_metric
from polder.sparse.selection import unit_shares

__all__ = ["METHODS", "Index", "Method", "index_of", "order_of"]

Floats = npt.NDArray[np.float32]
Method = Literal["polder", "quest", "medoid"]
METHODS: tuple[Method, ...] = get_args(Method)


class Index(Protocol):
    """What is kept beside the compute to select units of one layer."""

    def shares(self, query: Floats, exact: Floats, exact_tokens: int, *, scale: float) -> tuple[Floats, float]:
        """As `selection.unit_shares`."""


def order_of(method: Method, keys: Floats, moment: Floats, unit: int) -> IntArray:
    """Tokens in the order of their units. `keys`: [KV heads, n, d]; `moment`: sum q q^T of queries, [KV heads, d, d]."""
    if method == "quest":
        return np.arange(keys.shape[1], dtype=np.int64)
    points = [(head - head.mean(axis=0)) @ query_metric(own) for head, own in zip(keys, moment, strict=True)]
    return bisect(np.concatenate(points, axis=1), unit)


def index_of(method: Method, keys: Floats, unit: int) -> Index:
    """`keys`: [KV heads, n, d] in the order of their units."""
    if method == "polder":
        return _Codes(codes=encode(keys), unit=unit)
    units = keys.reshape(len(keys), -1, unit, keys.shape[-1])
    if method == "quest":
        return _Bounds(low=units.min(axis=2), high=units.max(axis=2), unit=unit)
    distances = ((units - units.mean(axis=2, keepdims=True)) ** 2).sum(axis=(0, 3))
    nearest = distances.argmin(axis=1)
    return _Medoids(keys=units[:, np.arange(len(nearest)), nearest], unit=unit)


@dataclass(frozen=True, kw_only=True)
class _Codes:
    codes: KeyCodes
    unit: int

    def shares(self, query: Floats, exact: Floats, exact_tokens: int, *, scale: float) -> tuple[Floats, float]:
        return unit_shares(query, self.codes, exact, exact_tokens, scale=scale, unit=self.unit)


@dataclass(frozen=True, kw_only=True)
class _Bounds:
    low: Floats
    high: Floats
    """[KV heads, units, d]"""
    unit: int

    def shares(self, query: Floats, exact: Floats, exact_tokens: int, *, scale: float) -> tuple[Floats, float]:
        by_head = _by_kv_head(query, len(self.low)) * np.float32(scale)
        above, below = np.maximum(by_head, 0), np.minimum(by_head, 0)
        logits = above @ self.high.transpose(0, 2, 1) + below @ self.low.transpose(0, 2, 1)
        return _softmax(logits + np.log(self.unit), by_head, exact[:, :exact_tokens])


@dataclass(frozen=True, kw_only=True)
class _Medoids:
    keys: Floats
    """[KV heads, units, d]"""
    unit: int

    def shares(self, query: Floats, exact: Floats, exact_tokens: int, *, scale: float) -> tuple[Floats, float]:
        by_head = _by_kv_head(query, len(self.keys)) * np.float32(scale)
        logits = by_head @ self.keys.transpose(0, 2, 1) + np.log(self.unit)
        return _softmax(logits, by_head, exact[:, :exact_tokens])


def _by_kv_head(query: Floats, kv_heads: int) -> Floats:
    """[heads, d] -> [KV heads, heads of each, d]"""
    return query.reshape(kv_heads, -1, query.shape[-1])


def _softmax(logits: Floats, query: Floats, exact: Floats) -> tuple[Floats, float]:
    """Shares from the logits of whole units [KV heads, heads of each, units] and the exact keys."""
    every = np.concatenate([logits, query @ exact.transpose(0, 2, 1)], axis=2).astype(np.float32)
    every = np.exp(every - every.max(axis=2, keepdims=True))
    every /= every.sum(axis=2, keepdims=True) * (query.shape[0] * query.shape[1])
    shares: Floats = every[:, :, : logits.shape[2]].sum(axis=(0, 1))
    return shares, float(every[:, :, logits.shape[2] :].sum())
