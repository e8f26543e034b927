"""The weights' side, in every worker process: vLLM's offloader seam over polder.weights.store.

vLLM hands the decoder layers of the model to `wrap_modules` while it builds them, and calls `post_init` when their weights are
loaded and packed. Then their parameters move to addresses that never change, over pages that come and go, except those that a
kernel may remember by address (movable.py). Buffers stay: models write to some of them, and the host copy would bring back old
values. Until the engine core has agreed with the broker on pages, private ones lie there, so that vLLM can profile and compile as
it likes.

Around each layer the store is told, by direct calls in eager mode, and by vLLM's own opaque ops (`wait_prefetch`,
`start_prefetch`) where the model is compiled: they survive torch.compile, and name the tensors whose order they keep.

A CUDA graph holds neither: what Python does around a layer happens when the graph is captured, and not when it is replayed. vLLM
calls `sync_prev_onload` before each replay, and there all layers are waited for. So with graphs an engine has all of its layers or
none. Only where all graphs are piecewise can the two ops be kept out of them: the model is split there, too, and layers stream.

The functions at the end are called by the core through `collective_rpc`, ordered with the steps like those of worker.py.
"""

from __future__ import annotations

import functools
import inspect
import logging
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from vllm.model_executor.offloader.base import BaseOffloader

from polder.broker.client import status
from polder.emulation.factory import Emulation
from polder.engines.vllm.rank import worker
from polder.engines.vllm.rank.worker import Outcome, WeightsFound
from polder.engines.vllm.settings import EngineSettings
from polder.engines.vllm.weights import cpu_linear, host_copies, movable
from polder.errors import ConfigError, PolderError
from polder.memory.backend import Backend
from polder.weights.rotation import Rotation
from polder.weights.store import Segment, WeightStore
from polder.weights.tensors import held_elsewhere

__all__ = ["Taken", "WeightOffloader", "adopt", "describe", "figures", "give", "open_offloader", "take"]


logger = logging.getLogger("polder.engine")

LEAST_MOVED = 0.1
"""A smaller part of the layers' bytes is not worth an elastic engine."""
MARKER = "polder_weights"
"""In vLLM's additional_config, all of which is part of the keys of its compile caches: a graph that was compiled without the calls
around the layers, or with them, must not be loaded into an engine of the other kind."""
LAYER_OPS = ("vllm::wait_prefetch", "vllm::start_prefetch")
"""As vLLM's `splitting_ops` names them."""
GPU_COPY_SHARE = 0.016
"""B/H of an H100 by PCIe 5.0 (55 GB/s, 3.35 TB/s), and of an H200 about the same."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Answer to `take`: for each segment its pages on this rank. `error` is not empty when nothing was taken."""

    segments: tuple[tuple[int, ...], ...] = ()
    error: str = ""


class WeightOffloader(BaseOffloader):  # type: ignore[misc]
    """One a process, made where vLLM makes its own."""

    def __init__(
        self,
        device: str,
        page_bytes: int,
        open_store: Callable[[Backend, Sequence[Mapping[str, torch.Tensor]], Mapping[int, str]], WeightStore],
        *,
        compiled: bool,
        graphs: bool = False,
        links: str = "",
    ) -> None:
        """`compiled`: the layers run under torch.compile. `graphs`: CUDA graphs may hold whole layers: none can be streamed then.
        `page_bytes`: the broker's. `links`: POLDER_LINKS."""
    graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE) and not split_at_layers(compilation)
    key = host_copies.copy_key(vllm_config, vllm_config.parallel_config.rank)
    store = functools.partial(host_copies.open_store, broker=settings.broker, key=key)
    offloader = WeightOffloader(device, page_bytes, store, compiled=compiled, graphs=graphs, links=settings.links)
    offloader.wake = settings.wake
    if not cuda:
        cpu_linear.install(offloader.belongs)
    return offloader


def split_at_layers(compilation: Any) -> bool:
    """Whether no CUDA graph of this model holds the ops around a layer. Has vLLM split the model there if all graphs are piecewise.

    To be called before the model is compiled.
    """
    from vllm.config.compilation import CUDAGraphMode

    splits = compilation.is_attention_compiled_piecewise() and not compilation.use_inductor_graph_partition
    if compilation.cudagraph_mode != CUDAGraphMode.PIECEWISE or not splits:
        return False
    compilation.splitting_ops = [*dict.fromkeys([*compilation.splitting_ops, *LAYER_OPS])]
    return True


def mark(vllm_config: Any) -> None:
    """Makes the keys of vLLM's compile caches different from those of an engine whose weights stay. Raises ConfigError."""
    given = vllm_config.additional_config
    if not isinstance(given, dict):
        raise ConfigError("elastic weights need --additional-config to be a JSON object")
    vllm_config.additional_config = {**given, MARKER: "elastic"}


# ---------------------------------------------------------------- called by the core


def describe(worker_: Any) -> WeightsFound | None:
    """None: this engine's weights stay where they are."""
    if _offloader is None or _offloader.store is None:
        return None
    found = _offloader.store.statistics()
    return WeightsFound(
        layers=found.layers,
        layer_pages=found.layer_pages,
        moved_bytes=found.moved_bytes,
        resident_bytes=_offloader.resident_bytes,
        copy_share=_offloader.copy_share,
        streams=_offloader.streams,
    )


def adopt(worker_: Any, generation: int, segments: Sequence[Sequence[Sequence[int]]]) -> Outcome:
    """The start is over: the private pages go, and the weights lie on the broker's segments, or sleep without any."""
    assert _offloader is not None
    _offloader.end_private()
    outcome = give(worker_, generation, segments) if segments else Outcome(seconds=0.0)
    if not outcome.error:
        _store().wait_all()  # the first request is not to find a cold model
    return outcome


def give(worker_: Any, generation: int, segments: Sequence[Sequence[Sequence[int]]]) -> Outcome:
    """Maps the segments (each one list of pages a rank) and begins to copy layers in, in the order of execution."""
    memory, store = _memory(), _store()
    started = time.perf_counter()
    try:
        incoming: list[Segment] = []
        for segment in segments:
            pages = tuple(segment[memory.rank])
            memory.fetch(generation, pages)
            incoming.append(tuple(memory.imported.handles(generation, pages)))
            _given[incoming[-1]] = (generation, pages)
        store.give(incoming)
        assert _offloader is not None
        if _offloader.wake == "whole":
            store.wait_all()
    except (PolderError, OSError) as error:
        return Outcome(seconds=time.perf_counter() - started, error=f"rank {memory.rank}: {error}")
    return Outcome(seconds=time.perf_counter() - started)


def take(worker_: Any, count: int, slots: int, current_generation: int) -> Taken:
    """Gives up `count` segments: all to sleep, else the rest rotates over `slots` slots. Pages of a former broker are destroyed."""
    memory, store = _memory(), _store()
    assert _offloader is not None
    left = len(store.segments) - count
    try:
        layers = store.statistics().layers
        if left > 0 and not _offloader.streams:
            return Taken(error=f"rank {memory.rank}: a model in CUDA graphs has all of its layers or none")
        rotation = None if left <= 0 else Rotation.winning(layers, layers - left, slots=slots)
        freed = store.rotate(rotation)
    except PolderError as error:
        return Taken(error=f"rank {memory.rank}: {error}")
    numbers = []
    for segment in freed:
        generation, pages = _given.pop(segment)
        numbers.append(pages)
        if generation != current_generation:
            memory.imported.discard(generation, pages)
    return Taken(segments=tuple(numbers))


def figures(worker_: Any) -> dict[str, float]:
    """Counters and gauges of this rank."""
    store = _store()
    assert _offloader is not None
    store.check_integrity()
    found = store.statistics()
    return {
        "weights_loaded_bytes_total": float(found.stream.loaded_bytes),
        "weights_loads_total": float(found.stream.loads),
        "weights_stalls_total": float(found.stream.stalls),
        "weights_stall_seconds_total": found.stream.stall_seconds,
        "weights_pass_stall_seconds": found.stream.recent_pass_stall_seconds,
        "weights_copy_seconds_total": found.stream.busy_seconds,
        "weights_resident_bytes": float(_offloader.resident_bytes),
        "weights_rotating_layers": float(found.rotating),
    }
