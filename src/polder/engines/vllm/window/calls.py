"""What the engine core asks of every worker about its window, by `collective_rpc`, ordered with the steps (see
rank/calls.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from polder.engines.vllm.process import here, present
from polder.engines.vllm.rank import calls
from polder.engines.vllm.window.limits import check_runner
from polder.engines.vllm.window.runner import hook_runner
from polder.engines.vllm.window.worker import WorkerWindow, hook_layer
from polder.errors import EnvironmentFault, PolderError

__all__ = ["bring_home", "close_units", "figures", "install", "open_units"]


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
        hook_layer(window, layers[name].impl, number)
    hook_runner(window, worker_.model_runner)
    return ""


def open_units(
    worker_: Any, donors: Mapping[int, Sequence[int]], sources: Sequence[int], targets: Sequence[int]
) -> str:
    """Moves blocks out of the donors, and puts their pages under windowed units. `donors`: unit -> these windowed
    units.

    Returns what was wrong, with the pages where they were; "" if nothing.
    """
    memory, window = present(here.memory), present(here.window)
    memory.backend.fence()
    src, dst = np.asarray(sources, np.int64), np.asarray(targets, np.int64)
    if len(src):
        memory.move(src, dst)
        calls.rewrite_block_tables(worker_.model_runner, src, dst)
    memory.span.unmap(memory.geometry.slots(list(donors)))
    try:
        window.open(donors)
    except (PolderError, OSError) as error:
        return f"rank {memory.rank}: {error}"
    return ""


def close_units(worker_: Any, donors: Sequence[int]) -> None:
    memory, window = present(here.memory), present(here.window)
    memory.backend.fence()
    window.settled()  # blocks of other donors may be among those that did not get home: they are doubtful then
    window.close(donors)


def bring_home(worker_: Any, sources: Sequence[int], targets: Sequence[int]) -> str:
    """Windowed blocks become regular ones. Returns what was wrong, and then the targets hold nothing of worth; "" if
    nothing."""
    memory, window = present(here.memory), present(here.window)
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
    return error


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
