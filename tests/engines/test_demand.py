"""When an engine core tells the broker what it needs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
from polder.broker.wire import Demand
from polder.engines.vllm.core.demand import DemandReports
from polder.planner.rates import PrefillRate


class Weights:
    """Of an engine that has requests, or has none."""

    def __init__(self) -> None:
        self.idle = False

    def demand(self, now: float) -> dict[str, Any]:
        return {"asleep": False, "spare_segments": 0, "idle_s": 1.0 if self.idle else 0.0}

    def turned(self, sent: Demand) -> bool:
        return (sent.idle_s > 0) != self.idle


def test_a_turn_between_idle_and_busy_is_told_at_once_and_once() -> None:
    """Another model may wait for its weights. All else in the report may be the same as before."""
    sent: list[Demand] = []
    weights: Any = Weights()
    reports = DemandReports(
        SimpleNamespace(running=[], waiting=[], max_num_running_reqs=4),
        SimpleNamespace(unit_blocks=4, busy_blocks=0, cached_blocks=0, held_units=2),  # type: ignore[arg-type]
        SimpleNamespace(ceiling_units=8),  # type: ignore[arg-type]
        block_tokens=16,
        groups=1,
        prefill=PrefillRate(),
        weights=weights,
        stats=dict,
        send=sent.append,
        counters={},
    )
    reports.report(100.0)
    reports.report(100.001)
    assert len(sent) == 1
    for turn in range(1, 4):
        weights.idle = not weights.idle
        reports.report(100.001 + turn / 1000)
        reports.report(100.0015 + turn / 1000)
        assert len(sent) == 1 + turn
        assert (sent[-1].idle_s > 0) == weights.idle
