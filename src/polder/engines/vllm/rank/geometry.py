"""Where the bytes of a KV cache lie, and which pages make a unit.

vLLM 0.32 keeps the KV of all layers in one buffer: block b of layer l of a tensor starts at `offset + l * layer_stride
+ b * block_stride` bytes. A unit is the smallest run of block ids whose bytes are whole pages in every layer, so that
mapping or unmapping it touches nobody else's bytes:

    layer 0   |<- unit 0 ->|<- unit 1 ->|<- unit 2 ->| ... block ids rise to the right
    layer 1   |<- unit 0 ->|<- unit 1 ->|<- unit 2 ->| ...
      ...          G blocks = G * block_stride bytes = k pages, in each of L layers: k * L pages a unit

With G = lcm(page, block_stride) / block_stride. A block-outermost layout is the case L = 1. Groups of a hybrid model
overlay each other in the same bytes, so their tensors give the same pages, which count once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from polder.errors import ConfigError

__all__ = ["KvGeometry", "TensorPlace", "least_bytes", "places_of", "runs_of", "unit_blocks", "units_of_request"]

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """vLLM's KVCacheTensor, all in bytes but `layers`."""

    offset: int
    layers: int
    layer_stride: int
    block_stride: int

    @property
    def block_outermost(self) -> bool:
        return self.block_stride > self.layer_stride

    def starts(self) -> list[int]:
        """Where block 0 begins in each layer; one place where a block has all layers."""
        return [self.offset + layer * self.layer_stride for layer in range(1 if self.block_outermost else self.layers)]


def places_of(kv_cache_config: Any) -> tuple[TensorPlace, ...]:
    """The tensors of vLLM's KVCacheConfig."""
    return tuple(
        TensorPlace(
            offset=tensor.offset,
            layers=len(tensor.layers),
            layer_stride=tensor.layer_stride,
            block_stride=tensor.block_stride,
        )
        for tensor in kv_cache_config.kv_cache_tensors
    )


def unit_blocks(places: Iterable[TensorPlace], page_bytes: int) -> int:
    """Blocks of one unit: the least number whose bytes are whole pages in every tensor."""
    return math.lcm(*(page_bytes // math.gcd(page_bytes, place.block_stride) for place in places))


def runs_of(places: Iterable[TensorPlace]) -> list[tuple[int, int]]:
    """(offset of block 0, bytes from block to block and of a block) of each run of blocks, each once.

    There is a run for each layer, or for all layers together where a block has all of them.
    """
    return list(dict.fromkeys((start, place.block_stride) for place in places for start in place.starts()))


def units_of_request(tokens: int, block_tokens: Sequence[int], blocks_of_unit: int) -> int:
    """Units without which a request of so many tokens would wait for ever: its blocks in every group, and the null
    block.

    `block_tokens`: tokens of a block, for each KV cache group.
    """
    blocks = sum(-(-tokens // size) for size in block_tokens) + 1
    return -(-blocks // blocks_of_unit)


def least_bytes(tokens: int, block_tokens: Sequence[int], places: Sequence[TensorPlace], page_bytes: int) -> int:
    """KV memory without which a request of so many tokens would wait for ever."""
    blocks = unit_blocks(places, page_bytes)
    return units_of_request(tokens, block_tokens, blocks) * sum(size * blocks for _, size in runs_of(places))


@dataclass(frozen=True, kw_only=True)
class KvGeometry:
    """Pages of one rank's KV buffer. `num_blocks` is a multiple of `unit_blocks`."""

    page_bytes: int
    size_bytes: int
    num_blocks: int
    unit_blocks: int
    places: tuple[TensorPlace, ...]

    @classmethod
    def of(cls, kv_cache_config: Any, page_bytes: int, blocks_of_unit: int) -> KvGeometry:
        """The geometry of vLLM's KVCacheConfig."""
        return cls(
            page_bytes=page_bytes,
            size_bytes=kv_cache_config.kv_cache_tensors[0].size,
            num_blocks=kv_cache_config.num_blocks,
            unit_blocks=blocks_of_unit,
            places=places_of(kv_cache_config),
        )

    @property
    def units(self) -> int:
        return self.num_blocks // self.unit_blocks

    @property
    def total_slots(self) -> int:
        return -(-self.size_bytes // self.page_bytes)

    @property
    def pages_per_unit(self) -> int:
        return len(self.slots([0]))

    @property
    def unit_bytes(self) -> int:
        return self.pages_per_unit * self.page_bytes

    def slots(self, units: Sequence[int] | Slots) -> Slots:
        """Page slots of the units, in the buffer's span: shape [len(units) * pages_per_unit], unit by unit."""
        first, stride = self._unit_zero()
        return (first[None, :] + np.asarray(units, dtype=np.int64)[:, None] * stride[None, :]).ravel()

    def runs(self) -> list[tuple[int, int]]:
        """See `runs_of`."""
        return runs_of(self.places)

    def granules(self) -> tuple[int, Slots, Slots]:
        """How the bytes of one block lie in the pages of its unit, for lending it: (granule bytes, pages, offsets).

        A granule is the largest piece that divides the page and every block. The arrays have shape [unit_blocks,
        granules]: index of the granule's page among the unit's pages, as in `slots`, and the granule's first byte
        there.
        """
        starts = self.runs()
        size = math.gcd(self.page_bytes, *(stride for _, stride in starts))
        first, _ = self._unit_zero()
        pages, offsets = [], []
        for block in range(self.unit_blocks):
            addresses = np.concatenate(
                [start + block * stride + np.arange(0, stride, size, dtype=np.int64) for start, stride in starts]
            )
            pages.append(np.searchsorted(first, addresses // self.page_bytes))
            offsets.append(addresses % self.page_bytes)
        return size, np.array(pages), np.array(offsets)

    def check(self) -> None:
        """Raises ConfigError when units would share pages: the layout is one that Polder cannot make elastic."""
        slots = self.slots(range(self.units))
        if len(np.unique(slots)) != len(slots) or slots.max(initial=0) >= self.total_slots:
            raise ConfigError("this model's KV layout shares pages between units: Polder cannot make it elastic yet")

    def _unit_zero(self) -> tuple[Slots, Slots]:
        """Slots of unit 0 and, for each, how far the same slot of the next unit is."""
        strides: dict[int, int] = {}
        for start, stride in self.runs():
            unit_bytes = stride * self.unit_blocks
            if start % self.page_bytes or unit_bytes % self.page_bytes:
                raise ConfigError(
                    f"a layer's KV starts {start % self.page_bytes} bytes into a page: Polder cannot make this layout elastic"
                )
            for slot in range(start // self.page_bytes, (start + unit_bytes) // self.page_bytes):
                strides[slot] = unit_bytes // self.page_bytes
        first = np.array(sorted(strides), dtype=np.int64)
        return first, np.array([strides[slot] for slot in first.tolist()], dtype=np.int64)
