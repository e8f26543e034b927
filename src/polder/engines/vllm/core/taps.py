"""What takes the place of calls of vLLM's engine core while it serves, and its utilities for tests. hooks.py has the
table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.v1.engine import EngineCoreRequestType as Kind

from polder.metrics import checked

__all__ = ["UTILITIES", "add_lora", "handle_client_request", "process_engine_step", "reset_prefix_cache", "shutdown"]


def handle_client_request(stock: Callable[..., None], core: Any, request_type: Any, request: Any) -> None:
    stock(core, request_type, request)
    elastic = getattr(core, "polder", None)
    if elastic is not None:
        if request_type == Kind.WAKEUP:
            elastic.on_wake()
        elif request_type == Kind.ADD:
            elastic.on_request()
        elif request_type == Kind.ABORT:
            elastic.on_abort()


def process_engine_step(stock: Callable[[Any], bool], core: Any) -> bool:
    executed = bool(stock(core))
    elastic = getattr(core, "polder", None)
    if elastic is not None:
        elastic.on_step()
    return executed


def shutdown(stock: Callable[[Any], None], core: Any) -> None:
    stock(core)
    for name in ("polder", "polder_local_broker"):
        if getattr(core, name, None) is not None:
            getattr(core, name).close()


def reset_prefix_cache(
    stock: Callable[..., bool], core: Any, reset_running_requests: bool = False, reset_connector: bool = False
) -> bool:
    """Tiers and sparse prefixes forget what a user makes the engine forget: weights may have been replaced in a way
    that Polder cannot see."""
    done = bool(stock(core, reset_running_requests, reset_connector))
    elastic = getattr(core, "polder", None)
    if done and elastic is not None:
        elastic.on_reset()
    if done and not reset_connector and elastic is not None and elastic.tiers is not None:
        done = bool(core.scheduler.reset_connector_cache())
        elastic.tiers.seal_disks()
    return done


def add_lora(stock: Callable[..., bool], core: Any, lora_request: Any) -> bool:
    done = bool(stock(core, lora_request))
    adapters = getattr(core, "polder_adapters", None)
    if done and adapters is not None:
        adapters.loaded(lora_request)
    return done


# ---------------------------------------------------------------- utilities: methods that vLLM's core gets from Polder


def polder_check(self: Any) -> dict[str, float]:
    """A utility any client of the engine can call: checks the laws now and returns the counters."""
    self.polder.check_integrity()
    return checked(self.polder.stats() | self.polder.exact_stats())


def polder_give_up(self: Any, segments: int) -> None:
    """A utility for tests and benches: gives weights of so many layers up as if the broker had asked for them."""
    self.polder.give_up(segments)


def polder_forget_local(self: Any) -> bool:
    """A utility for tests and benches: forgets the engine's own prefix cache and leaves the tiers as they are."""
    return bool(self.reset_prefix_cache.__wrapped__(self, False, False))


UTILITIES = (polder_check, polder_give_up, polder_forget_local)
