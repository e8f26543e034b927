"""What a window takes from vLLM's model runners, and what it tells the core through their outputs."""

from __future__ import annotations

import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.block_table import MultiGroupBlockTable
from vllm.v1.worker.gpu.block_table import BlockTables

from polder.engines.vllm.rank import block_tables
from polder.engines.vllm.rank.block_tables import BlockRows
from polder.engines.vllm.window.runner import DOUBTFUL, blocks_of_step, hook_runner

TOKENS = 16
REQUESTS, WIDTH = 4, 12


class Window:
    """Notes the blocks of each step, and loses what a test says."""

    def __init__(self) -> None:
        self.steps: list[tuple[list[int], list[int]]] = []
        self.lost: list[int] = []
        self.ended: list[list[int]] = []
        self.doubtful: list[int] = []
        self.opened = True

    def begin(self, rows: Any, done: Any, ends: Any) -> None:
        read, written = blocks_of_step(rows, done, ends, TOKENS)
        self.steps.append((read.tolist(), written.tolist()))

    def take_doubtful(self) -> list[int]:
        found, self.lost = [*self.doubtful, *self.lost], []
        self.doubtful = []
        return found

    def end_step(self, doubtful: list[int]) -> None:
        self.ended.append(doubtful)


@pytest.fixture(autouse=True, scope="module")
def tables_on_a_cpu() -> Iterator[None]:
    """As vLLM's CPU worker does it for the V2 runner: there is no memory to be pinned."""
    import vllm.v1.worker.gpu.buffer_utils as buffers
    from vllm.v1.worker.cpu.buffer_utils import UvaBuffer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buffers, "UvaBuffer", UvaBuffer)
        yield


@pytest.fixture(autouse=True)
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm.distributed.parallel_state as parallel_state

    monkeypatch.setattr(parallel_state, "get_tp_group", lambda: SimpleNamespace(world_size=1, rank_in_group=0))


class GPUModelRunner(SimpleNamespace):
    """Has vLLM's name for it, which hooks.put looks at."""


def v1_runner() -> Any:
    """With two requests: 40 tokens computed and 1 to come, none computed and 20 to come."""
    table = MultiGroupBlockTable(REQUESTS, 256, False, torch.device("cpu"), [TOKENS], [WIDTH])
    table.add_row(([7, 3, 9],), 0)
    table.add_row(([5, 6],), 1)
    return GPUModelRunner(
        input_batch=SimpleNamespace(num_reqs=2, block_table=table, num_computed_tokens_cpu=np.array([40, 0, 77, 0])),
        optimistic_seq_lens_cpu=torch.tensor([41, 20, 0, 0]),
        _model_forward=lambda: "computed",
        sample_tokens=lambda _: None,
    )


def tables() -> BlockTables:
    return BlockTables([TOKENS], REQUESTS, 256, [WIDTH], torch.device("cpu"))


def v2_runner() -> Any:
    return GPUModelRunner(
        block_tables=tables(),
        kv_cache_config=SimpleNamespace(num_blocks=64),
        prepare_attn=lambda batch: "prepared",
        sample_tokens=lambda _: None,
    )


def batch(slots: list[int], done: list[int], new: list[int]) -> Any:
    """A batch of V2 with room for one request more."""
    return SimpleNamespace(
        num_reqs=len(slots),
        idx_mapping_np=np.array([*slots, 0]),
        num_computed_tokens_np=np.array([*done, 0], np.int32),
        num_scheduled_tokens=np.array(new, np.int32),
    )


def test_a_step_of_the_v1_runner_is_read_without_attention_metadata() -> None:
    """FlashInfer's has neither sequence lengths nor a block table. No forward context is set here, so nobody can ask for it."""
    runner, window = v1_runner(), Window()
    hook_runner(window, runner)  # type: ignore[arg-type]
    assert runner._model_forward() == "computed"
    assert window.steps == [([7, 3, 9], [9, 5, 6])]


def test_a_step_of_the_v2_runner_is_read_from_the_copy_of_its_block_table() -> None:
    runner, window = v2_runner(), Window()
    hook_runner(window, runner)  # type: ignore[arg-type]
    runner.block_tables.append_block_ids(2, ([7, 3],), overwrite=True)
    runner.block_tables.append_block_ids(0, ([5, 6],), overwrite=True)
    runner.block_tables.append_block_ids(2, ([9],), overwrite=False)
    assert runner.prepare_attn(batch([2, 0], [40, 0], [1, 20])) == "prepared"
    assert window.steps == [([7, 3, 9], [9, 5, 6])]


def test_the_copy_of_the_v2_block_table_has_moved_blocks_under_their_new_ids() -> None:
    runner, window = v2_runner(), Window()
    hook_runner(window, runner)  # type: ignore[arg-type]
    runner.block_tables.append_block_ids(1, ([40, 41, 42],), overwrite=True)
    staged = runner.block_tables.block_tables[0]
    staged.gpu[1, :3] = torch.tensor([40, 41, 42])
    for name in ("indices", "starts", "contents", "cu_lens"):
        getattr(staged, f"_staged_write_{name}").clear()  # as after a step
    block_tables.rewrite(runner, block_tables.new_ids(64, np.array([41, 42]), np.array([3, 41])))
    assert staged.gpu[1, :3].tolist() == [40, 3, 41]
    runner.prepare_attn(batch([1], [33], [1]))
    assert window.steps == [([40, 3, 41], [41])]


@given(seed=st.integers(0, 1 << 16))
def test_the_copy_has_what_the_v2_runner_would_gather(seed: int) -> None:
    draw, found = random.Random(seed), tables()
    copy = BlockRows(found)
    expected: dict[int, list[int]] = {}
    for _ in range(20):
        slot, ids = draw.randrange(REQUESTS), [draw.randrange(64) for _ in range(draw.randrange(4))]
        overwrite = slot not in expected or len(expected[slot]) + len(ids) > WIDTH
        expected[slot] = ids if overwrite else [*expected[slot], *ids]
        found.append_block_ids(slot, (ids,), overwrite=overwrite)
        if draw.random() < 0.3:
            new = np.array(draw.sample(range(64), 64))
            copy.renumber(new)
            expected = {slot: [int(new[block]) for block in ids] for slot, ids in expected.items()}
    for slot, ids in expected.items():
        assert found.num_blocks.np[0, slot] == len(ids)
        assert copy.rows[slot, : len(ids)].tolist() == ids


@given(
    requests=st.lists(st.tuples(st.integers(0, 80), st.integers(1, 80)), min_size=1, max_size=4),
)
def test_blocks_of_a_step_are_those_with_tokens_from_before_and_those_with_new_ones(
    requests: list[tuple[int, int]],
) -> None:
    rows = np.arange(len(requests) * WIDTH).reshape(-1, WIDTH)
    done, new = (np.array(column) for column in zip(*requests, strict=True))
    read, written = blocks_of_step(rows, done, done + new, TOKENS)
    assert read.tolist() == [
        block for at in range(len(requests)) for block in dict.fromkeys(rows[at, t // TOKENS] for t in range(done[at]))
    ]
    assert written.tolist() == [
        block
        for at in range(len(requests))
        for block in dict.fromkeys(rows[at, t // TOKENS] for t in range(done[at], done[at] + new[at]))
    ]


@pytest.mark.parametrize("kind", ["at once", "later, V1", "later, V2"])
def test_blocks_in_doubt_are_told_with_the_output_that_the_core_gets(kind: str) -> None:
    runner, window = v1_runner(), Window()
    inner = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    outputs = {
        "at once": inner,
        "later, V1": SimpleNamespace(_model_runner_output=inner),
        "later, V2": SimpleNamespace(model_runner_output=inner),
    }
    runner.sample_tokens = lambda _: outputs[kind]
    hook_runner(window, runner)  # type: ignore[arg-type]
    window.lost = [8, 9]
    assert runner.sample_tokens(None) is outputs[kind]
    assert getattr(inner, DOUBTFUL) == [8, 9]
    assert window.ended == [[8, 9]]


@pytest.mark.parametrize("empty", [None, EMPTY_MODEL_RUNNER_OUTPUT])
def test_blocks_in_doubt_wait_for_an_output_that_names_requests(empty: Any) -> None:
    """vLLM's empty output is one object for ever: what is put on it would be told again in every empty step."""
    runner, window = v1_runner(), Window()
    inner = ModelRunnerOutput(req_ids=["a"], req_id_to_index={"a": 0})
    outputs = [empty, inner]
    runner.sample_tokens = lambda _: outputs.pop(0)
    hook_runner(window, runner)  # type: ignore[arg-type]
    window.lost = [8]
    runner.sample_tokens(None)
    assert not hasattr(EMPTY_MODEL_RUNNER_OUTPUT, DOUBTFUL)
    runner.sample_tokens(None)
    assert getattr(inner, DOUBTFUL) == [8]
