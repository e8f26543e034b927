"""What the engine core asks of every worker about its KV memory, by vLLM's `collective_rpc`.

The calls are ordered with the steps (one FIFO queue): when one of them runs, every step submitted before has been
launched, and none submitted later has. GPU steps are asynchronous, so a call waits for the device before it moves or
unmaps pages. No call raises for want of memory, since an exception in a worker would end the engine. A failure is an
answer: a text, "" if there is none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from polder.engines.vllm.plans import WorkerPlan
from polder.engines.vllm.process import here, present
from polder.engines.vllm.rank import block_tables
from polder.engines.vllm.rank.block_tables import Ids
from polder.engines.vllm.sparse.limits import allow_small_blocks
from polder.errors import PolderError
from polder.memory.limits import raise_open_files

__all__ = [
    *("await_steps", "device_name", "device_uuid", "forget_blocks", "forget_outputs", "map_units", "prepare"),
    *("reserve_bytes", "rewrite_block_tables", "start_serving", "unmap_units", "zero_blocks"),
]


def device_name(worker: Any) -> str:
    """The device of this rank as the broker names it."""
    device = worker.device
    if device.type == "cpu":
        return "cpu:0"
    import torch

    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def reserve_bytes(worker: Any) -> int:
    """What vLLM has measured that this rank will still take from its device: activations of the largest step, and
    graphs.

    0 where it has not measured, as on the CPU or with --kv-cache-memory-bytes.
    """
    return max(0, int(getattr(worker, "peak_activation_memory", 0)))


def device_uuid(worker: Any) -> str:
    """As polder.memory.devices.device_uuid, for the device of this rank; asked of torch, which has it at hand."""
    if worker.device.type != "cuda":
        return ""
    import torch

    return str(torch.cuda.get_device_properties(worker.device).uuid).removeprefix("GPU-").replace("-", "")


def prepare(worker: Any, plan: WorkerPlan) -> None:
    """Notes the plan; the next `allocate_kv_cache` in this process follows it."""
    raise_open_files()
    if plan.sparse:
        allow_small_blocks()
    here.plan, here.rank, here.device, here.runner = plan, worker.rank, device_name(worker), worker.model_runner


def start_serving(worker: Any) -> bool:
    """The first call after the warm-up. Returns whether busy blocks may move on this rank."""
    if block_tables.is_v2(worker.model_runner):
        worker.model_runner.block_tables.redirect_writes_to_null_block = False
        present(here.memory).zero_blocks([0])  # where the warm-up has written
    return block_tables.can_rewrite(worker.model_runner)


def await_steps(worker: Any) -> None:
    """Returns when the steps launched before have read and written all that they will."""
    present(here.memory).backend.fence()


def rewrite_block_tables(runner: Any, sources: Ids, targets: Ids, units: Sequence[int] = ()) -> None:
    """Blocks have moved from `sources` to `targets`, and `units` will lose their pages: corrects what the runner
    remembers."""
    memory = present(here.memory)
    geometry = memory.geometry
    size = geometry.unit_blocks
    gone = (np.asarray(units, dtype=np.int64)[:, None] * size + np.arange(size)).ravel()
    block_tables.rewrite(runner, block_tables.new_ids(geometry.num_blocks, sources, targets, lost=gone))


def forget_outputs(worker: Any, requests: Sequence[str]) -> None:
    """These requests were preempted between two steps: what the step under way computes for them is not used."""
    block_tables.forget_outputs(worker.model_runner, requests)


def forget_blocks(worker: Any, blocks: Sequence[int]) -> None:
    """Nobody may read these blocks any more, not even for nothing. Returns when steps launched before have."""
    memory = present(here.memory)
    lost, nobody = np.asarray(blocks, dtype=np.int64), np.empty(0, dtype=np.int64)
    new = block_tables.new_ids(memory.geometry.num_blocks, nobody, nobody, lost=lost)
    block_tables.rewrite(worker.model_runner, new)
    memory.backend.fence()


def zero_blocks(worker: Any, blocks: Sequence[int]) -> None:
    """Zeroes blocks between two steps."""
    present(here.memory).zero_blocks(blocks)


def map_units(worker: Any, generation: int, units: Sequence[int], pages: Sequence[Sequence[int]]) -> str:
    """Maps zeroed pages under `units`; `pages` holds one list per rank. Returns what was wrong; "" if nothing."""
    memory = present(here.memory)
    try:
        memory.map(generation, units, pages[memory.rank])
    except (PolderError, OSError) as error:
        return f"rank {memory.rank}: {error}"
    return ""


def unmap_units(
    worker: Any,
    current_generation: int,
    units: Sequence[int],
    sources: Sequence[int] = (),
    targets: Sequence[int] = (),
) -> None:
    """Moves blocks out of the way (`sources` to `targets`), then unmaps `units`. Units not mapped here are passed
    over."""
    memory = present(here.memory)
    memory.backend.fence()
    src, dst = np.asarray(sources, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    if sources:
        memory.move(src, dst)
    rewrite_block_tables(worker.model_runner, src, dst, units)
    memory.unmap([unit for unit in units if unit in memory.pages_of], current_generation)
