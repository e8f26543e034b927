"""A prefix as it is stored for sparse reading: in each layer units of one block, and the index of their keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from polder.engines.vllm.sparse.blocks import BlockFormat
from polder.engines.vllm.sparse.homes import Home, MakeHome
from polder.sparse.budget import Layout
from polder.sparse.methods import Index, Method, index_of, order_of

__all__ = ["LayerUnits", "Prefix", "store"]


@dataclass(frozen=True, kw_only=True)
class LayerUnits:
    index: Index
    home: Home


@dataclass(frozen=True, kw_only=True)
class Prefix:
    layout: Layout
    layers: tuple[LayerUnits, ...]


def store(
    formats: Sequence[BlockFormat],
    blocks: Sequence[int],
    layout: Layout,
    moments: Sequence[torch.Tensor],
    method: Method,
    make_home: MakeHome,
) -> Prefix:
    """Units of the blocks [layout.sink_blocks, layout.end_block) of a request.

    `moments`: for each layer sum q q^T of the prefix's last queries, [KV heads, d, d].
    """
    middle = blocks[layout.sink_blocks : layout.end_block]
    return Prefix(
        layout=layout,
        layers=tuple(
            _layer(of, middle, moment, method, make_home) for of, moment in zip(formats, moments, strict=True)
        ),
    )


def _layer(
    of: BlockFormat, middle: Sequence[int], moment: torch.Tensor, method: Method, make_home: MakeHome
) -> LayerUnits:
    keys, values = of.plain(middle)
    plain = keys.float().numpy()
    order = order_of(method, plain, moment.numpy(), of.block_tokens)
    places = torch.from_numpy(order)
    return LayerUnits(
        index=index_of(method, plain[:, order], of.block_tokens),
        home=make_home(of.pack(keys[:, places], values[:, places])),
    )
