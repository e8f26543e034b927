"""Tells the subsystems what one of vLLM's schedulers does: each of its methods is replaced once, if a subsystem asks for it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from polder.engines.vllm import hooks
from polder.engines.vllm.core.subsystem import Subsystem

__all__ = ["watch"]

Event = Callable[..., None]


def watch(scheduler: Any, subsystems: Sequence[Subsystem]) -> None:
    """From now on, `scheduler` tells these subsystems. Once a scheduler."""

    def listeners(event: str) -> list[Event]:
        """Those subsystems' methods that do something."""
        nothing = getattr(Subsystem, event)
        return [getattr(part, event) for part in subsystems if getattr(type(part), event) is not nothing]

    manager = getattr(scheduler, "kv_cache_manager", None)
    _around(scheduler, "schedule", _schedule, listeners("before_schedule"), listeners("after_schedule"))
    _around(scheduler, "update_from_output", _update, listeners("before_update"), listeners("after_update"))
    _around(scheduler, "add_request", _arrival, [], listeners("on_arrival"))
    _around(scheduler, "_preempt_request", _preemption, listeners("on_preemption"), [])
    _around(manager, "record_prefix_cache_stats", _admission, [], listeners("on_admission"))


def _around(owner: Any, name: str, wrapper: Callable[..., Any], before: list[Event], after: list[Event]) -> None:
    if before or after:
        hooks.replace(owner, name, functools.partial(wrapper, before, after[::-1]))


def _schedule(before: list[Event], after: list[Event], stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def schedule(*args: Any, **kwargs: Any) -> Any:
        for event in before:
            event()
        output = stock(*args, **kwargs)
        for event in after:
            event(output)
        return output

    return schedule


def _update(before: list[Event], after: list[Event], stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def update(scheduler_output: Any, model_runner_output: Any) -> Any:
        for event in before:
            event(scheduler_output, model_runner_output)
        outputs = stock(scheduler_output, model_runner_output)
        for event in after:
            event(scheduler_output, outputs)
        return outputs

    return update


def _arrival(before: list[Event], after: list[Event], stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def add_request(request: Any) -> None:
        stock(request)
        for event in after:
            event(request)

    return add_request


def _preemption(before: list[Event], after: list[Event], stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def preempt(*args: Any, **kwargs: Any) -> None:
        for event in before:
            event()
        stock(*args, **kwargs)

    return preempt


def _admission(before: list[Event], after: list[Event], stock: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(stock)
    def record(request: Any, num_hits: int) -> None:
        stock(request, num_hits)
        for event in after:
            event(request, num_hits)

    return record
