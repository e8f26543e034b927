"""Wrappers of what vLLM's engine core calls while it serves, and its utilities for tests. hooks.py says where they are put."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from polder.metrics import checked

__all__ = [
    "UTILITIES",
    "add_lora",
    "handle_client_request",
    "process_engine_step",
    "reset_prefix_cache",
    "shutdown",
]


def handle_client_request(stock: Callable[..., None]) -> Callable[..., None]:
    from vllm.v1.engine import EngineCoreRequestType as Kind

    @functools.wraps(stock)
    def handle(self: Any, request_type: Any, request: Any) -> None:
        stock(self, request_type, request)
        elastic = getattr(self, "polder", None)
        if elastic is not None:
            if request_type == Kind.WAKEUP:
                elastic.on_wake()
            elif request_type == Kind.ADD:
                elastic.on_request()
            elif request_type == Kind.ABORT:
                elastic.on_abort()

    return handle


def process_engine_step(stock: Callable[[Any], bool]) -> Callable[[Any], bool]:
    @functools.wraps(stock)
    def step(self: Any) -> bool:
        executed = bool(stock(self))
        elastic = getattr(self, "polder", None)
        if elastic is not None:
            elastic.on_step()
        return executed

    return step


def shutdown(stock: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(stock)
    def shut_down(self: Any) -> None:
        stock(self)
        for name in ("polder", "polder_local_broker"):
            if getattr(self, name, None) is not None:
                getattr(self, name).close()

    return shut_down


def reset_prefix_cache(stock: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(stock)
    def reset(self: Any, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """The tiers forget what a user makes the engine forget: weights may have been replaced in a way that Polder cannot see."""
        done = bool(stock(self, reset_running_requests, reset_connector))
        elastic = getattr(self, "polder", None)
        if done and not reset_connector and elastic is not None and elastic.tiers is not None:
            done = bool(self.scheduler.reset_connector_cache())
            elastic.tiers.seal_disks()
        return done

    return reset


def add_lora(stock: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(stock)  # vLLM reads the annotations, to decode what comes from its front end
    def add(self: Any, lora_request: Any) -> bool:
        done = bool(stock(self, lora_request))
        adapters = getattr(self, "polder_adapters", None)
        if done and adapters is not None:
            adapters.loaded(lora_request)
        return done

    return add


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
