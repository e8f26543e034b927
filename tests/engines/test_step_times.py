"""A step's seconds are its own, also where vLLM schedules it before the output of the one before has come."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")  # the package it lies in imports vLLM
from polder.engines.vllm.core.scheduler_events import watch
from polder.engines.vllm.core.step_times import StepTimes
from polder.planner.rates import PrefillRate

TOKEN_S, FIXED_S = 34e-6, 3e-3


class Scheduler(SimpleNamespace):
    """Has vLLM's name for it, which hooks.put looks at."""


class Engine:
    """A scheduler, and a device that computes one step after another; `ahead` steps are scheduled before an output is read."""

    def __init__(self, ahead: int) -> None:
        self.now, self.free_at, self.ahead = 100.0, 0.0, ahead
        self.scheduler = Scheduler(schedule=self._schedule, update_from_output=lambda output, result: {})
        self.times = StepTimes(clock=lambda: self.now)
        watch(self.scheduler, [self.times])

    def _schedule(self, tokens: int) -> Any:
        self.now += 1e-4
        return SimpleNamespace(total_num_scheduled_tokens=tokens)

    def run(self, steps: list[int]) -> list[tuple[int, float]]:
        under_way: list[tuple[Any, float]] = []
        found = []
        for tokens in steps:
            output = self.scheduler.schedule(tokens)
            self.free_at = max(self.free_at, self.now) + FIXED_S + tokens * TOKEN_S
            under_way.append((output, self.free_at))
            if len(under_way) > self.ahead:
                found += self._read(*under_way.pop(0))
        for output, ends_at in under_way:
            found += self._read(output, ends_at)
        return found

    def _read(self, output: Any, ends_at: float) -> list[tuple[int, float]]:
        self.now = max(self.now, ends_at)
        self.scheduler.update_from_output(output, None)
        return self.times.take()


MIX = [512, 4, 4, 4, 512, 4, 4, 256, 4, 4, 4, 4] * 20


def rate(ahead: int) -> float:
    measured = PrefillRate()
    for tokens, seconds in Engine(ahead).run(MIX):
        measured.observe(tokens, seconds)
    assert measured.seconds_per_token is not None
    return measured.seconds_per_token


@pytest.mark.parametrize("ahead", [0, 1])
def test_each_step_is_paired_with_its_own_tokens(ahead: int) -> None:
    found = Engine(ahead).run(MIX)
    assert [tokens for tokens, _ in found] == MIX
    for tokens, seconds in found:
        assert seconds == pytest.approx(FIXED_S + tokens * TOKEN_S, abs=2e-4)


def test_the_prefill_rate_under_async_scheduling_is_that_without() -> None:
    assert rate(0) == pytest.approx(TOKEN_S, rel=0.1)
    assert rate(1) == pytest.approx(rate(0), rel=0.2)


def test_time_in_which_the_engine_was_idle_is_nobodys() -> None:
    engine = Engine(0)
    first = engine.run([64])
    engine.now += 50.0
    assert engine.run([64])[0][1] == pytest.approx(first[0][1], abs=1e-3)


def test_a_step_without_an_output_is_passed_over() -> None:
    engine = Engine(0)
    engine.scheduler.schedule(512)
    assert [tokens for tokens, _ in engine.run([4, 4])] == [4, 4]
