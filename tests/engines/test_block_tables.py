"""A worker's block tables after blocks have moved, on vLLM's own table classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
import torch
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.gpu.block_table import BlockTables

from polder.engines.vllm.rank import block_tables, memory
from polder.engines.vllm.rank.block_tables import new_ids
from polder.errors import IntegrityError

BLOCKS = 16
ROWS = [[3, 9, 12], [12, 14], [5]]


def v1_runner() -> Any:
    table = MultiGroupBlockTable(4, 64, False, torch.device("cpu"), [16], [8])
    for row, ids in enumerate(ROWS):
        table.add_row((ids,), row)
    requests = {f"r{row}": SimpleNamespace(block_ids=(list(ids),)) for row, ids in enumerate(ROWS)}
    batch = SimpleNamespace(block_table=table, prev_req_id_to_index={"r0": 0, "r1": 1})
    return SimpleNamespace(requests=requests, input_batch=batch)


def v2_runner() -> Any:
    """The V2 runner's tables are written by Triton's kernels: here they are filled by hand."""
    table = SimpleNamespace(gpu=torch.zeros(4, 8, dtype=torch.int32), _staged_write_indices=[])
    for row, ids in enumerate(ROWS):
        table.gpu[row, : len(ids)] = torch.tensor(ids)
    return SimpleNamespace(block_tables=SimpleNamespace(block_tables=[table]))


def rows_of(runner: Any) -> list[list[int]]:
    if block_tables.is_v2(runner):
        table = runner.block_tables.block_tables[0].gpu.numpy()
    else:
        table = runner.input_batch.block_table.block_tables[0].block_table.np
        assert [list(state.block_ids[0]) for state in runner.requests.values()] == [
            table[row, : len(ids)].tolist() for row, ids in enumerate(ROWS)
        ]
    return [table[row, : len(ids)].tolist() for row, ids in enumerate(ROWS)]


@pytest.mark.parametrize("make", [v1_runner, v2_runner])
def test_every_row_names_the_block_that_took_the_place(make: Any) -> None:
    runner = make()
    assert block_tables.can_rewrite(runner)
    block_tables.rewrite(runner, new_ids(BLOCKS, np.array([12, 14]), np.array([1, 2])))
    assert rows_of(runner) == [[3, 9, 1], [1, 2], [5]]


@pytest.mark.parametrize("make", [v1_runner, v2_runner])
def test_no_row_names_a_block_without_a_page(make: Any) -> None:
    """A request does not hold blocks behind its sliding window any more; the runner remembers them, and a kernel may load them."""
    runner = make()
    block_tables.rewrite(runner, new_ids(BLOCKS, np.array([12]), np.array([1]), lost=np.arange(8, 16)))
    assert rows_of(runner) == [[3, 0, 1], [1, 0], [5]]


def test_blocks_do_not_move_in_the_middle_of_a_step() -> None:
    runner = v2_runner()
    runner.block_tables.block_tables[0]._staged_write_indices.append(1)
    with pytest.raises(IntegrityError):
        block_tables.rewrite(runner, new_ids(BLOCKS, np.array([12]), np.array([1])))


def test_a_runner_of_another_kind_is_left_alone() -> None:
    runner = SimpleNamespace()
    assert not block_tables.can_rewrite(runner)
    block_tables.rewrite(runner, new_ids(BLOCKS, np.array([12]), np.array([1])))


def test_the_token_of_a_preempted_request_is_not_taken_from_the_step_under_way() -> None:
    runner = v1_runner()
    block_tables.forget_outputs(runner, ["r1", "unknown"])
    assert runner.input_batch.prev_req_id_to_index == {"r0": 0}
    runner.input_batch.prev_req_id_to_index = None  # without async scheduling
    block_tables.forget_outputs(runner, ["r1"])
    block_tables.forget_outputs(v2_runner(), ["r1"])


def test_the_block_ids_of_one_runners_warm_up_are_redirected_and_nobody_elses() -> None:
    """By vLLM's own switch. A start that fails before the warm-up is over leaves nothing behind."""
    staged: list[list[int]] = []
    row = SimpleNamespace(gpu=torch.zeros(2, 8), stage_write=lambda request, start, ids: staged.append(ids))

    def make() -> Any:
        tables = BlockTables.__new__(BlockTables)
        tables.num_kv_cache_groups, tables.block_tables = 1, [row]
        tables.num_blocks = SimpleNamespace(np=np.zeros((1, 2), dtype=np.int32))
        return SimpleNamespace(block_tables=tables)

    starting, other = make(), make()
    memory.redirect_warm_up(starting)
    for runner in (starting, other, make()):
        runner.block_tables.append_block_ids(0, ([5, 6],), overwrite=True)
    assert staged == [[0, 0], [5, 6], [5, 6]]
    memory.redirect_warm_up(v1_runner())
