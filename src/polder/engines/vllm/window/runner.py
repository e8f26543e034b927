"""Between the window and vLLM's model runners: which blocks a step reads and writes, and how the core hears of lost
ones.

Both runners know on the host, before they launch a step, how many tokens of each request are computed and which blocks
it holds. The window uses these lists and not the attention metadata: that is the backend's own, may have neither
sequence lengths nor a block table (FlashInfer), and has them on the device, where reading them would wait for all work
that is launched.

    V1   `_model_forward` is called just before the first layer. The input batch has the block table as a NumPy array.
    V2   `prepare_attn` is called before the model is, or before its graphs are replayed. Its block table is on the
         device only: `append_block_ids` names all ids that go there, and BlockRows keeps a copy of them.

Neither is called for a warm-up, which reads and writes the null block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from polder.engines.vllm import hooks
from polder.engines.vllm.rank.block_tables import keep_rows
from polder.engines.vllm.rank.outputs import tell
from polder.memory.page import Indices

if TYPE_CHECKING:
    from polder.engines.vllm.window.worker import WorkerWindow

__all__ = ["DOUBTFUL", "blocks_of_step", "hook_runner"]

DOUBTFUL = "polder_doubtful_blocks"
"""Attribute of a ModelRunnerOutput: blocks whose bytes may be wrong after this step."""


def blocks_of_step(
    rows: NDArray[np.int32], done: NDArray[Any], ends: NDArray[Any], block_tokens: int
) -> tuple[Indices, Indices]:
    """(blocks with tokens from before the step, blocks that get tokens in it).

    Request i has `done[i]` tokens computed before the step and `ends[i]` after it, in the blocks `rows[i]`.
    """
    read = [row[: -(-int(tokens) // block_tokens)] for row, tokens in zip(rows, done, strict=True)]
    written = [
        row[int(before) // block_tokens : -(-int(after) // block_tokens)]
        for row, before, after in zip(rows, done, ends, strict=True)
    ]
    return np.concatenate(read).astype(np.int64), np.concatenate(written).astype(np.int64)


def hook_runner(window: WorkerWindow, runner: Any) -> None:
    """Begins the window's pass in each step of this runner, and tells what the pass has lost. Before the first
    request."""
    if hasattr(runner, "input_batch"):
        _hook_v1(window, runner)
    else:
        _hook_v2(window, runner)
    _hook_sampling(window, runner)


def _hook_v1(window: WorkerWindow, runner: Any) -> None:
    def begin_and_forward(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        count = batch.num_reqs
        window.begin(
            batch.block_table[0].get_numpy_array()[:count],
            batch.num_computed_tokens_cpu[:count],
            runner.optimistic_seq_lens_cpu.numpy()[:count],
        )
        return stock(*args, **kwargs)

    hooks.replace(runner, "_model_forward", begin_and_forward)


def _hook_v2(window: WorkerWindow, runner: Any) -> None:
    copy = keep_rows(runner)

    def prepare_and_begin(stock: Callable[[Any], Any], input_batch: Any) -> Any:
        count, done = input_batch.num_reqs, input_batch.num_computed_tokens_np
        window.begin(
            copy.rows[input_batch.idx_mapping_np[:count]],
            done[:count],
            done[:count] + input_batch.num_scheduled_tokens[:count],
        )
        return stock(input_batch)

    hooks.replace(runner, "prepare_attn", prepare_and_begin)


def _hook_sampling(window: WorkerWindow, runner: Any) -> None:
    from vllm.distributed.parallel_state import get_tp_group

    ranks = get_tp_group()

    def sample_and_tell(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = stock(*args, **kwargs)
        compared = window.opened
        doubtful = window.take_doubtful()
        if compared and ranks.world_size > 1:
            doubtful = _of_all_ranks(doubtful, ranks)
        window.end_step(doubtful)
        if doubtful and not ranks.rank_in_group and not tell(output, DOUBTFUL, doubtful):
            window.doubtful = doubtful  # told with the next output
        return output

    hooks.replace(runner, "sample_tokens", sample_and_tell)


def _of_all_ranks(doubtful: list[int], ranks: Any) -> list[int]:
    """Only the first rank's outputs reach the core, so all must know.

    Every rank opens and closes at the same steps, and calls this after the same ones.
    """
    import torch
    from torch import distributed

    some = torch.tensor([len(doubtful)])
    distributed.all_reduce(some, group=ranks.cpu_group)
    if not some.item():
        return []
    lists: list[list[int]] = [[] for _ in range(ranks.world_size)]
    distributed.all_gather_object(lists, doubtful, group=ranks.cpu_group)
    return sorted({block for found in lists for block in found})
