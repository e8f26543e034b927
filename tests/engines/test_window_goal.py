"""An engine with a window keeps its goal or does not start: what the core makes of what its workers measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from polder.engines.vllm.window.agreement import WindowAgreement
from polder.engines.vllm.window.goal import keep_goal
from polder.errors import BudgetError
from polder.planner.window_steps import StepFigures
from polder.window.regions import WindowShape

AGREEMENT = WindowAgreement(
    shape=WindowShape(layers=8, window_layers=2, store_units=36),
    unit_blocks=2,
    block_tokens=16,
    unit_pages=16,
    regular_units=10,
    layers=tuple((f"model.layers.{n}.attn", n) for n in range(8)),
    block_bytes=1 << 15,
)
CEILING = 10
LONGEST = 1100
SIZES = {"layers": 8, "window_layers": 2, "block_bytes": 1 << 15, "block_tokens": 16}
FAST = StepFigures(**SIZES, step_s=0.01, token_s=1e-6, overhead_s=1e-4, link_bytes_per_s=1e9)
SLOW = StepFigures(**SIZES, step_s=0.011, token_s=1e-6, overhead_s=1e-4, link_bytes_per_s=5e8)


class Core:
    """One whose workers have measured."""

    def __init__(self, asked: int, original: int) -> None:
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(max_model_len=asked, original_max_model_len=original)
        )
        self.scheduler = SimpleNamespace(max_model_len=asked, kv_cache_manager=SimpleNamespace(max_model_len=asked))
        self.told: list[int] = []

    def collective_rpc(self, method: str, args: tuple[int, ...]) -> None:
        assert method == "update_max_model_len"
        self.told += args

    def keep(self, goal_s: float, ranks: list[StepFigures]) -> dict[str, float]:
        return keep_goal(self, AGREEMENT, goal_s, lambda *_: ranks)

    @property
    def lengths(self) -> set[Any]:
        scheduler = self.scheduler
        return {
            self.vllm_config.model_config.max_model_len,
            scheduler.max_model_len,
            scheduler.kv_cache_manager.max_model_len,
        }


def test_a_goal_that_is_kept_changes_nothing() -> None:
    core = Core(LONGEST, LONGEST)
    core.keep(1.0, [FAST])
    assert (core.lengths, core.told) == ({LONGEST}, [])


def test_auto_is_lowered_everywhere_to_what_the_slowest_rank_can_do() -> None:
    fast, both = Core(LONGEST, -1), Core(LONGEST, -1)
    fast.keep(0.016, [FAST])
    gauges = both.keep(0.016, [FAST, SLOW])
    (possible,), (less,) = fast.lengths, both.lengths
    assert LONGEST > possible > less > 16 * (CEILING - 2) * 2
    assert both.told == [less]
    assert gauges["window_link_bytes_per_second"] == SLOW.link_bytes_per_s
    assert gauges["window_step_seconds"] == SLOW.step_s


def test_a_length_that_was_asked_for_and_is_too_slow_ends_the_start_with_what_is_possible() -> None:
    auto = Core(LONGEST, -1)
    auto.keep(0.016, [FAST])
    (possible,) = auto.lengths
    core = Core(LONGEST, LONGEST)
    with pytest.raises(BudgetError, match=f"Possible are {possible} tokens: write --max-model-len {possible} or auto"):
        core.keep(0.016, [FAST])
    assert core.lengths == {LONGEST}
    given = Core(possible, possible)
    given.keep(0.016, [FAST])
    assert given.lengths == {possible}
