"""A copy on the host of the V2 runner's block table, which vLLM keeps on the device only. A window reads it before each step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polder.engines.vllm import hooks
from polder.memory.page import Indices

__all__ = ["ROWS", "BlockRows", "block_rows"]

ROWS = "polder_block_rows"
"""Attribute of a V2 model runner."""


class BlockRows:
    """A host copy of the V2 runner's block table for its only KV cache group: one row of block ids a request slot."""

    def __init__(self, tables: Any) -> None:
        """`tables`: the runner's BlockTables, before it has requests. Watches its `append_block_ids`."""
        rows, width = tables.block_tables[0].gpu.shape
        self.rows: NDArray[np.int32] = np.zeros((rows, width), np.int32)

        def append_here_too(stock: Callable[..., None], req_index: int, new_block_ids: Any, overwrite: bool) -> None:
            start = 0 if overwrite else int(tables.num_blocks.np[0, req_index])
            stock(req_index, new_block_ids, overwrite)
            self.rows[req_index, start : start + len(new_block_ids[0])] = new_block_ids[0]

        hooks.replace(tables, "append_block_ids", append_here_too)

    def renumber(self, new: Indices) -> None:
        """The block `old` is `new[old]` from now on. Rows of slots without a request may change as well."""
        self.rows[:] = new[self.rows]


def block_rows(runner: Any) -> BlockRows | None:
    """The copy that a window keeps for this runner, if it keeps one."""
    found: BlockRows | None = getattr(runner, ROWS, None)
    return found
