"""The model runners' block tables, in a worker: the ids of moved blocks are corrected in them, between two steps.

Both of vLLM's runners keep a table of the KV manager's ids for each KV cache group. What the kernels read is made from
it anew in every step, also before a CUDA graph is replayed, so correcting the tables suffices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polder.engines.vllm import hooks
from polder.errors import IntegrityError

__all__ = [
    "BlockRows",
    "Ids",
    "can_rewrite",
    "forget_outputs",
    "is_v2",
    "keep_rows",
    "new_ids",
    "replace_row",
    "rewrite",
]

Ids = NDArray[np.int64]
NOBODY: Ids = np.empty(0, dtype=np.int64)


def is_v2(runner: Any) -> bool:
    """Whether this is vLLM's V2 model runner."""
    return hasattr(runner, "block_tables")


def can_rewrite(runner: Any) -> bool:
    """Whether the tables of this runner are known here."""
    return is_v2(runner) or hasattr(runner, "input_batch")


def new_ids(blocks: int, sources: Ids, targets: Ids, lost: Ids = NOBODY) -> Ids:
    """`new[old]` for all `blocks` ids: `targets[i]` for `sources[i]`, the null block for the others of `lost`; the rest
    stay."""
    new = np.arange(blocks, dtype=np.int64)
    new[lost] = 0
    new[sources] = targets
    return new


def rewrite(runner: Any, new: Ids) -> None:
    """Puts `new[id]` for each block id that the runner remembers. Works on the stream that computes: steps launched
    before read the old ids, later ones the new ones. Raises IntegrityError in the middle of a step.

    The runner also remembers blocks that a request does not hold any more, since they are behind its sliding window. A
    kernel may load them with a tile that begins before the window, so no id of a block without a page may stay in a
    table.
    """
    if is_v2(runner):
        _rewrite_v2(runner, new)
    elif can_rewrite(runner):
        _rewrite_v1(runner, new)


def replace_row(runner: Any, request: str, ids: Sequence[int]) -> None:
    """A request of the V1 runner has these blocks from now on, as many as before. To be called between two steps."""
    runner.requests[request].block_ids[0][:] = ids
    row = runner.input_batch.req_id_to_index.get(request)
    if row is not None:
        runner.input_batch.block_table.block_tables[0].block_table.np[row, : len(ids)] = ids


def forget_outputs(runner: Any, requests: Iterable[str]) -> None:
    """The tokens that a step under way computes for these requests will be dropped: the requests were preempted between
    two steps.

    Under async scheduling the V1 runner takes the last token of a request that was in the step before from the device,
    where that step has left it. It does so for a request that is resumed in the very next step, too, whose last token
    is another one.
    """
    before: dict[str, int] | None = getattr(getattr(runner, "input_batch", None), "prev_req_id_to_index", None)
    if before:
        for request in requests:
            before.pop(request, None)


def _rewrite_v1(runner: Any, new: Ids) -> None:
    """Each request's lists, and the batch's tables in host memory, which are copied to the device in every step."""
    changed = set(np.flatnonzero(new != np.arange(len(new))).tolist())
    for state in runner.requests.values():
        for ids in state.block_ids:
            if not changed.isdisjoint(ids):
                ids[:] = new[ids].tolist()
    for table in runner.input_batch.block_table.block_tables:
        numbers = table.block_table.np
        for row in np.flatnonzero(table.num_blocks_per_row):
            used = numbers[row, : table.num_blocks_per_row[row]]
            used[:] = new[used]


def _rewrite_v2(runner: Any, new: Ids) -> None:
    """One tensor on the device for each group, a row for each request. Rows of nobody hold ids of former requests, and
    may change as well: they are overwritten before they are read."""
    import torch

    for table in runner.block_tables.block_tables:
        if table._staged_write_indices:
            raise IntegrityError("blocks move in the middle of a step")
        renumber = torch.from_numpy(new).to(device=table.gpu.device, dtype=table.gpu.dtype)
        table.gpu.copy_(renumber[table.gpu.long()])
    rows: BlockRows | None = getattr(runner, "polder_block_rows", None)
    if rows is not None:
        rows.renumber(new)


class BlockRows:
    """A host copy of the V2 runner's block table for its only KV cache group: one row of block ids per request slot.

    vLLM keeps that table on the device only, and a window reads it before each step.
    """

    def __init__(self, tables: Any) -> None:
        """`tables`: the runner's BlockTables, before it has requests. Watches its `append_block_ids`."""
        rows, width = tables.block_tables[0].gpu.shape
        self.rows: NDArray[np.int32] = np.zeros((rows, width), np.int32)

        def append_here_too(stock: Callable[..., None], req_index: int, new_block_ids: Any, overwrite: bool) -> None:
            start = 0 if overwrite else int(tables.num_blocks.np[0, req_index])
            stock(req_index, new_block_ids, overwrite)
            self.rows[req_index, start : start + len(new_block_ids[0])] = new_block_ids[0]

        hooks.replace(tables, "append_block_ids", append_here_too)

    def renumber(self, new: Ids) -> None:
        """The block `old` is `new[old]` from now on. Rows of slots without a request may change as well."""
        self.rows[:] = new[self.rows]


def keep_rows(runner: Any) -> BlockRows:
    """Keeps a copy for this V2 runner from now on, which `rewrite` corrects too."""
    rows = runner.polder_block_rows = BlockRows(runner.block_tables)
    return rows
