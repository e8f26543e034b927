"""Layers whose bytes are fetched just before they are used: three events per layer, one queue of copies.

A model computes its layers 0, 1, ... n - 1, again and again. Some of them share a buffer, which has the bytes of one of
them at a time. Around each layer its owner calls `before` and `after`:

    before(l)   data ready      what is launched next finds l's bytes in its buffer
    (compute)
    after(l)    result stored   what l has changed is being copied home, if it has a home
                buffer free     the next layer of the same buffer is being copied in

The next layer of a buffer is the next higher one that shares it; after the highest comes the lowest. So a fetch crosses
the border between two passes, as in Oneiros and SwiftCache. A layer with a buffer of its own is fetched once; from then
on it costs a look-up.

Overwriting: a buffer may be overwritten from `after` of its layer, or `before` of another layer of the same buffer,
until `before` of that other layer returns. The queue is a FIFO, so a result is read out before the fetch that
overwrites it.

Asynchronous devices: there the order is that of the device's work, not of these calls. Each store and fetch waits for a
mark on the compute stream, and the compute stream waits for the fetch (polder.memory.backend). The caller does not
wait, and copies overlap with the compute of other layers.

Order of calls: any. A pass that is given up half way leaves a later layer's bytes in a buffer. `before` notices this,
fetches its own layer and waits for it. `before` never returns over bytes of another layer.

Errors: a fetch that failed is raised (EnvironmentFault) by the `before` that would have returned over its bytes, or by
an earlier one; the next `before` of that layer fetches anew. A result that could not be stored is raised by a later
`before` that has something to wait for, or by `drain`.

Threads: all methods but `statistics` belong to the thread that launches the layers. Pages under buffers may be unmapped
after `drain`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from polder.memory.backend import Mark, Stall
from polder.memory.copy import Addresses, CopyEngine
from polder.memory.page import Indices

__all__ = ["RECENT_PASSES", "LayerStream", "Pieces", "StreamStatistics"]


class Pieces(NamedTuple):
    """What is copied for a layer: `size_bytes[i]` bytes from address `src[i]` to `dst[i]`."""

    dst: Addresses
    src: Addresses
    size_bytes: Indices

    @classmethod
    def of(cls, triples: Sequence[tuple[int, int, int]]) -> Pieces:
        """From (dst, src, size_bytes) of each piece."""
        dst, src, size_bytes = zip(*triples, strict=True) if triples else ((), (), ())
        return cls(np.array(dst, np.uint64), np.array(src, np.uint64), np.array(size_bytes, np.int64))


@dataclass(frozen=True, kw_only=True)
class StreamStatistics:
    passes: int
    """Times that the last layer was computed."""
    loads: int
    loaded_bytes: int
    stored_bytes: int
    stalls: int
    """Layers that had to wait for their bytes."""
    stall_seconds: float
    """Time that computing stood still for them. A GPU tells it when it is over, so the last layers may be missing."""
    recent_pass_stall_seconds: float
    """Longest time that one of the last RECENT_PASSES passes stood still."""
    busy_seconds: float
    """Time that the copying took, both ways."""

    @property
    def overlap(self) -> float:
        """Share of the copying that was hidden behind compute: 1 when no layer waited."""
        return max(0.0, 1.0 - self.stall_seconds / self.busy_seconds) if self.busy_seconds else 1.0


RECENT_PASSES = 16

_SHORTEST_STALL_S = 1e-5
"""Two events of a GPU are a few microseconds apart even when nothing waits between them."""
_READY = 0
_ABSENT = -1  # any other value is the ticket of the fetch under way


@dataclass(kw_only=True)
class _Pass:
    stall_seconds: float = 0.0


class LayerStream:
    """One model's layers on one rank. The top of this module has its guarantees."""

    def __init__(
        self,
        copies: CopyEngine,
        load: Callable[[int], Pieces],
        buffers: Sequence[int],
        *,
        store: Callable[[int], Pieces] | None = None,
    ) -> None:
        """Layers with the same number in `buffers` share a buffer. No layer's bytes are there yet.

        `copies`: used by nobody else, or the statistics count others' copies. `load(layer)`: how its bytes come in;
        asked whenever they are fetched. `store(layer)`: how its result goes home.
        """
        self._copies, self._load, self._store = copies, load, store
        self._passes = self._loads = self._loaded_bytes = self._stored_bytes = self._stalls = 0
        self._stall_seconds = 0.0
        self._pass = _Pass()
        self._recent: deque[_Pass] = deque(maxlen=RECENT_PASSES)
        self._unknown: deque[tuple[_Pass, Stall]] = deque()  # stalls that the device has not told yet, in order
        self._last = 0  # ticket of the last copy
        self.assign(buffers)

    def assign(self, buffers: Sequence[int], present: Iterable[int] = ()) -> None:
        """Layers share buffers otherwise from now on. Drain first: of what was there, only the layers `present` still
        are."""
        self._buffers = list(buffers)
        members: dict[int, list[int]] = {}
        for layer, buffer in enumerate(self._buffers):
            members.setdefault(buffer, []).append(layer)
        self._following = [-1] * len(self._buffers)
        for sharing in members.values():
            if len(sharing) > 1:
                for layer, following in zip(sharing, sharing[1:] + sharing[:1], strict=True):
                    self._following[layer] = following
        self._state = [_ABSENT] * len(self._buffers)
        self._saves: dict[int, int] = {}  # layer -> ticket of its last result, until something waits for it
        self._occupant: dict[int, int] = {}  # buffer -> the layer whose bytes it has or is getting
        for layer in present:
            self._state[layer] = _READY
            self._occupant[self._buffers[layer]] = layer

    def before(self, layer: int) -> None:
        """What is launched from now on finds the layer's bytes. Raises EnvironmentFault when they cannot be fetched."""
        ticket = self._state[layer]
        if ticket == _READY:
            # Its bytes never left. But they may still be on their way home, and computing may change them.
            ticket = self._saves.pop(layer, 0)
            if not ticket:
                return
        if ticket == _ABSENT:
            ticket = self._submit(layer, self._copies.mark())
        started = None if self._copies.done(ticket) else time.perf_counter()
        stall = None
        try:
            stall = self._copies.hold(ticket)
        except BaseException:
            self._state[layer] = _ABSENT
            if self._last == ticket:
                self._last = 0  # its error is raised
            raise
        finally:
            if stall is not None:
                self._unknown.append((self._pass, stall))
            elif started is not None:
                self._count_stall(self._pass, time.perf_counter() - started)
        self._saves.pop(layer, None)  # before the fetch
        self._state[layer] = _READY

    def after(self, layer: int) -> None:
        """The layer is computed (or launched): stores its result and fetches the next layer of its buffer."""
        following = self._following[layer]
        wanted = following >= 0 and self._state[following] == _ABSENT
        mark = self._copies.mark() if wanted or self._store is not None else None
        if self._store is not None:
            pieces = self._store(layer)
            self._last = self._saves[layer] = self._copies.submit(*pieces, after=mark)
            self._stored_bytes += int(pieces.size_bytes.sum())
        if wanted:
            self._submit(following, mark)
        if layer == len(self._state) - 1:
            self._passes += 1
            self._recent.append(self._pass)
            self._pass = _Pass()
            self._learn_stalls()

    def fetch(self, layers: Iterable[int]) -> None:
        """Begins to fetch those of these layers that are not there, in this order. Their buffers must be free."""
        mark = self._copies.mark()
        for layer in layers:
            if self._state[layer] == _ABSENT:
                self._submit(layer, mark)

    @property
    def complete(self) -> bool:
        """Whether every layer's bytes were found there at once: then none shares a buffer with another."""
        return not any(self._state)

    def present(self) -> list[int]:
        """The layers that `before` or `drain` found there."""
        return [layer for layer, state in enumerate(self._state) if state == _READY]

    def drain(self) -> None:
        """Returns when no copy is under way. Raises EnvironmentFault, then too, when one of them failed.

        A layer whose fetch failed is fetched anew by its `before`.
        """
        failure: Exception | None = None
        for layer, ticket in enumerate(self._state):
            if ticket > 0:
                try:
                    self._copies.wait(ticket)
                    self._state[layer] = _READY
                except Exception as error:
                    self._state[layer] = _ABSENT
                    failure = failure or error
        last, self._last = self._last, 0
        self._copies.wait(last)  # the results, and fetches that only the device has waited for
        if failure is not None:
            raise failure

    def statistics(self) -> StreamStatistics:
        return StreamStatistics(
            passes=self._passes,
            loads=self._loads,
            loaded_bytes=self._loaded_bytes,
            stored_bytes=self._stored_bytes,
            stalls=self._stalls,
            stall_seconds=self._stall_seconds,
            recent_pass_stall_seconds=max((each.stall_seconds for each in list(self._recent)), default=0.0),
            busy_seconds=self._copies.statistics().busy_seconds,
        )

    def _count_stall(self, where: _Pass, seconds: float) -> None:
        self._stalls += 1
        self._stall_seconds += seconds
        where.stall_seconds += seconds

    def _learn_stalls(self) -> None:
        while self._unknown:
            where, stall = self._unknown[0]
            seconds = stall()
            if seconds is None:
                return
            self._unknown.popleft()
            if seconds > _SHORTEST_STALL_S:
                self._count_stall(where, seconds)

    def _submit(self, layer: int, after: Mark | None) -> int:
        pieces = self._load(layer)
        buffer = self._buffers[layer]
        before = self._occupant.get(buffer)
        if before is not None:
            self._state[before] = _ABSENT
        ticket = self._last = self._copies.submit(*pieces, after=after)
        self._occupant[buffer], self._state[layer] = layer, ticket
        self._loads += 1
        self._loaded_bytes += int(pieces.size_bytes.sum())
        return ticket
