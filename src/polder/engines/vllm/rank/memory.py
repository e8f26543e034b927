"""A rank's KV memory: one span of addresses under the whole KV buffer, whose pages are mapped and unmapped by unit."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from polder.broker.client import fetch_handles
from polder.broker.wire import MAX_FDS, Fetch
from polder.engines.vllm.plans import WorkerPlan
from polder.engines.vllm.process import here
from polder.engines.vllm.rank import block_tables
from polder.engines.vllm.rank.geometry import KvGeometry, TensorPlace
from polder.memory.copy import CopyEngine
from polder.memory.pool import ImportedPages
from polder.memory.span import Span

__all__ = ["WorkerMemory", "allocate_kv_cache", "geometry_of", "places_of", "redirect_warm_up"]


class WorkerMemory:
    """The KV memory of one rank."""

    def __init__(self, plan: WorkerPlan, rank: int, device: str, geometry: KvGeometry) -> None:
        """Reserves the addresses and maps the plan's units, zeroed. Raises PolderError or OSError."""
        self.plan, self.rank, self.device, self.geometry = plan, rank, device, geometry
        self.backend = here.backend(device, plan.page_bytes)
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


def allocate_kv_cache(
    stock: Callable[..., dict[str, Any]], kv_cache_config: Any, device: Any, layout: Any, kernel_block_sizes: Any = None
) -> dict[str, Any]:
    """In place of vllm.v1.worker.utils.allocate_kv_cache (:564): the same views, over a span instead of torch.zeros.

    Without a plan (profiling on a GPU calls this once before there is one) it is vLLM's own.
    """
    plan = here.plan
    if plan is None or not kv_cache_config.kv_cache_tensors:
        return stock(kv_cache_config, device, layout, kernel_block_sizes)
    geometry = geometry_of(kv_cache_config, plan.page_bytes, plan.unit_blocks)
    memory = here.memory = WorkerMemory(plan, here.rank, here.device, geometry)
    redirect_warm_up(here.runner)
    return _views(memory.span.tensor(), kv_cache_config, layout, kernel_block_sizes)


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


def redirect_warm_up(runner: Any) -> None:
    """The V2 runner's warm-up makes block ids up, of which this engine may have none mapped: until `calls.describe`, all of them
    are the null block. The switch is vLLM's own, for elastic expert parallelism; the V1 runner's warm-up writes nothing."""
    if block_tables.is_v2(runner):
        runner.block_tables.redirect_writes_to_null_block = True
