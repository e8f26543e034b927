"""Where the tensors of each decoder layer lie in its segment.

Tensors are known by their addresses alone. Those of one layer whose bytes overlap (tied parameters, views of one
storage) form a block, which moves as a whole, so that they overlap afterwards as before. A block stays where it is,
"resident", when a byte of it belongs to another layer or to something outside the layers too, or when its owner names
an obstacle.

A block starts at a multiple of an alignment, plus what its old address was beyond one. Kernels choose their loads, and
cuBLAS its whole algorithm, by the alignment of an address, so they choose what they would have chosen for the old one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from polder.errors import UsageError

__all__ = ["Block", "Extent", "Layout", "alignment_bytes", "lay_out"]


def alignment_bytes(device: str) -> int:
    """What torch's allocator for the device aligns tensors to."""
    return 512 if device.startswith("cuda") else 64


@dataclass(frozen=True, kw_only=True)
class Extent:
    """The bytes from a tensor's first element to the end of its last."""

    name: str
    address: int
    size_bytes: int
    obstacle: str = ""
    """Why it cannot move, if it cannot."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Bytes that move together: from `address` to `offset` in the layer's segment."""

    address: int
    offset: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Layout:
    layer_pages: int
    """Pages of a segment; all layers have those of the largest one."""
    blocks: tuple[tuple[Block, ...], ...]
    """The blocks of each layer."""
    offsets: tuple[Mapping[str, int], ...]
    """For each layer, where each tensor that moves begins in the segment."""
    used_bytes: tuple[int, ...]
    """For each layer, the end of its last block in the segment."""
    resident: Mapping[str, str]
    """ "3.bias" -> why the tensor `bias` of layer 3 stays where it is."""
    resident_bytes: int


def lay_out(
    layers: Sequence[Iterable[Extent]], *, page_bytes: int, alignment: int, outside: Iterable[Extent] = ()
) -> Layout:
    """The layout of segments for `layers`. `alignment`: bytes, see `alignment_bytes`. `outside`: tensors beyond the
    layers that may share memory with them.

    Blocks lie in the order in which their tensors are named, so two processes that name them alike have the same
    layout. Raises UsageError when nothing can move.
    """
    owned = [_Owned(layer, rank, extent) for layer, extents in enumerate(layers) for rank, extent in enumerate(extents)]
    owned += [_Owned(None, 0, extent) for extent in outside]
    blocks: list[list[Block]] = [[] for _ in layers]
    offsets: list[dict[str, int]] = [{} for _ in layers]
    used = [0] * len(layers)
    resident: dict[str, str] = {}
    resident_bytes = 0
    for group in sorted(_overlapping(owned), key=lambda group: min(item.rank for item in group)):
        address, end = min(item.first for item in group), max(item.end for item in group)
        layer = group[0].layer
        obstacle = _obstacle(group)
        if layer is None or obstacle:
            inside = [item for item in group if item.layer is not None]
            resident |= {str(item): obstacle for item in inside}
            resident_bytes += end - address if inside else 0
            continue
        offset = -(-used[layer] // alignment) * alignment + address % alignment
        blocks[layer].append(Block(address=address, offset=offset, size_bytes=end - address))
        offsets[layer] |= {item.extent.name: offset + item.first - address for item in group}
        used[layer] = offset + end - address
    if not any(used):
        raise UsageError(
            f"no tensor of these {len(layers)} layers can move: {'; '.join(sorted(set(resident.values())))}"
        )
    return Layout(
        layer_pages=-(-max(used) // page_bytes),
        blocks=tuple(map(tuple, blocks)),
        offsets=tuple(offsets),
        used_bytes=tuple(used),
        resident=resident,
        resident_bytes=resident_bytes,
    )


class _Owned(NamedTuple):
    layer: int | None
    """None: outside the layers."""
    rank: int
    """Its place among its layer's."""
    extent: Extent

    @property
    def first(self) -> int:
        return self.extent.address

    @property
    def end(self) -> int:
        return self.extent.address + self.extent.size_bytes

    def __str__(self) -> str:
        return self.extent.name if self.layer is None else f"{self.layer}.{self.extent.name}"


def _overlapping(owned: Iterable[_Owned]) -> Iterator[list[_Owned]]:
    """Groups of extents that overlap, directly or through others. An extent without bytes is a group of its own."""
    group: list[_Owned] = []
    end = 0
    for item in sorted(owned, key=lambda item: item.first):
        if item.end == item.first:
            yield [item]
        elif group and item.first < end:
            group.append(item)
            end = max(end, item.end)
        else:
            if group:
                yield group
            group, end = [item], item.end
    if group:
        yield group


def _obstacle(group: Sequence[_Owned]) -> str:
    """Why the extents of a group stay where they are; "" when they can move."""
    for item in group:
        if item.extent.obstacle or item.end == item.first:
            return item.extent.obstacle or "empty"
    if len({item.layer for item in group}) > 1:
        return f"shared by {', '.join(map(str, group))}"
    return ""
