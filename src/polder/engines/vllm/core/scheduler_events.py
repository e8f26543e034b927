"""Tells the subsystems what one of vLLM's schedulers does: each of its methods is replaced once, if a subsystem asks
for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polder.engines.vllm import hooks
from polder.engines.vllm.core.subsystem import Subsystem

__all__ = ["watch"]


def watch(scheduler: Any, subsystems: Sequence[Subsystem]) -> None:
    """From now on, `scheduler` tells these subsystems. Once a scheduler."""

    def listeners(event: str) -> list[Callable[..., None]]:
        """Those subsystems' methods that do something; what follows a call of vLLM's goes in the reverse order."""
        nothing = getattr(Subsystem, event)
        found = [getattr(part, event) for part in subsystems if getattr(type(part), event) is not nothing]
        return found[::-1] if event.startswith("after") else found

    def tell(events: list[Callable[..., None]], *what: Any) -> None:
        for event in events:
            event(*what)

    before_schedule, after_schedule = listeners("before_schedule"), listeners("after_schedule")
    before_update, after_update = listeners("before_update"), listeners("after_update")
    arrival, preemption, admission = map(listeners, ("on_arrival", "on_preemption", "on_admission"))

    def schedule(stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        tell(before_schedule)
        output = stock(*args, **kwargs)
        tell(after_schedule, output)
        return output

    def update_from_output(stock: Callable[..., Any], output: Any, runner_output: Any) -> Any:
        tell(before_update, output, runner_output)
        outputs = stock(output, runner_output)
        tell(after_update, output, outputs)
        return outputs

    def add_request(stock: Callable[..., None], request: Any) -> None:
        stock(request)
        tell(arrival, request)

    def preempt(stock: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        tell(preemption)
        stock(*args, **kwargs)

    def record(stock: Callable[..., None], request: Any, num_hits: int) -> None:
        stock(request, num_hits)
        tell(admission, request, num_hits)

    for owner, name, instead, wanted in (
        (scheduler, "schedule", schedule, [*before_schedule, *after_schedule]),
        (scheduler, "update_from_output", update_from_output, [*before_update, *after_update]),
        (scheduler, "add_request", add_request, arrival),
        (scheduler, "_preempt_request", preempt, preemption),
        (getattr(scheduler, "kv_cache_manager", None), "record_prefix_cache_stats", record, admission),
    ):
        if wanted:
            hooks.replace(owner, name, instead)
