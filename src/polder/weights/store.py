"""One rank's decoder layers, over pages that are taken away and come back.

The layers have a span of `layers * layer_pages` page slots, at addresses that never change (law 3). A host copy has the
bytes of all layers at any time. The caller gives and takes segments: tuples of `layer_pages` pages. A resident layer is
mapped onto a segment of its own. The layers of a rotation are mapped onto the segments of their slots, several on one
("virtual aliasing", Oneiros). So giving a segment up costs no copy, and getting one back costs one from host to device.

    rotation        segments held    what is mapped
    all resident    layers           each layer over its own segment
    some rotate     layers - won     several layers over each slot: a stream fetches them in turn
    None (asleep)   0                nothing

Calls: all operations belong to the thread that launches the layers. `rotate`, `take`, `give` and `close` come between
two passes, and wait for the stream and the device first. A segment is unmapped before it is returned.

Coming back: `give` returns when the pages are mapped and the copies are submitted, in the order of execution.
`before(layer)` waits for that layer only, `wait_all` for all layers.

Failures: when mapping fails, the store is as it was before the call. If that cannot be mapped any more either, the
store is asleep, and holds its segments for the next `rotate`, `take` or `give`. In both cases the error is raised, and
incoming segments stay the caller's. A copy that fails is raised by `before`, see polder.stream.pipeline.
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from polder.errors import EnvironmentFault, IntegrityError, UsageError
from polder.memory.backend import Backend
from polder.memory.copy import CopyEngine
from polder.memory.page import Handle, Indices
from polder.memory.span import Span
from polder.stream.pipeline import LayerStream, Pieces, StreamStatistics
from polder.units import format_bytes
from polder.weights.host_copy import HostCopy, read_out
from polder.weights.layout import alignment_bytes, lay_out
from polder.weights.rotation import Rotation

if TYPE_CHECKING:
    import torch

__all__ = ["Segment", "WeightStatistics", "WeightStore"]

logger = logging.getLogger("polder.weights")

Segment = tuple[Handle, ...]
"""`layer_pages` pages. Comes back equal to how it was given, so it can be a key of the caller's books."""


@dataclass(frozen=True, kw_only=True)
class WeightStatistics:
    layers: int
    layer_pages: int
    segments: int
    """Segments held."""
    rotating: int
    won: int
    """Segments that the rotation saves; all of them while asleep."""
    moved_bytes: int
    """Bytes of all layers, without padding."""
    resident_bytes: int
    """Bytes of the tensors that could not move."""
    host_bytes: int
    stream: StreamStatistics

    @property
    def layer_load_s(self) -> float:
        """Mean seconds that bringing a layer in took; 0 before the first."""
        return self.stream.busy_seconds / self.stream.loads if self.stream.loads else 0.0


class WeightStore:
    """Begins asleep. How it behaves is said at the top of this module."""

    tensors: tuple[dict[str, torch.Tensor], ...]
    """For each layer those that can move, by name, at their addresses for life. Touch them in a pass only."""

    def __init__(
        self,
        backend: Backend,
        layers: Sequence[Mapping[str, torch.Tensor]],
        *,
        outside: Mapping[str, torch.Tensor] | None = None,
        obstacles: Mapping[int, str] | None = None,
        shared: HostCopy | None = None,
        file: int | None = None,
        fence: Callable[[], None] | None = None,
    ) -> None:
        """Adopts the tensors that `layers` name: reads their bytes, and makes `tensors`, which are to take their
        places.

        `outside`: the model's other tensors, with which they may share memory. `obstacles`: by id(tensor), why it stays
        where it is. `shared`: another engine's host copy of the same weights, used in place of one of its own. The
        store closes it. `file`: an empty memory file to make its own in, so that others can share it. `fence`: returns
        when the device has computed what was launched; Backend.fence when not given.

        Keeps no reference to the layers' tensors: once `tensors` have taken their places, the old memory is free.
        Raises UsageError when no tensor can move or `shared` has other bytes, OutOfPages when there is no room on the
        host.
        """
        from polder.weights.tensors import extent_of, moved

        device, page_bytes, why = backend.device, backend.page_bytes, obstacles or {}
        self.layout = lay_out(
            [
                [extent_of(name, tensor, device, why.get(id(tensor), "")) for name, tensor in layer.items()]
                for layer in layers
            ],
            page_bytes=page_bytes,
            alignment=alignment_bytes(device),
            outside=[extent_of(name, tensor, device) for name, tensor in (outside or {}).items()],
        )
        self._fence = fence or backend.fence
        self._layers, self._pages = len(layers), self.layout.layer_pages
        self.host = read_out(backend, self.layout.blocks, self._pages * page_bytes, shared, file)
        self._span = Span(backend, self._layers * self._pages)
        self._unpin: Callable[[], None] = lambda: None
        try:
            backend.pin(self.host.address(0), self.host.size_bytes)
            self._unpin = functools.partial(backend.unpin, self.host.address(0))
        except EnvironmentFault as error:
            logger.warning(
                "the host copy of %s cannot be pinned (%s): copies of layers take about twice as long and keep the engine "
                "waiting; raise the limit of locked memory (ulimit -l), if that is what it is",
                format_bytes(self.host.size_bytes),
                error,
            )
        self.host.protect()
        first, flat = self._span.address(0), self._span.tensor()
        starts = [self._span.address(layer * self._pages) for layer in range(self._layers)]
        self.tensors = tuple(
            {name: moved(layer[name], flat, start - first + offset) for name, offset in offsets.items()}
            for layer, start, offsets in zip(layers, starts, self.layout.offsets, strict=True)
        )
        self._pieces = [
            Pieces.of([(start, self.host.address(layer), used)])
            for layer, (start, used) in enumerate(zip(starts, self.layout.used_bytes, strict=True))
        ]
        self._copies = CopyEngine(backend)
        self._stream = LayerStream(self._copies, self._load, range(self._layers))
        self._rotation: Rotation | None = None
        self._held: list[Segment] = []
        self._under: dict[int, Segment] = {}  # layer -> the segment that it is mapped onto

    @property
    def rotation(self) -> Rotation | None:
        """None: asleep."""
        return self._rotation

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The segments held."""
        return tuple(self._held)

    # ------------------------------------------------------------------ between two passes

    def take(self, count: int) -> list[Segment]:
        """Gives up `count` segments: all of them to sleep. Raises UsageError when it has not so many."""
        left = len(self._held) - count
        if count < 0 or left < 0:
            raise UsageError(f"{count} segments asked for of {len(self._held)}")
        return self.rotate(Rotation.holding(self._layers, left) if left else None)

    def give(self, segments: Sequence[Segment]) -> None:
        """Gets segments, up to as many as there are layers. Raises as `rotate` does."""
        if segments:
            self.rotate(Rotation.holding(self._layers, len(self._held) + len(segments)), segments)

    def rotate(self, rotation: Rotation | None, incoming: Sequence[Segment] = ()) -> list[Segment]:
        """Runs in another rotation from the next pass on, None to sleep, and returns the segments that it does not
        need.

        Raises UsageError when it needs more than are held and incoming, IntegrityError when an incoming page is held
        already or comes twice, EnvironmentFault (OutOfPages) when the pages cannot be mapped: see Failures.
        """
        homes = rotation.homes if rotation else ()
        if rotation and len(homes) != self._layers:
            raise UsageError(f"a rotation of {len(homes)} layers for a model of {self._layers}")
        segments = [*self._held, *incoming]
        self._check(segments)
        firsts = sorted(set(homes))
        if len(firsts) > len(segments):
            raise UsageError(f"this rotation needs {len(firsts)} segments, and there are {len(segments)}")
        with contextlib.suppress(EnvironmentFault):  # what was not copied is not there: it is fetched again
            self._stream.drain()
        self._fence()
        # A home whose bytes are somewhere stays there, and costs no copy.
        kept = {layer: self._under[layer] for layer in self._stream.present() if layer in firsts}
        used = set(kept.values())
        spare = [segment for segment in segments if segment not in used]
        chosen = {home: kept[home] if home in kept else spare.pop() for home in firsts}
        self._remap({layer: chosen[home] for layer, home in enumerate(homes)})
        self._rotation, self._held = rotation, list(chosen.values())
        self._stream.assign(homes or range(self._layers), kept)
        if rotation:
            self._stream.fetch(firsts)
        return spare

    def wait_all(self) -> None:
        """Returns when no copy is under way. Raises EnvironmentFault when one of them failed."""
        self._stream.drain()

    def wait_all_present(self) -> None:
        """Returns when every layer's bytes are there, however the layers are run. Costs a look at one number when they
        are.

        Raises EnvironmentFault when a layer cannot be fetched, IntegrityError when layers share memory, or while
        asleep.
        """
        if self._stream.complete:
            return
        if self._rotation is None or self._rotation.won:
            raise IntegrityError("a model whose layers take turns, or sleep, cannot run as a whole")
        for layer in range(self._layers):
            self._stream.before(layer)

    def close(self) -> None:
        """Unmaps everything and lets go of the host copy. The segments are the caller's. May be repeated."""
        with contextlib.suppress(EnvironmentFault):
            self._copies.close()
        self._fence()
        self._span.close()
        self._unpin()
        self._unpin = lambda: None
        self.host.close()

    # ------------------------------------------------------------------ in a pass

    def before(self, layer: int) -> None:
        """To be called before the layer is launched: returns when its bytes are there. Raises EnvironmentFault when
        they cannot be copied, IntegrityError while asleep."""
        self._stream.before(layer)

    def after(self, layer: int) -> None:
        """To be called when the layer is launched: the next layer of its slot may come."""
        self._stream.after(layer)

    # ------------------------------------------------------------------ books

    def statistics(self) -> WeightStatistics:
        return WeightStatistics(
            layers=self._layers,
            layer_pages=self._pages,
            segments=len(self._held),
            rotating=len(self._rotation.rotating) if self._rotation else 0,
            won=self._rotation.won if self._rotation else self._layers,
            moved_bytes=sum(self.layout.used_bytes),
            resident_bytes=self.layout.resident_bytes,
            host_bytes=self.host.size_bytes,
            stream=self._stream.statistics(),
        )

    def check_integrity(self) -> None:
        """Raises IntegrityError when segments, rotation and what is mapped do not fit together."""
        self._check(self._held)
        homes = self._rotation.homes if self._rotation else ()
        if self._rotation and len(self._held) != self._rotation.segments:
            raise IntegrityError(f"{len(self._held)} segments held, {self._rotation.segments} needed")
        if list(self._under) != list(range(len(homes))) or any(
            self._under[layer] != self._under[home] for layer, home in enumerate(homes)
        ):
            raise IntegrityError("a layer does not lie over the segment of its home")
        homed = {self._under[home] for home in homes}
        if len(homed) != len(set(homes)) or not homed <= set(self._held):
            raise IntegrityError(f"{len(set(homes))} homes lie over {len(homed)} segments, or over some not held")
        mapped = np.repeat(np.arange(self._layers) < len(homes), self._pages)
        if not np.array_equal(self._span.mapped, mapped):
            raise IntegrityError(f"{int(self._span.mapped.sum())} pages mapped, {int(mapped.sum())} expected")

    # ------------------------------------------------------------------ inside

    def _load(self, layer: int) -> Pieces:
        if self._rotation is None:
            raise IntegrityError(f"layer {layer} of a model that is asleep")
        return self._pieces[layer]

    def _check(self, segments: Sequence[Segment]) -> None:
        pages = [page for segment in segments for page in segment]
        if any(len(segment) != self._pages for segment in segments) or len(set(pages)) != len(pages):
            raise IntegrityError(f"{len(segments)} segments with a page twice, or not of {self._pages} pages")

    def _remap(self, under: dict[int, Segment]) -> None:
        """Maps each layer onto its segment in `under`. When that fails, all is as before or nothing is mapped."""
        before = self._under
        changed = [layer for layer in range(self._layers) if before.get(layer) != under.get(layer)]
        try:
            self._span.unmap(self._slots([layer for layer in changed if layer in before]))
            self._map([layer for layer in changed if layer in under], under)
        except BaseException:
            self._restore([layer for layer in changed if layer in before])
            raise
        self._under = under

    def _restore(self, layers: Sequence[int]) -> None:
        """Maps those of `layers` again that are not, or unmaps everything."""
        missing = [layer for layer in layers if not self._span.mapped[layer * self._pages]]
        try:
            self._map(missing, self._under)
        except EnvironmentFault:
            self._span.unmap(np.flatnonzero(self._span.mapped))
            self._under, self._rotation = {}, None
            self._stream.assign(range(self._layers))

    def _map(self, layers: Sequence[int], under: Mapping[int, Segment]) -> None:
        self._span.map(self._slots(layers), [page for layer in layers for page in under[layer]])

    def _slots(self, layers: Sequence[int]) -> Indices:
        return (np.array(layers, dtype=np.int64)[:, None] * self._pages + np.arange(self._pages)).reshape(-1)
