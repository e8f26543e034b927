"""The window in every worker process: the store, the pages under windowed units, and the hooks around each attention.

vLLM writes keys and values by an op of its own before attention (`do_kv_cache_update`), so the layer's blocks must be there before
that, and not before attention only, as a connector's hook would have it. Both are methods of the layer's attention implementation,
called from within opaque ops: wrapped here, they are called by eager and by compiled code alike, and between the pieces
of a piecewise CUDA graph. What a step reads and writes is taken from the model runner's own lists (runner.py).

A copy that fails ends no engine: the pass runs on, its tokens are worth nothing, and the core is told which blocks are doubtful. It
drops what came of them (engines/vllm/window/core.py).
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polder.emulation.factory import Emulation
from polder.engines.vllm import hooks
from polder.engines.vllm.plans import Outcome, WindowPlan
from polder.engines.vllm.process import here, present
from polder.engines.vllm.rank import calls
from polder.engines.vllm.rank.host_region import HostRegion
from polder.engines.vllm.rank.memory import WorkerMemory
from polder.engines.vllm.window.limits import check_runner
from polder.engines.vllm.window.runner import blocks_of_step, hook_runner
from polder.errors import EnvironmentFault, PolderError
from polder.memory.copy import CopyEngine
from polder.memory.page import Indices
from polder.window.stream import BlockHomes, WindowStream

__all__ = ["WorkerWindow", "bring_home", "close_units", "figures", "install", "open_units"]

logger = logging.getLogger("polder.engine")

INLINE_BYTES = 256 << 10
"""Copied in some 30 us. To hand less than this to a thread and to be woken when it is there takes longer: an engine core that
spins on the thread's core costs it up to milliseconds."""
UPDATES = (
    "do_kv_cache_update",
    "do_rope_and_kv_cache_update",
    "do_qk_norm_rope_kvcache_update",
    "do_qk_norm_mrope_kvcache_update",
)
"""Methods of attention implementations that write keys and values. vLLM's compiler may fuse the first into one of the others."""


class WorkerWindow:
    """One rank's."""

    def __init__(self, memory: WorkerMemory, plan: WindowPlan, *, steps_in_flight: int = 1) -> None:
        """Maps the store. `steps_in_flight`: that vLLM has launched before it hears of the first. Raises PolderError, OSError."""
        self._memory, self._plan, self._steps_in_flight = memory, plan, steps_in_flight
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
            Emulation(links=plan.links, faults=plan.faults).window_backend(memory.backend, rank=memory.rank),
            plan.window_layers,
            memory.backend.fence,
        )
        self.copies = CopyEngine(self.backend, inline_bytes=INLINE_BYTES)
        self.stream = WindowStream(self.copies, self.homes, window_layers=plan.window_layers)
        self._carried: dict[int, tuple[int, ...]] = {}  # donor -> its windowed units
        self._busy = False
        self.opened = False
        """Whether a windowed block may have been read or written since the ranks compared last."""
        self.doubtful: list[int] = []
        self._spoiled_steps = 0
        self.failures = 0

    # ------------------------------------------------------------------ pages

    def open(self, donors: Sequence[int], units: Sequence[int]) -> None:
        """The pages of `donors`, no longer mapped, go under the windowed `units`, L // w of them each, zeroed.

        Raises PolderError or OSError with the donors' pages back in place: a process has a limited number of mappings, and
        windowed units take one a page.
        """
        self.opened = True
        try:
            self._open(donors, units)
        except (PolderError, OSError):
            self.close(donors)
            raise

    def _open(self, donors: Sequence[int], units: Sequence[int]) -> None:
        memory, geometry = self._memory, self._memory.geometry
        layers, w = len(self._plan.layers), self._plan.window_layers
        per_layer, each = geometry.pages_per_unit // layers, layers // w
        by_place = sorted(range(layers), key=lambda layer: self._plan.layers[layer][1])  # as `slots` has them
        one_of_each = np.repeat(np.array(by_place) < w, per_layer)
        for at, donor in enumerate(donors):
            handles = memory.imported.handles(memory.generation_of[donor], memory.pages_of[donor])
            mine = units[at * each : (at + 1) * each]
            self._carried[donor] = tuple(mine)
            for number, unit in enumerate(mine):
                slots = geometry.slots([unit])
                pages = handles[number * w * per_layer : (number + 1) * w * per_layer]
                wanted = [pages[(layer % w) * per_layer + page] for layer in by_place for page in range(per_layer)]
                memory.span.map(slots, wanted)
                memory.span.zero(slots[one_of_each])  # the pages of all slots, law 2

    def close(self, donors: Sequence[int]) -> list[int]:
        """The pages go back under donors that do not have them, zeroed. Returns the windowed units that have none any more."""
        memory, geometry = self._memory, self._memory.geometry
        closed: list[int] = []
        for donor in donors:
            units = self._carried.pop(donor, ())
            under = geometry.slots(units)
            memory.span.unmap(under[memory.span.mapped[under]])
            closed += units
            slots = geometry.slots([donor])
            if memory.span.mapped[slots].any():
                continue
            memory.span.map(slots, memory.imported.handles(memory.generation_of[donor], memory.pages_of[donor]))
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

    def begin(self, rows: NDArray[np.int32], done: NDArray[Any], ends: NDArray[Any]) -> None:
        """Before the first layer, or earlier.

        Request i has the blocks `rows[i]`, and `done[i]` tokens before the step, `ends[i]` after it.
        """
        self._busy = False
        if not self._carried:
            return
        read, written = blocks_of_step(rows, done, ends, self._plan.block_tokens)
        try:
            self._busy = self.stream.begin(read, written)
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
            self._busy, self._spoiled_steps = False, 0
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
            if layer == len(self._plan.layers) - 1:
                self._busy = False

    @property
    def spoiled(self) -> bool:
        """Whether what the last passes computed may be wrong, in blocks of any kind: nothing of it may be kept.

        A step that was launched before the core heard of a spoiled one goes on from its tokens.
        """
        return self._spoiled_steps > 0

    def end_step(self, doubtful: Sequence[int]) -> None:
        """A step has ended in which some rank has lost these blocks."""
        self._spoiled_steps = self._steps_in_flight if doubtful else max(0, self._spoiled_steps - 1)

    def take_doubtful(self) -> list[int]:
        """Of the pass that has ended."""
        found, self.doubtful = self.doubtful, []
        self.opened = bool(self._carried)
        return found

    def _failed(self, error: EnvironmentFault) -> None:
        self._busy, self._spoiled_steps = False, self._steps_in_flight
        self.failures += 1
        self.doubtful = sorted({*self.doubtful, *self.stream.doubtful})
        logger.warning("the window lost %d blocks: %s", len(self.doubtful), error)


# ---------------------------------------------------------------- called by the core


def install(worker_: Any) -> str:
    """Opens the store and hooks the model's attention layers. Returns what was wrong; "" if nothing."""
    memory = present(here.memory)
    plan = present(memory.plan.window)
    layers = worker_.vllm_config.compilation_config.static_forward_context
    if any(getattr(layer, "kv_sharing_target_layer_name", None) for layer in layers.values()):
        return "layers of this model read other layers' KV, whose slots are filled anew by then: remove POLDER_WINDOW"
    if error := check_runner(worker_.model_runner):
        return error
    steps = worker_.vllm_config.max_concurrent_batches
    try:
        window = here.window = WorkerWindow(memory, plan, steps_in_flight=steps)
    except (PolderError, OSError) as error:
        return f"rank {memory.rank}: {error}"
    for number, (name, _) in enumerate(plan.layers):
        _hook(window, layers[name].impl, number)
    hook_runner(window, worker_.model_runner)
    return ""


def open_units(
    worker_: Any,
    donors: Sequence[int],
    units: Sequence[int],
    sources: Sequence[int],
    targets: Sequence[int],
) -> Outcome:
    """Moves blocks out of the donors, and puts their pages under windowed units. After an `error` they are where they were."""
    memory, window = present(here.memory), present(here.window)
    started = time.perf_counter()
    memory.backend.fence()
    src, dst = np.asarray(sources, np.int64), np.asarray(targets, np.int64)
    if len(src):
        memory.move(src, dst)
        calls.rewrite_block_tables(worker_.model_runner, src, dst)
    memory.span.unmap(memory.geometry.slots(donors))
    try:
        window.open(donors, units)
    except (PolderError, OSError) as error:
        return Outcome(seconds=time.perf_counter() - started, error=f"rank {memory.rank}: {error}")
    return Outcome(seconds=time.perf_counter() - started)


def close_units(worker_: Any, donors: Sequence[int]) -> Outcome:
    memory, window = present(here.memory), present(here.window)
    started = time.perf_counter()
    memory.backend.fence()
    window.settled()  # blocks of other donors may be among those that did not get home: they are doubtful then
    window.close(donors)
    return Outcome(seconds=time.perf_counter() - started)


def bring_home(worker_: Any, sources: Sequence[int], targets: Sequence[int]) -> Outcome:
    """Windowed blocks become regular ones. When copies fail, `error` says so and the targets hold nothing of worth."""
    memory, window = present(here.memory), present(here.window)
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
    calls.rewrite_block_tables(worker_.model_runner, src, dst)
    return Outcome(seconds=time.perf_counter() - started, error=error)


def figures(worker_: Any) -> dict[str, float]:
    """Counters of this rank."""
    window = present(here.window)
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


def _hook(window: WorkerWindow, impl: Any, layer: int) -> None:
    def update_when_there(update: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        window.before(layer)
        return update(*args, **kwargs)

    def forward_and_store(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        window.before(layer)  # where the update is part of it; else nothing is left to wait for
        output = forward(*args, **kwargs)
        window.after(layer)
        return output

    for name in UPDATES:
        if hasattr(impl, name):
            hooks.replace(impl, name, update_when_there)
    hooks.replace(impl, "forward", forward_and_store)
