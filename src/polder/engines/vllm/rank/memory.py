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
from polder.engines.vllm.rank.geometry import KvGeometry
from polder.memory.copy import CopyEngine
from polder.memory.page import Handle
from polder.memory.pool import ImportedPages
from polder.memory.span import Span

__all__ = ["WorkerMemory", "allocate_kv_cache", "redirect_warm_up"]


class WorkerMemory:
    """The KV memory of one rank."""

    def __init__(self, plan: WorkerPlan, rank: int, device: str, geometry: KvGeometry) -> None:
        """Reserves the addresses and maps the plan's units, zeroed. Raises PolderError or OSError."""
        self.plan, self.rank, self.device, self.geometry = plan, rank, device, geometry
        self.backend = here.backend(device, plan.page_bytes)
        self.imported = ImportedPages(self.backend)
        self.span = Span(self.backend, geometry.total_slots)
        self.copies = CopyEngine(self.backend)
        self.pages_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        """Unit -> generation of the broker that its pages came from, and their numbers there. Has the donors of a
        window too."""
        self.map(plan.generation, plan.units, plan.pages[rank])

    def map(self, generation: int, units: Sequence[int], pages: Sequence[int]) -> None:
        """Maps and zeroes `pages` (unit by unit) under `units`. Raises with nothing changed."""
        slots = self.geometry.slots(units)
        self.fetch(generation, pages)
        self.span.map(slots, self.imported.handles(generation, pages))
        self.span.zero(slots)  # law 2: stale bytes read as NaN spoil even masked rows
        size = self.geometry.pages_per_unit
        for at, unit in enumerate(units):
            self.pages_of[unit] = generation, tuple(pages[at * size : (at + 1) * size])

    def handles_of(self, unit: int) -> list[Handle]:
        """The pages of a unit that this rank has, whether they are mapped under it or under windowed units."""
        return self.imported.handles(*self.pages_of[unit])

    def fetch(self, generation: int, pages: Sequence[int]) -> None:
        """Brings handles of pages that the broker gave this engine into this process. Raises PolderError or OSError."""
        self.adopt(self.imported, self.device, self.imported.missing(generation, pages))

    def adopt(
        self,
        imported: ImportedPages,
        device: str,
        pages: Sequence[int],
        *,
        lender: str = "",
        generation: int | None = None,
        timeout_s: float = 5.0,
    ) -> None:
        """Brings handles of pages of this engine, or of `lender`, into `imported`.

        They are kept there under `generation`, or the broker's own if that is None. Raises BrokerUnavailable when a
        message has no answer within `timeout_s`, PolderError and OSError when the pages cannot be had.
        """
        # On CUDA every page is a file descriptor of its own, and a message carries a limited number of them.
        for start in range(0, len(pages), MAX_FDS):
            part = list(pages[start : start + MAX_FDS])
            request = Fetch(engine=self.plan.engine, rank=self.rank, device=device, pages=part, lender=lender)
            handles, fds = fetch_handles(self.plan.broker, request, timeout_s=timeout_s)
            try:
                kept_under = handles.generation if generation is None else generation
                imported.adopt(kept_under, part, fds, handles.fd_index, handles.offsets)
            finally:
                for fd in fds:
                    os.close(fd)

    def move(self, sources: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]) -> None:
        """Copies whole blocks, all layers, from `sources` to `targets` (disjoint ids); returns when the bytes are
        there."""
        base = self.span.address(0)
        ticket = 0
        for offset, size in self.geometry.runs():
            first = base + offset
            ticket = self.copies.submit_blocks(first, size, targets, first, size, sources, size)
        self.copies.wait(ticket)

    def zero_blocks(self, blocks: Sequence[int]) -> None:
        """Fills whole blocks, all layers, with zero bytes, on the stream that computes: after the steps launched
        before, and before those launched later. Does not wait. All blocks must be mapped."""
        import torch

        buffer = self.span.tensor()
        rows = torch.tensor(list(blocks), dtype=torch.int64, device=buffer.device)
        for offset, size in self.geometry.runs():
            buffer.as_strided((self.geometry.num_blocks, size), (size, 1), offset).index_fill_(0, rows, 0)

    def unmap(self, units: Sequence[int], current_generation: int) -> None:
        """Unmaps the units. Pages of a former broker are destroyed, since nobody else can ever use them again."""
        self.span.unmap(self.geometry.slots(units))
        for unit in units:
            generation, pages = self.pages_of.pop(unit)
            if generation != current_generation:
                self.imported.discard(generation, pages)


def allocate_kv_cache(
    stock: Callable[..., dict[str, Any]], kv_cache_config: Any, device: Any, layout: Any, kernel_block_sizes: Any = None
) -> dict[str, Any]:
    """In place of vllm.v1.worker.utils.allocate_kv_cache (:564): the same views, over a span instead of torch.zeros.

    Without a plan (profiling on a GPU calls this once before there is one) it is vLLM's own.
    """
    plan = here.plan
    if plan is None or not kv_cache_config.kv_cache_tensors:
        return stock(kv_cache_config, device, layout, kernel_block_sizes)
    geometry = KvGeometry.of(kv_cache_config, plan.page_bytes, plan.unit_blocks)
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
    """The V2 runner's warm-up makes block ids up, of which this engine may have none mapped: until
    `calls.start_serving`, all of them are the null block. The switch is vLLM's own, for elastic expert parallelism; the
    V1 runner's warm-up writes nothing."""
    if block_tables.is_v2(runner):
        runner.block_tables.redirect_writes_to_null_block = True
