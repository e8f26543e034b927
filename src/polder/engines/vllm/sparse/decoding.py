"""A request that decodes sparsely, on one rank: what lies in its slots, and its own part of each layer of a step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from polder.engines.vllm.sparse.blocks import BlockFormat
from polder.engines.vllm.sparse.prefix import Prefix
from polder.sparse.selection import best
from polder.sparse.slots import Slots

__all__ = ["Decoding"]

ROOM = 256
"""Tokens by which the exact keys of the tail grow."""


class Decoding:
    """Slots of all layers are the same blocks; each layer has units of its own in them."""

    def __init__(self, formats: Sequence[BlockFormat], prefix: Prefix, *, selected: int, slots: int) -> None:
        """`selected`: units that each layer selects in a step, of which `slots` can lie in slots."""
        self.layout, self._formats, self._prefix = prefix.layout, formats, prefix
        self.selected, self.count = selected, slots
        self._slots = [Slots(prefix.layout.units, slots) for _ in formats]
        self._exact: list[np.ndarray[Any, Any]] = []
        self._tokens = 0
        """With exact keys: sinks and tail."""
        self.unread, self.wanted, self.read, self.failed = 0.0, 0, 0, 0
        """Of the last step, over its layers: sum of the estimated shares of attention that were not read; units."""

    def take_failed(self) -> int:
        """Units that could not be read since the last call, when the slots were filled too."""
        failed, self.failed = self.failed, 0
        return failed

    # ------------------------------------------------------------------ before the first step

    def keep_exact(self, blocks: Sequence[int], tokens: int) -> None:
        """Takes the keys of the sinks and of the tail out of the request's blocks; `tokens` of it are computed."""
        sinks, end = self.layout.sink_blocks, self.layout.end_block
        own = [*blocks[:sinks], *blocks[end : -(-tokens // self.layout.unit_tokens)]]
        self._tokens = tokens - self.layout.units * self.layout.unit_tokens
        self._exact = []
        for of in self._formats:
            keys = of.plain(own)[0][:, : self._tokens].float().numpy()
            self._exact.append(np.concatenate([keys, np.zeros((len(keys), ROOM, of.d), np.float32)], axis=1))

    def fill(self, blocks: Sequence[int], queries: Sequence[np.ndarray[Any, Any]]) -> bool:
        """Fills the slots, which are `blocks`, with what each layer's last query needs most. False: it failed."""
        places = np.array(blocks)
        for number, (of, layer) in enumerate(zip(self._formats, self._prefix.layers, strict=True)):
            shares, _ = self._shares(number, queries[number])
            left = best(shares, self.layout.units)
            units = np.full(self.count, -1)
            while (empty := np.flatnonzero(units < 0)).size:  # what cannot be read is left out for the next best
                if len(left) < len(empty):
                    return False
                some, left = left[: len(empty)], left[len(empty) :]
                there = layer.home.read(some, of.cache, places[empty])
                units[empty[there]] = some[there]
                self.failed += int(len(some) - there.sum())
            self._slots[number].fill(units)
        return True

    # ------------------------------------------------------------------ a step

    def begin(self, blocks: Sequence[int], done: int) -> None:
        """A step begins: the request has these blocks, and `done` tokens before it."""
        if self._tokens != done - self.layout.units * self.layout.unit_tokens:
            self.keep_exact(blocks, done)
        if self._tokens == self._exact[0].shape[1]:
            room = [
                np.zeros((len(keys), max(ROOM, keys.shape[1] // 2), keys.shape[2]), np.float32) for keys in self._exact
            ]
            self._exact = [np.concatenate(pair, axis=1) for pair in zip(self._exact, room, strict=True)]
        self._tokens += 1
        self._blocks = np.array(blocks[self.layout.sink_blocks : self.layout.sink_blocks + self.count])
        self.unread, self.wanted, self.read = 0.0, 0, 0

    def layer(self, number: int, query: torch.Tensor, key: torch.Tensor) -> None:
        """Before a layer's attention, its keys and values written: brings what this query, [heads, d], needs into the slots."""
        self._exact[number][:, self._tokens - 1] = key.float().numpy()
        if self.count == self.layout.units:
            return  # all of them are there
        shares, rest = self._shares(number, query.float().numpy())
        slots, of = self._slots[number], self._formats[number]
        missing, places = slots.want(best(shares, self.selected))
        if len(missing):
            there = self._prefix.layers[number].home.read(missing, of.cache, self._blocks[places])
            slots.put(missing[there], places[there])
            self.failed += int(len(missing) - there.sum())
        self.wanted += self.selected
        self.read += len(missing)
        self.unread += max(0.0, 1.0 - rest - float(shares[slots.unit_of].sum()))

    def _shares(self, number: int, query: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], float]:
        of, layer = self._formats[number], self._prefix.layers[number]
        return layer.index.shares(np.ascontiguousarray(query), self._exact[number], self._tokens, scale=of.scale)
