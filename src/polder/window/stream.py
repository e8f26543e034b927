"""A pass over the layers with KV that is not all on the device: each layer's blocks are fetched just before its
attention, and stored just after it.

A windowed block has an address in every layer, as any block has, but there are pages for w layers only: layer l is
mapped onto the pages of slot l mod w. The bytes of all layers are in a store in host memory. A pass is told which
blocks its step reads and which it writes. Then, around each layer:

    before(l)    what is launched next finds the blocks to read, and may write the new tokens' keys and values
    (key and value are written, attention)
    after(l)     the written blocks are being copied to the store; layer l + w is being copied into the slot

So copies overlap with the compute between two attentions, and with w - 1 attentions. Order and errors are those of
stream/pipeline.py. The queue is a FIFO: a block is stored before its slot is filled anew, and the next pass reads what
this one wrote. A failure is raised once, for all copies that have failed by then.

Source: SwiftCache section 3.3, with w slots in place of one: a load can run during the attention of the layer before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from polder.errors import EnvironmentFault
from polder.memory.copy import Addresses, CopyEngine
from polder.memory.page import Indices, runs
from polder.stream.pipeline import LayerStream, Pieces, StreamStatistics

__all__ = ["BlockHomes", "WindowStream"]

_NOTHING = Pieces.of([])
_NO_BLOCKS: Indices = np.empty(0, np.int64)


@dataclass(frozen=True, kw_only=True)
class BlockHomes:
    """Where blocks' bytes are, layer by layer, when no pass is under way: regular blocks in place, windowed ones in the
    store."""

    local: tuple[int, ...]
    """Address of block 0 of each layer, in the order of execution."""
    stride_bytes: int
    """From block to block of a layer, and what a block has there."""
    first: int
    """The lowest windowed block; all above it are, too."""
    blocks: int
    """Windowed ones: the store has layer after layer, in each of them as many blocks as this."""
    store: int
    """Address of the store."""

    def windowed(self, blocks: Indices) -> Indices:
        """Those of `blocks` that are, each once, rising."""
        return np.unique(blocks[blocks >= self.first])

    def place(self, layer: int, blocks: Indices) -> Addresses:
        """Addresses of the blocks' slots in a pass: shape [len(blocks)], uint64."""
        return np.uint64(self.local[layer]) + blocks.astype(np.uint64) * np.uint64(self.stride_bytes)

    def home(self, layer: int, blocks: Indices) -> Addresses:
        """Addresses of the blocks' bytes when no pass is under way: shape [len(blocks)], uint64."""
        stored = self.store + (layer * self.blocks + blocks - self.first) * self.stride_bytes
        return np.where(blocks >= self.first, stored.astype(np.uint64), self.place(layer, blocks))


class WindowStream:
    """One rank's passes. All methods belong to the thread that launches the layers."""

    def __init__(self, copies: CopyEngine, homes: BlockHomes, *, window_layers: int) -> None:
        """`copies`: used by nobody else."""
        self._copies, self._homes = copies, homes
        layers = len(homes.local)
        self._buffers = [layer % window_layers for layer in range(layers)]
        self._window_layers = min(window_layers, layers)
        self._read = self._written = self._unproven = _NO_BLOCKS
        self._loads: list[Pieces | None] = [None] * layers
        self._saves: list[Pieces | None] = [None] * layers
        self._passed = -1
        self._submitted = 0
        """Ticket of the last copy before this pass."""
        self._stream = LayerStream(copies, self._load, self._buffers, store=self._save)

    def begin(self, read: Sequence[int] | Indices, written: Sequence[int] | Indices) -> bool:
        """A pass begins that reads and writes these blocks. Returns whether any is windowed: if not, nothing else is to
        be called.

        A block that has tokens from before and gets new ones is in both lists.
        """
        to_read = self._homes.windowed(np.asarray(read, np.int64))
        to_write = self._homes.windowed(np.asarray(written, np.int64))
        if not len(to_read) and not len(to_write):
            return False
        # Most passes decode over the blocks of the pass before: what is copied for each layer is the same then.
        if not np.array_equal(to_read, self._read):
            self._loads = [None] * len(self._buffers)
        if not np.array_equal(to_write, self._written):
            self._saves = [None] * len(self._buffers)
        self._unproven = np.union1d(self._unproven, self._written)
        self._read, self._written, self._passed = to_read, to_write, -1
        self._submitted = self._copies.statistics().submitted
        self._stream.assign(self._buffers)
        self._stream.fetch(range(self._window_layers))
        return True

    def before(self, layer: int) -> None:
        """What is launched from now on finds the layer's blocks and may write its slot.

        Raises EnvironmentFault when a copy failed.
        """
        try:
            self._stream.before(layer)
        except EnvironmentFault:
            self._take_errors()
            raise
        if len(self._unproven) and self._copies.done(self._submitted):  # on a GPU nobody has waited for them yet
            self._unproven = _NO_BLOCKS

    def after(self, layer: int) -> None:
        """The layer's attention is computed, or launched."""
        self._passed = layer
        self._stream.after(layer)

    def settle(self) -> None:
        """Returns when all that was written is home and no copy is under way. Raises EnvironmentFault when one
        failed."""
        try:
            self._copies.wait(self._copies.submit(*_NOTHING))
        except EnvironmentFault:
            self._take_errors()
            raise
        self._unproven = _NO_BLOCKS

    @property
    def doubtful(self) -> list[int]:
        """After a copy failed: blocks whose bytes may be wrong, here or at home. Failures are found late, so those are
        among them that passes before have written and no wait has found at home."""
        found: list[int] = np.unique(np.concatenate([self._read, self._written, self._unproven])).tolist()
        return found

    def statistics(self) -> StreamStatistics:
        return self._stream.statistics()

    def _take_errors(self) -> None:
        """Waits for all copies. What else has failed concerns blocks that are doubtful now, and must not spoil a later
        pass."""
        last = self._copies.submit(*_NOTHING)
        with contextlib.suppress(EnvironmentFault):
            self._copies.wait(last)
        for _ in range(self._copies.statistics().failed):
            with contextlib.suppress(EnvironmentFault):
                self._copies.wait(last)

    def _load(self, layer: int) -> Pieces:
        if layer <= self._passed:
            return _NOTHING  # of the next pass, whose blocks are not known yet
        pieces = self._loads[layer]
        if pieces is None:
            here, home, sizes = self._runs(layer, self._read)
            pieces = self._loads[layer] = Pieces(here, home, sizes)
        return pieces

    def _save(self, layer: int) -> Pieces:
        pieces = self._saves[layer]
        if pieces is None:
            here, home, sizes = self._runs(layer, self._written)
            pieces = self._saves[layer] = Pieces(home, here, sizes)
        return pieces

    def _runs(self, layer: int, blocks: Indices) -> tuple[Addresses, Addresses, Indices]:
        """(places, homes, bytes) of a layer's runs of adjacent blocks."""
        found = runs(blocks)
        firsts = np.array([first for first, _ in found], np.int64)
        sizes = np.array([count for _, count in found], np.int64) * self._homes.stride_bytes
        return self._homes.place(layer, firsts), self._homes.home(layer, firsts), sizes
