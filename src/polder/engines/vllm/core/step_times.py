"""How long each step took, by the outputs of one scheduler.

Where vLLM schedules a step ahead of the output before it, the call that schedules a step returns with another step's
output, so its duration says nothing about its tokens. A step begins when it is scheduled or when the output before it
has come, whichever is later, and ends with its own output.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from polder.engines.vllm.core.subsystem import Subsystem

__all__ = ["StepTimes"]

MOST_UNDER_WAY = 16
"""Steps; vLLM has two, one more for each stage of a pipeline."""


class StepTimes(Subsystem):
    """The seconds of one scheduler's steps."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._under_way: deque[tuple[Any, float, int]] = deque(maxlen=MOST_UNDER_WAY)  # output, scheduled at, tokens
        self._output_at = float("-inf")
        self._ended: deque[tuple[int, float]] = deque(maxlen=MOST_UNDER_WAY)
        self._began = 0.0  # the schedule under way

    def before_schedule(self) -> None:
        self._began = self._clock()

    def after_schedule(self, output: Any) -> None:
        self._under_way.append((output, self._began, output.total_num_scheduled_tokens))

    def before_update(self, output: Any, runner_output: Any) -> None:
        self._end(output, self._clock())

    def take(self) -> list[tuple[int, float]]:
        """(tokens, seconds) of the steps whose outputs have come since the last call, in order."""
        ended = list(self._ended)
        self._ended.clear()
        return ended

    def _end(self, output: Any, now: float) -> None:
        while self._under_way:
            scheduled, began, tokens = self._under_way.popleft()
            if scheduled is output:
                self._ended.append((tokens, now - max(began, self._output_at)))
                break
        self._output_at = now
