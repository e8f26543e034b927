"""The window in every worker process: the store, the pages under windowed units, and what is done around attention.

vLLM writes keys and values by an op of its own before attention (`do_kv_cache_update`), so the layer's blocks must be
on the device before that op; a KV connector's hook comes only before attention. Both are methods of the layer's
attention implementation that vLLM calls from opaque ops. Replaced here, they are called by eager and by compiled code,
and between the pieces of a piecewise CUDA graph. Which blocks a step reads and writes is taken from the model runner's
own lists (runner.py).

A copy that fails does not end the engine: the pass runs on, its tokens are not used, and the core is told which blocks
are doubtful. It drops what was computed from them (window/core.py).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polder.emulation.factory import Emulation
from polder.engines.vllm import hooks
from polder.engines.vllm.plans import WindowPlan
from polder.engines.vllm.rank.host_region import HostRegion
from polder.engines.vllm.rank.memory import WorkerMemory
from polder.engines.vllm.window.runner import blocks_of_step
from polder.errors import EnvironmentFault, PolderError
from polder.memory.copy import CopyEngine
from polder.memory.page import Indices
from polder.window.stream import BlockHomes, WindowStream

__all__ = ["INLINE_BYTES", "WorkerWindow", "hook_layer"]

logger = logging.getLogger("polder.engine")

INLINE_BYTES = 256 << 10
"""Copied in some 30 us. To hand less than this to a thread and to be woken when it is there takes longer: an engine
core that spins on the thread's core costs it up to milliseconds."""
UPDATES = (
    "do_kv_cache_update",
    "do_rope_and_kv_cache_update",
    "do_qk_norm_rope_kvcache_update",
    "do_qk_norm_mrope_kvcache_update",
)
"""Methods of attention implementations that write keys and values. vLLM's compiler may fuse the first into one of the
others."""


class WorkerWindow:
    """The window of one rank."""

    def __init__(self, memory: WorkerMemory, plan: WindowPlan, *, steps_in_flight: int = 1) -> None:
        """Maps the store. `steps_in_flight`: that vLLM has launched before it hears of the first. Raises PolderError,
        OSError."""
        self.memory, self.plan, self._steps_in_flight = memory, plan, steps_in_flight
        self.store = HostRegion(memory, plan.host_pages[memory.rank])
        base = memory.span.address(0)
        self.homes = BlockHomes(
            local=tuple(base + offset for _, offset in plan.layers),
            stride_bytes=plan.block_bytes,
            first=plan.first_block,
            blocks=plan.blocks,
            store=self.store.address,
        )
        emulation = Emulation(links=memory.plan.links, faults=memory.plan.faults)
        self.backend = emulation.window_backend(memory.backend, rank=memory.rank)
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

    def open(self, donors: Mapping[int, Sequence[int]]) -> None:
        """The pages of `donors`, no longer mapped, go under the windowed units that each of them has there, zeroed.

        Each windowed unit gets the pages of w layers. Raises PolderError or OSError with the donors' pages back in
        place: a process has a limited number of mappings, and windowed units take one a page.
        """
        self.opened = True
        try:
            self._open(donors)
        except (PolderError, OSError):
            self.close(list(donors))
            raise

    def _open(self, donors: Mapping[int, Sequence[int]]) -> None:
        memory, geometry = self.memory, self.memory.geometry
        layers, w = len(self.plan.layers), self.plan.window_layers
        per_layer = geometry.pages_per_unit // layers
        by_place = sorted(range(layers), key=lambda layer: self.plan.layers[layer][1])  # as `slots` has them
        one_of_each = np.repeat(np.array(by_place) < w, per_layer)
        for donor, units in donors.items():
            handles = memory.handles_of(donor)
            self._carried[donor] = tuple(units)
            for number, unit in enumerate(units):
                slots = geometry.slots([unit])
                pages = handles[number * w * per_layer : (number + 1) * w * per_layer]
                wanted = [pages[(layer % w) * per_layer + page] for layer in by_place for page in range(per_layer)]
                memory.span.map(slots, wanted)
                memory.span.zero(slots[one_of_each])  # the pages of all slots, law 2

    def close(self, donors: Sequence[int]) -> None:
        """The pages go back under donors that do not have them, zeroed."""
        memory, geometry = self.memory, self.memory.geometry
        for donor in donors:
            under = geometry.slots(self._carried.pop(donor, ()))
            memory.span.unmap(under[memory.span.mapped[under]])
            slots = geometry.slots([donor])
            if memory.span.mapped[slots].any():
                continue
            memory.span.map(slots, memory.handles_of(donor))
            memory.span.zero(slots)

    def move(self, sources: Indices, targets: Indices) -> None:
        """Copies whole blocks, all layers, between their homes. To be `settled` before. Raises EnvironmentFault."""
        layers = range(len(self.homes.local))
        ticket = self.copies.submit(
            np.concatenate([self.homes.home(layer, targets) for layer in layers]),
            np.concatenate([self.homes.home(layer, sources) for layer in layers]),
            self.homes.stride_bytes,
        )
        self.copies.wait(ticket)

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
        read, written = blocks_of_step(rows, done, ends, self.plan.block_tokens)
        try:
            self._busy = self.stream.begin(read, written)
        except EnvironmentFault as error:
            self._failed(error)

    @contextlib.contextmanager
    def passing(self, stream: WindowStream, blocks: Indices) -> Iterator[None]:
        """For measurements: the pass within reads these blocks by `stream` and writes the last of them. Its copies may
        fail."""
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
            if layer == len(self.plan.layers) - 1:
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
        """The doubtful blocks of the pass that has ended."""
        found, self.doubtful = self.doubtful, []
        self.opened = bool(self._carried)
        return found

    def _failed(self, error: EnvironmentFault) -> None:
        self._busy, self._spoiled_steps = False, self._steps_in_flight
        self.failures += 1
        self.doubtful = sorted({*self.doubtful, *self.stream.doubtful})
        logger.warning("the window lost %d blocks: %s", len(self.doubtful), error)


def hook_layer(window: WorkerWindow, impl: Any, layer: int) -> None:
    """Has an attention implementation of vLLM's wait for its layer's blocks, and store what it wrote."""

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
