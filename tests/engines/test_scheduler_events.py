"""Subsystems are told of one scheduler's calls in order, and its methods are replaced once."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")  # the package it lies in imports vLLM
from polder.engines.vllm import hooks
from polder.engines.vllm.core.scheduler_events import watch
from polder.engines.vllm.core.subsystem import Subsystem
from polder.errors import InternalError


class Scheduler(SimpleNamespace):
    """Has vLLM's name for it, which hooks.put looks at."""


class Part(Subsystem):
    def __init__(self, name: str, told: list[str]) -> None:
        self.name, self.told = name, told

    def before_schedule(self) -> None:
        self.told.append(f"before {self.name}")

    def after_schedule(self, output: Any) -> None:
        self.told.append(f"after {self.name} {output}")


def test_what_follows_a_call_is_told_in_the_reverse_order_and_what_nobody_asks_for_stays_stock() -> None:
    told: list[str] = []

    def schedule() -> str:
        told.append("schedule")
        return "step"

    scheduler = Scheduler(schedule=schedule, update_from_output=print, add_request=print)
    watch(scheduler, [Part("a", told), Subsystem(), Part("b", told)])
    assert scheduler.schedule() == "step"
    assert told == ["before a", "before b", "schedule", "after b step", "after a step"]
    assert scheduler.schedule.__wrapped__ is schedule, "replaced once"
    assert scheduler.update_from_output is print
    assert scheduler.add_request is print


def test_nothing_is_replaced_that_the_table_does_not_have() -> None:
    """Neither another function, nor one of this name that somebody else has."""
    scheduler, other = Scheduler(unknown=print), SimpleNamespace(schedule=print)
    for owner, attribute in ((scheduler, "unknown"), (other, "schedule"), (pytest, "get_kv_cache_configs")):
        with pytest.raises(InternalError, match=rf"hooks\.TAPS has no {attribute} of"):
            hooks.put(owner, attribute, len)
    assert (scheduler.unknown, other.schedule) == (print, print)
