"""What a worker measures before its first request, for goal.py: a step's computing, and the window's copies without
any."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from typing import Any

import numpy as np

from polder.engines.vllm.process import here, present
from polder.engines.vllm.window.worker import INLINE_BYTES, WorkerWindow
from polder.errors import EnvironmentFault
from polder.memory.copy import CopyEngine
from polder.planner.window_steps import StepFigures
from polder.window.stream import WindowStream

__all__ = ["measure"]

TRIES = 7
STEPS_BESIDE = 2
"""One ends before the copies do, as a rule, and the other after them."""
MOST_FAILURES = 16
COPIED_BYTES = 32 << 20
"""By a longer pass, at most."""


def measure(worker_: Any, context_tokens: int) -> StepFigures:
    """Called by the core. Steps with and without a context of `context_tokens`; copies over regular blocks, zero onto
    zero.

    Steps are collective: every rank makes the same number of them, and what may raise on one of them comes after all
    steps.
    """
    window = present(here.window)
    plan = window.plan
    step = _steps_of(worker_.model_runner, window)
    short_s, long_s = (_median_s(step, tokens) for tokens in (1, context_tokens))
    contention_s_per_byte, windowed_steps = _contention(window, step), _windowed_steps(window, step)
    overhead_s, link_bytes_per_s = _copying(window)
    return StepFigures(
        layers=len(plan.layers),
        window_layers=plan.window_layers,
        block_bytes=plan.block_bytes,
        block_tokens=plan.block_tokens,
        step_s=short_s,
        token_s=max(0.0, long_s - short_s) / max(1, context_tokens - 1),
        overhead_s=overhead_s,
        link_bytes_per_s=link_bytes_per_s,
        contention_s_per_byte=contention_s_per_byte,
        windowed_steps=windowed_steps,
    )


def _mapped_blocks(window: WorkerWindow) -> int:
    """Before the first request, when the units that have pages are the first ones."""
    return len(window.memory.pages_of) * window.memory.geometry.unit_blocks


@contextlib.contextmanager
def _stream_over_regular(window: WorkerWindow) -> Iterator[WindowStream]:
    """A stream that takes regular blocks for windowed ones. A copy of its last pass may fail."""
    copies = CopyEngine(window.backend, inline_bytes=INLINE_BYTES)
    try:
        yield WindowStream(copies, replace(window.homes, first=1), window_layers=window.plan.window_layers)
    finally:
        with contextlib.suppress(EnvironmentFault):
            copies.close()


def _steps_of(runner: Any, window: WorkerWindow) -> Callable[[int], float]:
    """Seconds of a pass over one token with a context of so many, by vLLM's own warm-up. With the V1 runner it attends
    to the null block again and again: a cache that holds it flatters them. The V2 runner names blocks 0, 1, 2 and so
    on, here those that are mapped."""
    dummy_step = _v1_step if hasattr(runner, "input_batch") else _v2_step

    def step(tokens: int) -> float:
        started = time.perf_counter()
        dummy_step(runner, window, tokens)
        window.memory.backend.fence()
        return time.perf_counter() - started

    return step


def _v1_step(runner: Any, window: WorkerWindow, tokens: int) -> None:
    from vllm.config import CUDAGraphMode

    runner._dummy_run(
        1,
        cudagraph_runtime_mode=CUDAGraphMode.NONE,
        force_attention=True,
        uniform_decode=True,
        profile_seq_lens=tokens,
    )


def _v2_step(runner: Any, window: WorkerWindow, tokens: int) -> None:
    config = runner.kv_cache_config
    runner.kv_cache_config = replace(config, num_blocks=_mapped_blocks(window))
    try:
        runner._dummy_run(1, uniform_decode=True, context_len=tokens - 1)
    finally:
        runner.kv_cache_config = config


def _contention(window: WorkerWindow, step: Callable[[int], float]) -> float:
    """By how much a step takes longer for each byte copied under it: steps with and without, in turn."""
    homes = window.homes
    copies = CopyEngine(window.memory.backend)
    blocks = np.arange(1, 1 + min(_mapped_blocks(window) - 1, homes.blocks))
    regular = replace(homes, first=1)
    layers = range(len(homes.local))
    source = np.concatenate([regular.home(layer, blocks) for layer in layers])
    target = np.concatenate([regular.place(layer, blocks) for layer in layers])
    most = max(1, COPIED_BYTES // homes.stride_bytes)
    source, target = source[:most], target[:most]
    slower = []
    try:
        for _ in range(TRIES):
            alone_s = step(1)
            ticket = copies.submit(target, source, homes.stride_bytes)
            slower.append(sum(step(1) for _ in range(STEPS_BESIDE)) - STEPS_BESIDE * alone_s)
            copies.wait(ticket)
    finally:
        copies.close()
    return max(0.0, median(slower)) / (len(source) * homes.stride_bytes)


def _windowed_steps(window: WorkerWindow, step: Callable[[int], float]) -> tuple[tuple[int, float], ...]:
    """Real steps, as if regular blocks were windowed, with those without in turn: a few blocks, half of what is there,
    all."""
    most = min(_mapped_blocks(window) - 1, window.homes.blocks)
    found: list[tuple[int, float]] = []
    with _stream_over_regular(window) as stream:
        for blocks in sorted({1, max(1, most // 2), most}):
            longer = []
            for _ in range(TRIES + 1):
                alone_s = step(1)
                with window.passing(stream, np.arange(1, 1 + blocks)):
                    longer.append(step(1) - alone_s)
            more_s = median(longer[1:])  # all code has run once
            found.append((blocks, max(more_s, *(before_s for _, before_s in found), 0.0)))
    return tuple(found)


def _copying(window: WorkerWindow) -> tuple[float, float]:
    """(seconds of a layer besides its bytes, bytes a second), from passes over one block and over many."""
    homes, block_bytes = window.homes, window.homes.stride_bytes
    layers = len(homes.local)
    most = min(_mapped_blocks(window) - 1, homes.blocks, max(2, COPIED_BYTES // (layers * block_bytes)))
    failed: list[int] = []
    with _stream_over_regular(window) as stream:

        def one_pass(blocks: int) -> float:
            read = np.arange(1, 1 + blocks)
            while True:
                started = time.perf_counter()
                try:
                    stream.begin(read, read[-1:])
                    for layer in range(layers):
                        stream.before(layer)
                        stream.after(layer)
                    stream.settle()
                    return time.perf_counter() - started
                except EnvironmentFault:  # one failed copy is no reason not to serve; the next pass begins anew
                    failed.append(blocks)
                    if len(failed) > MOST_FAILURES:
                        raise

        short_s, long_s = (_median_s(one_pass, blocks) for blocks in (1, most))
    rate = layers * block_bytes / short_s
    if most > 1:
        rate = layers * (most - 1) * block_bytes / max(1e-9, long_s - short_s)
    return max(0.0, short_s / layers - 2 * block_bytes / rate), rate


def _median_s(timed: Callable[[int], float], argument: int) -> float:
    timed(argument)  # all code has run once
    return median(timed(argument) for _ in range(TRIES))
