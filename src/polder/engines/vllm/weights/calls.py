"""What the engine core asks of every worker about its weights, by `collective_rpc`, ordered with the steps (see
rank/calls.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polder.engines.vllm.plans import Taken, WeightsFound
from polder.engines.vllm.process import here, present
from polder.engines.vllm.rank.memory import WorkerMemory
from polder.engines.vllm.weights.offloader import WeightOffloader
from polder.errors import PolderError
from polder.weights.rotation import Rotation
from polder.weights.store import Segment, WeightStore

__all__ = ["adopt", "describe", "figures", "give", "take", "undo_give"]


def describe(worker_: Any) -> WeightsFound | None:
    """None: this engine's weights stay where they are."""
    offloader = here.offloader
    if offloader is None or offloader.store is None:
        return None
    found = offloader.store.statistics()
    return WeightsFound(
        layers=found.layers,
        layer_pages=found.layer_pages,
        moved_bytes=found.moved_bytes,
        resident_bytes=offloader.resident_bytes,
        copy_share=offloader.copy_share,
        streams=offloader.streams,
    )


def adopt(worker_: Any, generation: int, segments: Sequence[Sequence[Sequence[int]]]) -> str:
    """The start is over: the private pages go, and the weights lie on the broker's segments, or sleep without any.

    Returns what was wrong; "" if nothing.
    """
    offloader = present(here.offloader)
    offloader.end_private()
    error = give(worker_, generation, segments) if segments else ""
    if not error:
        present(offloader.store).wait_all()  # the first request is not to find a cold model
    return error


def give(worker_: Any, generation: int, segments: Sequence[Sequence[Sequence[int]]]) -> str:
    """Maps the segments (each one list of pages a rank) and begins to copy layers in, in the order of execution.

    Returns what was wrong; "" if nothing.
    """
    memory, offloader, store = _parts()
    try:
        incoming: list[Segment] = []
        for segment in segments:
            pages = tuple(segment[memory.rank])
            memory.fetch(generation, pages)
            incoming.append(tuple(memory.imported.handles(generation, pages)))
            offloader.given[incoming[-1]] = (generation, pages)
        store.give(incoming)
        if offloader.wake == "whole":
            store.wait_all()
    except (PolderError, OSError) as error:
        return f"rank {memory.rank}: {error}"
    return ""


def take(worker_: Any, count: int, slots: int, current_generation: int) -> Taken:
    """Gives up `count` segments: all to sleep, else the rest rotates over `slots` slots. Pages of a former broker are
    destroyed."""
    memory, offloader, store = _parts()
    left = len(store.segments) - count
    try:
        layers = store.statistics().layers
        if left > 0 and not offloader.streams:
            return Taken(error=f"rank {memory.rank}: a model in CUDA graphs has all of its layers or none")
        rotation = None if left <= 0 else Rotation.winning(layers, layers - left, slots=slots)
        freed = store.rotate(rotation)
    except PolderError as error:
        return Taken(error=f"rank {memory.rank}: {error}")
    numbers = []
    for segment in freed:
        generation, pages = offloader.given.pop(segment)
        numbers.append(pages)
        if generation != current_generation:
            memory.imported.discard(generation, pages)
    return Taken(segments=tuple(numbers))


def undo_give(worker_: Any, generation: int, segments: Sequence[Sequence[Sequence[int]]], slots: int) -> Taken:
    """Gives up as many segments as `give` was to map: the same ones if this rank has not mapped them. `slots`: as in
    `take`."""
    memory, offloader, store = _parts()
    numbers = [tuple(segment[memory.rank]) for segment in segments]
    coming = {(generation, pages) for pages in numbers}
    if coming <= {offloader.given[segment] for segment in store.segments}:
        return take(worker_, len(segments), slots, generation)
    offloader.given = {segment: known for segment, known in offloader.given.items() if known not in coming}
    return Taken(segments=tuple(numbers))


def figures(worker_: Any) -> dict[str, float]:
    """Counters and gauges of this rank."""
    _, offloader, store = _parts()
    store.check_integrity()
    found = store.statistics()
    return {
        "weights_loaded_bytes_total": float(found.stream.loaded_bytes),
        "weights_loads_total": float(found.stream.loads),
        "weights_stalls_total": float(found.stream.stalls),
        "weights_stall_seconds_total": found.stream.stall_seconds,
        "weights_pass_stall_seconds": found.stream.recent_pass_stall_seconds,
        "weights_copy_seconds_total": found.stream.busy_seconds,
        "weights_resident_bytes": float(offloader.resident_bytes),
        "weights_rotating_layers": float(found.rotating),
    }


def _parts() -> tuple[WorkerMemory, WeightOffloader, WeightStore]:
    offloader = present(here.offloader)
    return present(here.memory), offloader, present(offloader.store)
