"""The memory's side, in every worker process: one span under the whole KV buffer, pages mapped and unmapped by unit.

The functions that end in `_units`, `prepare`, `describe` and `device_name` are called by the scheduler's side through
`collective_rpc`, which is ordered with the steps (one FIFO queue): when one of them runs, every step submitted before has been
launched, and none submitted later has. On a GPU launched is not done, hence the fence before anything is moved or unmapped.

They never raise for want of memory: a failure is an answer, since an exception in a worker would end the engine.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from polder.broker.client import fetch_handles
from polder.broker.wire import MAX_FDS, Fetch
from polder.engines.vllm.rank import block_tables
from polder.engines.vllm.rank.block_tables import Ids
from polder.engines.vllm.rank.geometry import KvGeometry, TensorPlace
from polder.errors import PolderError
from polder.memory.backend import Backend
from polder.memory.copy import CopyEngine
from polder.memory.devices import open_backend
from polder.memory.limits import raise_open_files
from polder.memory.pool import ImportedPages
from polder.memory.span import Span

if TYPE_CHECKING:
    from polder.engines.vllm.tiers.worker import TierPlan
    from polder.engines.vllm.window.agreement import WindowPlan

__all__ = [
    "Outcome",
    "WeightsFound",
    "WorkerMemory",
    "WorkerPlan",
    "allocate_kv_cache",
    "await_steps",
    "backend",
    "describe",
    "device_name",
    "device_uuid",
    "forget_blocks",
    "forget_outputs",
    "geometry_of",
    "map_units",
    "memory",
    "places_of",
    "prepare",
    "redirect_warm_up",
    "reserve_bytes",
    "rewrite_block_tables",
    "unmap_units",
    "zero_blocks",
]


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """What the scheduler's side agreed with the broker before the workers allocate. One for all ranks."""

    broker: Path
    engine: str
    generation: int
    page_bytes: int
    units: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    """Of these units, per rank."""
    unit_blocks: int
    tiers: TierPlan | None = None
    window: WindowPlan | None = None


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Answer of a worker. `error` is empty when it did as asked; else it did nothing."""

    seconds: float
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class WeightsFound:
    """What a rank's decoder layers have that can move."""

    layers: int
    layer_pages: int
    moved_bytes: int
    resident_bytes: int
    """Of tensors that cannot."""
    copy_share: float
    """See planner.rotation_cost.pass_seconds."""
    streams: bool = True
    """Whether it can serve with fewer segments than layers."""


@cache
def backend(device: str, page_bytes: int) -> Backend:
    """This process's backend for a device: one for KV and weights, since pages of one go to the other."""
    return open_backend(device, page_bytes)


class WorkerMemory:
    """The KV memory of one rank."""

    def __init__(self, plan: WorkerPlan, rank: int, device: str, geometry: KvGeometry) -> None:
        """Reserves the addresses and maps the plan's units, zeroed. Raises PolderError or OSError."""
        self.plan, self.rank, self.device, self.geometry = plan, rank, device, geometry
        self.backend = backend(device, plan.page_bytes)
        self.imported = ImportedPages(self.backend)
        self.span = Span(self.backend, geometry.total_slots)
        self.copies = CopyEngine(self.backend)
        self.generation_of: dict[int, int] = {}  # unit -> generation of the broker that its pages came from
        self.pages_of: dict[int, tuple[int, ...]] = {}
        self.map(plan.generation, plan.units, plan.pages[rank])

    def map(self, generation: int, units: Sequence[int], pages: Sequence[int]) -> None:
        """Maps and zeroes `pages` (unit by unit) under `units`. Raises with nothing changed."""
        slots = self.geometry.slots(units)
        self.fetch(generation, pages)
        self.span.map(slots, self.imported.handles(generation, pages))
        self.span.zero(slots)  # law 2: stale bytes read as NaN spoil even masked rows
        for at, unit in enumerate(units):
            self.generation_of[unit] = generation
            self.pages_of[unit] = tuple(
                pages[at * self.geometry.pages_per_unit : (at + 1) * self.geometry.pages_per_unit]
            )

    def fetch(self, generation: int, pages: Sequence[int]) -> None:
        """Brings handles of pages that the broker gave this engine into this process. Raises PolderError or OSError."""
        missing = self.imported.missing(generation, pages)
        # On CUDA every page is a file descriptor of its own, and a message carries a limited number of them.
        for start in range(0, len(missing), MAX_FDS):
            part = list(missing[start : start + MAX_FDS])
            request = Fetch(engine=self.plan.engine, rank=self.rank, device=self.device, pages=part)
            handles, fds = fetch_handles(self.plan.broker, request)
            try:
                self.imported.adopt(handles.generation, part, fds, handles.fd_index, handles.offsets)
            finally:
                for fd in fds:
                    os.close(fd)

    def move(self, sources: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> None:
        """Copies whole blocks, all layers, from `sources` to `targets` (disjoint ids); returns when the bytes are there."""
        base = self.span.address(0)
        ticket = 0
        for offset, stride, src, dst, length in self.geometry.copies(sources, targets):
            ticket = self.copies.submit_blocks(base + offset, stride, dst, base + offset, stride, src, length)
        self.copies.wait(ticket)

    def zero_blocks(self, blocks: Sequence[int]) -> None:
        """Fills whole blocks, all layers, with zero bytes, on the stream that computes: after the steps launched before, and before
        those launched later. Does not wait. All blocks must be mapped."""
        import torch

        buffer = self.span.tensor()
        rows = torch.tensor(list(blocks), dtype=torch.int64, device=buffer.device)
        nowhere = np.empty(0, dtype=np.int64)
        for offset, stride, _, _, length in self.geometry.copies(nowhere, nowhere):
            whole = buffer.as_strided((self.geometry.num_blocks, length), (stride, 1), offset)
            whole.index_fill_(0, rows, 0)

    def unmap(self, units: Sequence[int], current_generation: int) -> None:
        """Unmaps the units. Pages of a former broker are destroyed, since nobody else can ever use them again."""
        self.span.unmap(self.geometry.slots(units))
        for unit in units:
            generation, pages = self.generation_of.pop(unit), self.pages_of.pop(unit)
            if generation != current_generation:
                self.imported.discard(generation, pages)


@dataclass(frozen=True, kw_only=True)
class _Prepared:
    """What `allocate_kv_cache` is to follow."""

    plan: WorkerPlan
    rank: int
    device: str
    runner: Any
    """vLLM's model runner."""


_prepared: _Prepared | None = None
_memory: WorkerMemory | None = None


def memory() -> WorkerMemory | None:
    """This process's KV memory, once it is allocated."""
    return _memory


def device_name(worker: Any) -> str:
    """The device of this rank as the broker names it."""
    device = worker.device
    if device.type == "cpu":
        return "cpu:0"
    import torch

    return f"cuda:{torch.cuda.current_device() if device.index is None else device.index}"


def reserve_bytes(worker: Any) -> int:
    """What vLLM has measured that this rank will still take from its device: activations of the largest step, and graphs.

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
    global _prepared
    raise_open_files()
    _prepared = _Prepared(plan=plan, rank=worker.rank, device=device_name(worker), runner=worker.model_runner)


def geometry_of(kv_cache_config: Any, page_bytes: int, blocks_of_unit: int) -> KvGeometry:
    """The geometry of vLLM's KVCacheConfig."""
    tensors = kv_cache_config.kv_cache_tensors
    return KvGeometry(
        page_bytes=page_bytes,
        size_bytes=tensors[0].size,
        num_blocks=kv_cache_config.num_blocks,
        unit_blocks=blocks_of_unit,
        places=places_of(kv_cache_config),
    )


def places_of(kv_cache_config: Any) -> tuple[TensorPlace, ...]:
    return tuple(
        TensorPlace(
            offset=tensor.offset,
            layers=len(tensor.layers),
            layer_stride=tensor.layer_stride,
            block_stride=tensor.block_stride,
        )
        for tensor in kv_cache_config.kv_cache_tensors
    )


def allocate_kv_cache(kv_cache_config: Any, device: Any, layout: Any, kernel_block_sizes: Any = None) -> dict[str, Any]:
    """Replaces vllm.v1.worker.utils.allocate_kv_cache (:564): the same views, over a span instead of torch.zeros.

    Without a plan (profiling on a GPU calls this once before there is one) it is vLLM's own.
    """
    global _memory
    from vllm.v1.worker.utils import allocate_kv_cache as stock

    if _prepared is None or not kv_cache_config.kv_cache_tensors:
        return dict(stock(kv_cache_config, device, layout, kernel_block_sizes))
    plan = _prepared.plan
    geometry = geometry_of(kv_cache_config, plan.page_bytes, plan.unit_blocks)
    _memory = WorkerMemory(plan, _prepared.rank, _prepared.device, geometry)
    redirect_warm_up(_prepared.runner)
    return _views(_memory.span.tensor(), kv_cache_config, layout, kernel_block_sizes)


def _views(buffer: Any, kv_cache_config: Any, layout: Any, kernel_block_sizes: Any) -> dict[str, Any]:
    """As the second half of vLLM's function does: one 4-D view per layer over the one buffer."""
    from vllm.v1.kv_cache_interface import UniformTypeKVCacheSpecs, create_kv_cache_views

    views: dict[str, Any] = {}
    for tensor in kv_cache_config.kv_cache_tensors:
        group_id, group = next(
            (i, g) for i, g in enumerate(kv_cache_config.kv_cache_groups) if tensor.layers[0] in g.layer_names
        )
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            spec = spec.kv_cache_specs[tensor.layers[0]]
        sizes = kernel_block_sizes or ()
        layer_views = create_kv_cache_views(
            buffer,
            spec,
            kv_cache_config.num_blocks_of(tensor),
            layout,
            tensor,
            kernel_block_size=sizes[group_id] if group_id < len(sizes) else None,
        )
        views.update(zip(tensor.layers, layer_views, strict=True))
    return views


# ---------------------------------------------------------------- called by the scheduler's side


def describe(worker: Any) -> dict[str, Any]:
    """What this rank can do: whether busy blocks may move, and the units it has mapped. The first call after the warm-up."""
    assert _memory is not None
    if block_tables.is_v2(worker.model_runner):
        worker.model_runner.block_tables.redirect_writes_to_null_block = False
        _memory.zero_blocks([0])  # where the warm-up has written
    return {"movable": block_tables.can_rewrite(worker.model_runner), "units": sorted(_memory.pages_of)}


def redirect_warm_up(runner: Any) -> None:
    """The V2 runner's warm-up makes block ids up, of which this engine may have none mapped: until `describe`, all of them are the
    null block. The switch is vLLM's own, for elastic expert parallelism; the V1 runner's warm-up writes nothing."""
    if block_tables.is_v2(runner):
        runner.block_tables.redirect_writes_to_null_block = True


def await_steps(worker: Any) -> None:
    """Returns when the steps launched before have read and written all that they will."""
    assert _memory is not None
    _memory.backend.fence()


def rewrite_block_tables(runner: Any, sources: Ids, targets: Ids, units: Sequence[int] = ()) -> None:
    """Blocks have moved from `sources` to `targets`, and `units` will lose their pages: corrects what the runner remembers."""
    assert _memory is not None
    geometry = _memory.geometry
    size = geometry.unit_blocks
    gone = (np.asarray(units, dtype=np.int64)[:, None] * size + np.arange(size)).ravel()
    block_tables.rewrite(runner, block_tables.new_ids(geometry.num_blocks, sources, targets, lost=gone))


def forget_outputs(worker: Any, requests: Sequence[str]) -> None:
    """These requests were preempted between two steps: what the step under way computes for them is not used."""
    block_tables.forget_outputs(worker.model_runner, requests)


def forget_blocks(worker: Any, blocks: Sequence[int]) -> None:
    """Nobody may read these blocks any more, not even for nothing. Returns when steps launched before have."""
    assert _memory is not None
    lost = np.asarray(blocks, dtype=np.int64)
    nobody = np.empty(0, dtype=np.int64)
    block_tables.rewrite(
        worker.model_runner, block_tables.new_ids(_memory.geometry.num_blocks, nobody, nobody, lost=lost)
    )
    _memory.backend.fence()


def zero_blocks(worker: Any, blocks: Sequence[int]) -> None:
    """Zeroes blocks between two steps."""
    assert _memory is not None
    _memory.zero_blocks(blocks)


def map_units(worker: Any, generation: int, units: Sequence[int], pages: Sequence[Sequence[int]]) -> Outcome:
    """Maps zeroed pages under `units`; `pages` holds one list per rank."""
    assert _memory is not None
    started = time.perf_counter()
    try:
        _memory.map(generation, units, pages[_memory.rank])
    except (PolderError, OSError) as error:
        return Outcome(seconds=time.perf_counter() - started, error=f"rank {_memory.rank}: {error}")
    return Outcome(seconds=time.perf_counter() - started)


def unmap_units(
    worker: Any,
    current_generation: int,
    units: Sequence[int],
    sources: Sequence[int] = (),
    targets: Sequence[int] = (),
) -> Outcome:
    """Moves blocks out of the way (`sources` to `targets`), then unmaps `units`. Units not mapped here are passed over."""
    assert _memory is not None
    started = time.perf_counter()
    _memory.backend.fence()
    src, dst = np.asarray(sources, dtype=np.int64), np.asarray(targets, dtype=np.int64)
    if sources:
        _memory.move(src, dst)
    rewrite_block_tables(worker.model_runner, src, dst, units)
    _memory.unmap([unit for unit in units if unit in _memory.pages_of], current_generation)
    return Outcome(seconds=time.perf_counter() - started)
