"""Keeps steps as short as the operator's `tbt_goal`: fewer prompt tokens in a step while other requests decode.

vLLM's scheduler takes the tokens of a step from `max_num_scheduled_tokens`, running requests first, in the order of
admission. For the length of one `schedule()` it is what decodes plus the chunk that planner/pace.py allows; where
nobody decodes, vLLM's own. A step's time is that between two outputs, which is what a client waits for, also where
steps are scheduled ahead of their outputs.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from polder import metrics
from polder.engines.vllm.core.subsystem import Subsystem
from polder.planner.pace import StepPace

__all__ = ["Pacing"]

LEAST_TOKENS = 64
"""The smallest chunk: with fewer tokens, a prompt of some thousand tokens would take as long as an answer."""


class Pacing(Subsystem):
    """Bounds the steps of one scheduler."""

    def __init__(self, scheduler: Any, goal_s: float, counters: dict[str, float]) -> None:
        """Counts paced and late steps in `counters`."""
        self._scheduler = scheduler
        self._goal_s = goal_s
        self._pace = StepPace(goal_s, least_tokens=LEAST_TOKENS)
        self._steps: deque[tuple[Any, int, int]] = deque(maxlen=16)  # output, tokens that decode, tokens of prompts
        self._output_at: float | None = None
        self._counters = counters
        self._decoding: list[Any] = []  # in the schedule under way
        self._stock_tokens = 0
        counters |= metrics.zeros(metrics.PACING)

    def before_schedule(self) -> None:
        scheduler = self._scheduler
        self._stock_tokens = stock = scheduler.max_num_scheduled_tokens
        self._decoding = [request for request in scheduler.running if not request.is_prefill_chunk]
        if self._decoding:
            budget = sum(map(_tokens, self._decoding)) + self._pace.most_prompt_tokens
            scheduler.max_num_scheduled_tokens = min(stock, budget)

    def after_schedule(self, output: Any) -> None:
        scheduler, stock = self._scheduler, self._stock_tokens
        bounded = scheduler.max_num_scheduled_tokens < stock
        scheduler.max_num_scheduled_tokens = stock
        tokens = output.num_scheduled_tokens
        decoded = sum(tokens.get(request.request_id, 0) for request in self._decoding)
        prompts = output.total_num_scheduled_tokens - decoded
        if bounded and prompts:
            self._counters["paced_steps_total"] += 1
        self._steps.append((output, decoded, prompts))
        self._decoding = []

    def after_update(self, output: Any, outputs: Any) -> None:
        self._observe(output, time.perf_counter())

    def _observe(self, output: Any, now: float) -> None:
        before, self._output_at = self._output_at, now
        while self._steps:
            scheduled, decoded, prompts = self._steps.popleft()
            if scheduled is output:
                # Only between two outputs of a request was somebody waiting: before a first one the engine may have been idle.
                if decoded and before is not None:
                    self._pace.observe(prompts, now - before)
                    self._counters["late_steps_total"] += now - before > self._goal_s
                return


def _tokens(request: Any) -> int:
    """That a decoding request wants of the next step, drafts included."""
    wanted: int = max(1, request.num_tokens_with_spec + request.num_output_placeholders - request.num_computed_tokens)
    return wanted
