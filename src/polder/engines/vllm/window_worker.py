"""The window in every worker process: the store, the pages under windowed units, and the hooks around each attention.

vLLM writes keys and values by an op of its own before attention (`do_kv_cache_update`), so the layer's blocks must be there before
that, and not before attention only, as a connector's hook would have it. Both are methods of the layer's attention implementation,
called from within opaque ops: wrapped here, they are called by eager and by compiled code alike. What a step reads and writes is
taken from its attention metadata, before the model's first layer.

A copy that fails ends no engine: the pass runs on, its tokens are worth nothing, and the core is told which blocks are doubtful. It
drops what came of them (engines/vllm/window_core.py).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from polder.engines.vllm import worker
from polder.engines.vllm.host_region import HostRegion
from polder.engines.vllm.window import WindowPlan
from polder.engines.vllm.worker import Outcome, WorkerMemory
from polder.errors import EnvironmentFault, PolderError
from polder.memory.backend import Backend
from polder.memory.copy import CopyEngine
from polder.memory.page import Indices
from polder.testing.faulty import FaultyBackend, seeded_faults
from polder.testing.faulty_tier import parse_faults
from polder.testing.links import parse_links
from polder.testing.paced import PacedBackend
from polder.window.stream import BlockHomes, WindowStream

__all__ = ["WorkerWindow", "bring_home", "close_units", "current", "figures", "install", "open_units"]

logger = logging.getLogger("polder.engine")

INLINE_BYTES = 256 << 10
"""Copied in some 30 us. To hand less than this to a thread and to be woken when it is there takes longer: an engine core that
spins on the thread's core costs it up to milliseconds."""
DOUBTFUL = "polder_doubtful_blocks"
"""Attribute of a ModelRunnerOutput: blocks whose bytes may be wrong after this step."""


class WorkerWindow:
    """One rank's."""

    def __init__(self, memory: WorkerMemory, plan: WindowPlan) -> None:
        """Maps the store. Raises PolderError, OSError."""
        self._memory, self._plan = memory, plan
        self.store = HostRegion(memory, plan.host_pages[memory.rank])
        base = memory.span.address(0)
        self.homes = BlockHomes(
            local=tuple(base + offset for _, offset in plan.layers),
            stride_bytes=plan.block_bytes,
            first=plan.first_block,
            blocks=plan.blocks,
            store=self.store.address,
        )
        self.inner_backend = memory.backend
        self.backend, self.window_layers, self.fence = (
            _emulated(memory.backend, plan, memory.rank),
            plan.window_layers,
            memory.backend.fence,
        )
        self.copies = CopyEngine(self.backend, inline_bytes=INLINE_BYTES)
        self.stream = WindowStream(self.copies, self.homes, window_layers=plan.window_layers)
        self._carried: dict[int, tuple[int, ...]] = {}  # carrier -> its windowed units
        self._busy = False
        self.opened = False
        """Whether a windowed block may have been read or written since the ranks compared last."""
        self.doubtful: list[int] = []
        self.spoiled = False
        """Whether what the last pass computed may be wrong, in blocks of any kind: nothing of it may be kept."""
        self.failures = 0

    # ------------------------------------------------------------------ pages

    def open(self, carriers: Sequence[int], units: Sequence[int]) -> None:
        """The pages of `carriers`, no longer mapped, go under the windowed `units`, L // w of them each, zeroed.

        Raises PolderError or OSError with the carriers' pages back in place: a process has a limited number of mappings, and
        windowed units take one a page.
        """
        self.opened = True
        try:
            self._open(carriers, units)
        except (PolderError, OSError):
            self.close(carriers)
            raise

    def _open(self, carriers: Sequence[int], units: Sequence[int]) -> None:
        memory, geometry = self._memory, self._memory.geometry
        layers, w = len(self._plan.layers), self._plan.window_layers
        per_layer, each = geometry.pages_per_unit // layers, layers // w
        by_place = sorted(range(layers), key=lambda layer: self._plan.layers[layer][1])  # as `slots` has them
        one_of_each = np.repeat(np.array(by_place) < w, per_layer)
        for at, carrier in enumerate(carriers):
            handles = memory.imported.handles(memory.generation_of[carrier], memory.pages_of[carrier])
            mine = units[at * each : (at + 1) * each]
            self._carried[carrier] = tuple(mine)
            for number, unit in enumerate(mine):
                slots = geometry.slots([unit])
                pages = handles[number * w * per_layer : (number + 1) * w * per_layer]
                wanted = [pages[(layer % w) * per_layer + page] for layer in by_place for page in range(per_layer)]
                memory.span.map(slots, wanted)
                memory.span.zero(slots[one_of_each])  # the pages of all slots, law 2

    def close(self, carriers: Sequence[int]) -> list[int]:
        """The pages go back under carriers that do not have them, zeroed. Returns the windowed units that have none any more."""
        memory, geometry = self._memory, self._memory.geometry
        closed: list[int] = []
        for carrier in carriers:
            units = self._carried.pop(carrier, ())
            under = geometry.slots(units)
            memory.span.unmap(under[memory.span.mapped[under]])
            closed += units
            slots = geometry.slots([carrier])
            if memory.span.mapped[slots].any():
                continue
            memory.span.map(slots, memory.imported.handles(memory.generation_of[carrier], memory.pages_of[carrier]))
            memory.span.zero(slots)
        return closed

    def move(self, sources: Indices, targets: Indices) -> None:
        """Copies whole blocks, all layers, between their homes. To be `settled` before. Raises EnvironmentFault."""
        layers = range(len(self.homes.local))
        ticket = self.copies.submit(
            np.concatenate([self.homes.home(layer, targets) for layer in layers]),
            np.concatenate([self.homes.home(layer, sources) for layer in layers]),
            self.homes.stride_bytes,
        )
        self.copies.wait(ticket)

    @property
    def mapped_blocks(self) -> int:
        """At the start, when the units that have pages are the first ones."""
        return len(self._memory.pages_of) * self._memory.geometry.unit_blocks

    # ------------------------------------------------------------------ others who read KV by block

    def home_of(self, base: int, block: int) -> int:
        """Address of a block's bytes between passes, in the layer whose block 0 lies at `base`."""
        return int(self.homes.home(self.homes.local.index(base), np.array([block]))[0])

    def settled(self) -> bool:
        """Waits until all that was written is home; False when it did not get there."""
        try:
            self.stream.settle()
        except EnvironmentFault as error:
            self._failed(error)
            return False
        return True

    # ------------------------------------------------------------------ a pass

    def begin(self, attn_metadata: Any, requests: int) -> None:
        """Before the first layer, with the metadata of its attention; None in a warm-up."""
        self._busy = False
        if attn_metadata is None or not self._carried:
            return
        ends = attn_metadata.seq_lens.cpu().numpy()[:requests].astype(np.int64)
        starts = attn_metadata.query_start_loc.cpu().numpy()[: requests + 1].astype(np.int64)
        done = ends - np.diff(starts)
        table = attn_metadata.block_table.cpu().numpy()
        size = self._plan.block_tokens
        read = [table[row, : -(-int(done[row]) // size)] for row in range(len(ends))]
        written = [table[row, int(done[row]) // size : -(-int(ends[row]) // size)] for row in range(len(ends))]
        try:
            self._busy = self.stream.begin(np.concatenate(read), np.concatenate(written))
        except EnvironmentFault as error:
            self._failed(error)

    @contextlib.contextmanager
    def passing(self, stream: WindowStream, blocks: Indices) -> Iterator[None]:
        """For measurements: the pass within reads these blocks by `stream` and writes the last of them. Its copies may fail."""
        own = self.stream
        self.stream = stream
        try:
            self._busy = stream.begin(blocks, blocks[-1:])  # a warm-up does not call `begin`
        except EnvironmentFault as error:
            self._failed(error)
        try:
            yield
            self.settled()
        finally:
            self.stream = own
            self._busy = self.spoiled = False
            self.doubtful = []

    def before(self, layer: int) -> None:
        if self._busy:
            try:
                self.stream.before(layer)
            except EnvironmentFault as error:
                self._failed(error)

    def after(self, layer: int) -> None:
        if self._busy:
            try:
                self.stream.after(layer)
            except EnvironmentFault as error:
                self._failed(error)

    def take_doubtful(self) -> list[int]:
        """Of the pass that has ended."""
        found, self.doubtful = self.doubtful, []
        self.opened = bool(self._carried)
        return found

    def _failed(self, error: EnvironmentFault) -> None:
        self._busy, self.spoiled = False, True
        self.failures += 1
        self.doubtful = sorted({*self.doubtful, *self.stream.doubtful})
        logger.warning("the window lost %d blocks: %s", len(self.doubtful), error)


def _emulated(backend: Backend, plan: WindowPlan, rank: int) -> Backend:
    """For tests and benches: a slower link, or one that fails."""
    rate, faults = parse_links(plan.links).get("window"), parse_faults(plan.faults)
    if rate is not None:
        backend = PacedBackend(backend, rate)
    if faults.fail:
        backend = FaultyBackend(backend, seeded_faults(faults.seed + rank, {"copy": faults.fail}, calls=100_000))
    return backend


_window: WorkerWindow | None = None


def current() -> WorkerWindow | None:
    """This process's; None in an engine without a window."""
    return _window


# ---------------------------------------------------------------- called by the core


def install(worker_: Any) -> str:
    """Opens the store and hooks the model's attention layers. Returns what was wrong; "" if nothing."""
    global _window
    memory = worker.memory()
    assert memory is not None
    assert memory.plan.window is not None
    layers = worker_.vllm_config.compilation_config.static_forward_context
    if any(getattr(layer, "kv_sharing_target_layer_name", None) for layer in layers.values()):
        return "layers of this model read other layers' KV, whose slots are filled anew by then: remove POLDER_WINDOW"
    try:
        window = _window = WorkerWindow(memory, memory.plan.window)
    except (PolderError, OSError) as error:
        return f"rank {memory.rank}: {error}"
    runner = worker_.model_runner
    for number, (name, _) in enumerate(memory.plan.window.layers):
        _hook(window, layers[name].impl, number)
    _hook_passes(window, runner, memory.plan.window.layers[0][0])
    return ""


def open_units(
    worker_: Any,
    carriers: Sequence[int],
    units: Sequence[int],
    sources: Sequence[int],
    targets: Sequence[int],
) -> Outcome:
    """Moves blocks out of the carriers, and puts their pages under windowed units. After an `error` they are where they were."""
    memory, window = _here()
    started = time.perf_counter()
    memory.backend.fence()
    src, dst = np.asarray(sources, np.int64), np.asarray(targets, np.int64)
    if len(src):
        memory.move(src, dst)
        worker.rewrite_block_tables(worker_.model_runner, src, dst)
    memory.span.unmap(memory.geometry.slots(carriers))
    try:
        window.open(carriers, units)
    except (PolderError, OSError) as error:
        return Outcome(seconds=time.perf_counter() - started, error=f"rank {memory.rank}: {error}")
    return Outcome(seconds=time.perf_counter() - started)


def close_units(worker_: Any, carriers: Sequence[int]) -> Outcome:
    memory, window = _here()
    started = time.perf_counter()
    memory.backend.fence()
    window.settled()  # blocks of other carriers may be among those that did not get home: they are doubtful then
    window.close(carriers)
    return Outcome(seconds=time.perf_counter() - started)


def bring_home(worker_: Any, sources: Sequence[int], targets: Sequence[int]) -> Outcome:
    """Windowed blocks become regular ones. When copies fail, `error` says so and the targets hold nothing of worth."""
    memory, window = _here()
    started = time.perf_counter()
    memory.backend.fence()
    src, dst = np.asarray(sources, np.int64), np.asarray(targets, np.int64)
    error = ""
    if window.settled():
        try:
            window.move(src, dst)
        except EnvironmentFault as failure:
            error = f"rank {memory.rank}: {failure}"
    else:
        error = f"rank {memory.rank}: blocks that were written before did not get home"
    worker.rewrite_block_tables(worker_.model_runner, src, dst)
    return Outcome(seconds=time.perf_counter() - started, error=error)


def figures(worker_: Any) -> dict[str, float]:
    """Counters of this rank."""
    _, window = _here()
    found = window.stream.statistics()
    return {
        "window_loaded_bytes_total": float(found.loaded_bytes),
        "window_stored_bytes_total": float(found.stored_bytes),
        "window_stall_seconds_total": found.stall_seconds,
        "window_copy_seconds_total": found.busy_seconds,
        "window_passes_total": float(found.passes),
        "window_failures_total": float(window.failures),
    }


# ---------------------------------------------------------------- inside


def _here() -> tuple[WorkerMemory, WorkerWindow]:
    memory = worker.memory()
    assert memory is not None
    assert _window is not None
    return memory, _window


def _hook(window: WorkerWindow, impl: Any, layer: int) -> None:
    update, forward = getattr(impl, "do_kv_cache_update", None), impl.forward

    if update is not None:

        @functools.wraps(update)
        def update_when_there(*args: Any, **kwargs: Any) -> Any:
            window.before(layer)
            return update(*args, **kwargs)

        impl.do_kv_cache_update = update_when_there

    @functools.wraps(forward)
    def forward_and_store(*args: Any, **kwargs: Any) -> Any:
        window.before(layer)  # where the update is part of it; else nothing is left to wait for
        output = forward(*args, **kwargs)
        window.after(layer)
        return output

    impl.forward = forward_and_store


def _of_all_ranks(doubtful: list[int], ranks: Any) -> list[int]:
    """Only the first rank's outputs reach the core, so all must know. Every rank opens and closes at the same steps, and calls this
    after the same ones."""
    import torch
    from torch import distributed

    some = torch.tensor([len(doubtful)])
    distributed.all_reduce(some, group=ranks.cpu_group)
    if not some.item():
        return []
    lists: list[list[int]] = [[] for _ in range(ranks.world_size)]
    distributed.all_gather_object(lists, doubtful, group=ranks.cpu_group)
    return sorted({block for found in lists for block in found})


def _hook_passes(window: WorkerWindow, runner: Any, first_layer: str) -> None:
    from vllm.distributed.parallel_state import get_tp_group
    from vllm.forward_context import get_forward_context
    from vllm.v1.outputs import ModelRunnerOutput

    model_forward, sample, ranks = runner._model_forward, runner.sample_tokens, get_tp_group()

    @functools.wraps(model_forward)
    def begin_and_forward(*args: Any, **kwargs: Any) -> Any:
        metadata = get_forward_context().attn_metadata
        window.begin(metadata[first_layer] if metadata else None, runner.input_batch.num_reqs)
        return model_forward(*args, **kwargs)

    @functools.wraps(sample)
    def sample_and_tell(*args: Any, **kwargs: Any) -> Any:
        output = sample(*args, **kwargs)
        compared = window.opened
        doubtful = window.take_doubtful()
        if compared and ranks.world_size > 1:
            doubtful = _of_all_ranks(doubtful, ranks)
        window.spoiled = bool(doubtful)
        if doubtful and not ranks.rank_in_group:
            if not isinstance(output, ModelRunnerOutput):
                raise EnvironmentFault("the window lost blocks, and this runner's output cannot say so")
            setattr(output, DOUBTFUL, doubtful)
        return output

    runner._model_forward = begin_and_forward
    runner.sample_tokens = sample_and_tell
