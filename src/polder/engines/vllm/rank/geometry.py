"""Where the bytes of a KV cache lie, and which pages make a unit.

vLLM 0.32 keeps the KV of all layers in one buffer: block b of layer l of a tensor starts at
`offset + l * layer_stride + b * block_stride` bytes. A unit is the smallest run of block ids whose bytes are whole pages in every
layer, so that mapping or unmapping it touches nobody else's bytes:

    layer 0   |<- unit 0 ->|<- unit 1 ->|<- unit 2 ->| ... block ids rise to the right
    layer 1   |<- unit 0 ->|<- unit 1 ->|<- unit 2 ->| ...
      ...          G blocks = G * block_stride bytes = k pages, in each of L layers: k * L pages a unit

With G = lcm(page, block_stride) / block_stride. A block-outermost layout is the case L = 1. Groups of a hybrid model overlay each
other in the same bytes, so their tensors give the same pages, which count once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.errors import ConfigError

__all__ = ["KvGeometry", "TensorPlace", "unit_blocks", "units_of_request"]

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


def unit_blocks(places: Iterable[TensorPlace], page_bytes: int) -> int:
    """Blocks of one unit: the least number whose bytes are whole pages in every tensor."""
    return math.lcm(*(page_bytes // math.gcd(page_bytes, place.block_stride) for place in places))


def units_of_request(tokens: int, block_tokens: Sequence[int], blocks_of_unit: int) -> int:
    """Units without which a request of so many tokens would wait for ever: its blocks in every group, and the null block.

    `block_tokens`: tokens of a block, for each KV cache group.
    """
    blocks = sum(-(-tokens // size) for size in block_tokens) + 1
    return -(-blocks // blocks_of_unit)


@dataclass(frozen=True, kw_only=True)
class KvGeometry:
    """Pages of one rank's KV buffer. `num_blocks` is a multiple of `unit_blocks`."""

    page_bytes: int
    size_bytes: int
    num_blocks: int
    unit_blocks: int
    places: tuple[TensorPlace, ...]

    @property
    def units(self) -> int:
        return self.num_blocks // self.unit_blocks

    @property
    def total_slots(self) -> int:
        return -(-self.size_bytes // self.page_bytes)

    @property
    def pages_per_unit(self) -> int:
        return len(self.slots([0]))

    def slots(self, units: Sequence[int] | Slots) -> Slots:
        """Page slots of the units, in the buffer's span: shape [len(units) * pages_per_unit], unit by unit."""
        first, stride = self._unit_zero()
        return (first[None, :] + np.asarray(units, dtype=np.int64)[:, None] * stride[None, :]).ravel()

    def copies(self, sources: Slots, targets: Slots) -> list[tuple[int, int, Slots, Slots, int]]:
        """Copies that move blocks: (base offset, block stride, source ids, target ids, bytes) for every run of layers."""
        seen: set[tuple[int, int]] = set()
        moves = []
        for place in self.places:
            layers = 1 if place.block_outermost else place.layers
            for layer in range(layers):
                base = place.offset + layer * place.layer_stride
                if (base, place.block_stride) not in seen:
                    seen.add((base, place.block_stride))
                    moves.append((base, place.block_stride, sources, targets, place.block_stride))
        return moves

    def granules(self) -> tuple[int, Slots, Slots]:
        """How the bytes of one block lie in the pages of its unit, for lending it: (granule bytes, pages, offsets).

        A granule is the largest piece that divides the page and every block. The arrays have shape [unit_blocks, granules]:
        index of the granule's page among the unit's pages, as in `slots`, and the granule's first byte there.
        """
        starts: list[tuple[int, int]] = []
        for place in self.places:
            for layer in range(1 if place.block_outermost else place.layers):
                start = (place.offset + layer * place.layer_stride, place.block_stride)
                if start not in starts:
                    starts.append(start)
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
        for place in self.places:
            unit_bytes = place.block_stride * self.unit_blocks
            for layer in range(1 if place.block_outermost else place.layers):
                start = place.offset + layer * place.layer_stride
                if start % self.page_bytes or unit_bytes % self.page_bytes:
                    raise ConfigError(
                        f"a layer's KV starts {start % self.page_bytes} bytes into a page: Polder cannot make this layout elastic"
                    )
                for slot in range(start // self.page_bytes, (start + unit_bytes) // self.page_bytes):
                    strides[slot] = unit_bytes // self.page_bytes
        first = np.array(sorted(strides), dtype=np.int64)
        return first, np.array([strides[slot] for slot in first.tolist()], dtype=np.int64)
