"""`polder bench elastic`: two models under one KV budget, once in fixed halves, once elastic.

Engine A serves the agents of tiny-agent-v1 (closed loop, high reuse, wants memory). Engine B serves another model under
the bursts of tiny-burst-v1 (open loop, no reuse, idle in between). B's trace is played once and measured; if A has not
ended by then, B's trace goes on as load that is not measured, so both arms are measured on the same requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar

from polder.bench.harness.arms import ArmGroup, ArmSpec
from polder.bench.harness.driver import Workload
from polder.bench.harness.engines import BLOCK_TOKENS, a_core_each, engine_plans
from polder.bench.harness.runs import Run
from polder.bench.report import limits, plots
from polder.bench.report.html import Plot
from polder.bench.report.limits import Check, Limit, check
from polder.bench.report.metrics import agent_metrics
from polder.bench.report.result import BenchResult
from polder.bench.stages.equality import MOVE_COUNTERS, resizing
from polder.bench.stages.resize import resize_under_load
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads import agents as loads
from polder.bench.workloads.agents import MAX_MODEL_LEN, RECIPES
from polder.bench.workloads.models import ModelRecipe

__all__ = ["ElasticPlan", "ElasticSuite"]

BUDGET_BYTES = 320 << 20
"""Holds the hot set of A, and half of it does not: see data/words.toml."""
EQUALITY_MAX_MODEL_LEN = {"A": 2048, "B": 1024}
TAX_BLOCKS = 17
"""14 requests each: a pair of blocks takes three or four seconds."""


@dataclass(frozen=True, kw_only=True)
class ElasticPlan(Plan):
    choices: ClassVar[Mapping[str, StageArms]] = {name: StageArms() for name in ("main", "resize", "tax", "equality")}
    options: ClassVar = {"order": ("ABBA", "AB")}
    stages: tuple[str, ...] = tuple(choices)
    orders: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sessions: int = 16
    """Sessions of tiny-agent-v1 that engine A is measured on, 16 requests each."""
    order: str = "ABBA"
    """The main runs in time: A is stock, B is Polder."""
    tax_rounds: int
    """Times that every block of engine B's trace is played on both arms in the tax stage; a pair is a block."""
    resize_stream_tokens: int = 500
    """Length of the decodes under which engine A is resized; about 20 ms a token."""

    @property
    def runs(self) -> list[str]:
        return ["stock" if letter == "A" else "polder" for letter in self.order]


class ElasticSuite(Suite[ElasticPlan]):
    """Two models under one KV budget: fixed halves (stock vLLM) against memory that follows demand (Polder)."""

    name = "elastic"
    full = ElasticPlan(name="full", sessions=32, tax_rounds=8, resize_stream_tokens=2000)
    quick = ElasticPlan(name="quick", help="256 requests of the agents instead of 512.", tax_rounds=3)
    baselines: ClassVar = {"polder": ("stock",)}

    # ------------------------------------------------------------------ stages

    def main(self) -> None:
        load: dict[str, Workload] = {
            "A": loads.agents(sessions=self.plan.sessions),
            "B": loads.bursts(rounds=loads.BURST_ROUNDS),
        }
        metrics = partial(agent_metrics, ideal=loads.ideal_of(load["A"], BLOCK_TOKENS))
        self.play_in_turn(self._both, self.plan.runs, load, metrics, title="run ")

    def resize(self) -> None:
        arm, tokens = self.pool.get(self._both, "polder"), self.plan.resize_stream_tokens
        with self.stage("resizing engine A under load") as update:
            self.arms["polder-resize"] = {"A": resize_under_load(arm, stream_tokens=tokens, update=update)}

    def tax(self) -> None:
        blocks = loads.one_by_one(blocks=TAX_BLOCKS)
        self.compare_tax(self._both, blocks, "-alone", engine="B", rounds=self.plan.tax_rounds, uncounted=1)

    def equality(self) -> None:
        self.compare_answers(self._exact_arm, ["polder"], resizing(self.plan.seed), MOVE_COUNTERS, settle_s=0.0)

    # ------------------------------------------------------------------ arms

    @property
    def _both(self) -> ArmGroup:
        """Engines of both arms, up from first to last: idle ones take no CPU."""
        return ArmGroup(self.arm, at_most=2, prepare=loads.warm_up)

    def arm(self, name: str) -> ArmSpec:
        return self._spec(name, RECIPES, MAX_MODEL_LEN)

    def _exact_arm(self, name: str) -> ArmSpec:
        exact = {engine: recipe.in_float32() for engine, recipe in RECIPES.items()}
        return self._spec(name, exact, EQUALITY_MAX_MODEL_LEN)

    def _spec(self, name: str, recipes: Mapping[str, ModelRecipe], longest: Mapping[str, int]) -> ArmSpec:
        share = BUDGET_BYTES // len(recipes)
        engines = a_core_each(engine_plans(recipes, self.models, max_model_len=longest, share_bytes=share))
        return ArmSpec("polder" if name == "polder" else "stock", engines)

    # ------------------------------------------------------------------ limits and report

    @classmethod
    def checks(cls, result: BenchResult) -> list[Check]:
        gain = limits.combined(
            "A's hit ratio less stock's", lambda of: of[0] - of[1], "polder:A.hit_ratio", "stock:A.hit_ratio"
        )
        return [
            check("a_ttft_p99_ratio_at_most_0_31", "polder/stock:A.ttft_p99_ms <= 0.31"),
            check("b_ttft_p99_ratio_at_most_1_10", "polder/stock:B.ttft_p99_ms <= 1.10"),
            check("a_hit_ratio_gain_at_least_0_30", Limit(gain, ">=", 0.30)),
            check("giveback_p99_under_200_ms", "polder:B.givebacks > 0", "polder:B.giveback_p99_ms < 200"),
            limits.none_different("tokens_equal", "polder-equality", *MOVE_COUNTERS),
            limits.within_one_percent("tax_within_1_percent", "polder-alone", "stock-alone", "B"),
            limits.failed_requests(),
        ]

    @classmethod
    def plots(cls, result: BenchResult, runs: Sequence[Run]) -> Iterator[Plot]:
        if runs:
            yield plots.ttft_distribution(runs)
            yield from (plots.memory_over_time(run) for run in [run for run in runs if run.timeline.samples][:1])
            yield plots.hit_ratio_over_time(runs)
