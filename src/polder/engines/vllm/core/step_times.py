"""How long each step took, by the outputs of one scheduler.

Where vLLM schedules a step ahead of the output before it, the call that schedules a step returns with another step's output, so
its duration says nothing about its tokens. A step begins when it is scheduled or when the output before it has come, whichever is
later, and ends with its own output.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ["StepTimes"]

MOST_UNDER_WAY = 16
"""Steps; vLLM has two, one more for each stage of a pipeline."""


class StepTimes:
    """Listens in on one scheduler object."""

    def __init__(self, scheduler: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._under_way: deque[tuple[Any, float, int]] = deque(maxlen=MOST_UNDER_WAY)  # output, scheduled at, tokens
        self._output_at = float("-inf")
        self._ended: deque[tuple[int, float]] = deque(maxlen=MOST_UNDER_WAY)
        schedule, update = scheduler.schedule, scheduler.update_from_output

        def timed_schedule(*args: Any, **kwargs: Any) -> Any:
            began = self._clock()
            output = schedule(*args, **kwargs)
            self._under_way.append((output, began, output.total_num_scheduled_tokens))
            return output

        def timed_update(output: Any, *args: Any, **kwargs: Any) -> Any:
            self._end(output, self._clock())
            return update(output, *args, **kwargs)

        scheduler.schedule = timed_schedule
        scheduler.update_from_output = timed_update

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
