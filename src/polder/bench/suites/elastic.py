"""`polder bench elastic`: two models under one KV budget, once in fixed halves, once elastic.

Engine A serves the agents of tiny-agent-v1 (closed loop, high reuse, wants memory). Engine B serves another model under
the bursts of tiny-burst-v1 (open loop, no reuse, idle in between). B's trace is played once and measured; if A has not
ended by then, B's trace goes on as load that is not measured, so both arms are measured on the same requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from polder.bench.harness.arms import Arm, ArmSpec
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan, a_core_each, describe_engines
from polder.bench.harness.pool import ArmPool
from polder.bench.harness.runs import Run, warm
from polder.bench.report import limits
from polder.bench.report.limits import Check, Limit
from polder.bench.report.page import Plot
from polder.bench.report.result import BenchResult
from polder.bench.report.summary import agent_metrics
from polder.bench.report.tables import SHOWN, Table, arm_tables, metric_names
from polder.bench.stages import rounds
from polder.bench.stages.equality import MOVE_COUNTERS
from polder.bench.stages.resize import resize_under_load
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads.agents import (
    BURST_ROUNDS,
    MAX_MODEL_LEN,
    RECIPES,
    USERS,
    agents,
    agents_ideal_hit_ratio,
    bursts,
    one_by_one,
    warm_up,
)
from polder.bench.workloads.models import MODEL_A, ModelRecipe
from polder.memory.page import PAGE_BYTES

__all__ = ["ElasticPlan", "ElasticSuite"]

BUDGET_BYTES = 320 << 20
"""Holds the hot set of A, and half of it does not: see data/words.toml."""
EQUALITY_MAX_MODEL_LEN = {"A": 2048, "B": 1024}
WARM_UP_TIME_SCALE = 0.2
TAX_BLOCKS = 17
"""14 requests each: a pair of blocks takes three or four seconds."""
ENGINES = {"A": "A: agents, closed loop", "B": "B: bursts, open loop", "all": "both"}


@dataclass(frozen=True, kw_only=True)
class ElasticPlan(Plan):
    choices: ClassVar[Mapping[str, StageArms]] = {name: StageArms() for name in ("main", "resize", "tax", "equality")}
    sessions: int
    """Sessions of tiny-agent-v1 that engine A is measured on, 16 requests each."""
    order: str = "ABBA"
    """The main runs in time: A is stock, B is Polder."""
    tax_rounds: int
    """Times that every block of engine B's trace is played on both arms in the tax stage; a pair is a block."""
    resize_stream_tokens: int = 500
    """Length of the decodes under which engine A is resized; about 20 ms a token."""

    def ordered(self, order: str) -> ElasticPlan:
        return replace(self, order=order)

    @property
    def runs(self) -> list[str]:
        return ["stock" if letter == "A" else "polder" for letter in self.order]


class ElasticSuite(Suite[ElasticPlan]):
    name = "elastic"
    full = ElasticPlan(
        name="full", sessions=32, stages=tuple(ElasticPlan.choices), orders={}, tax_rounds=8, resize_stream_tokens=2000
    )
    quick = ElasticPlan(name="quick", sessions=16, stages=tuple(ElasticPlan.choices), orders={}, tax_rounds=3)
    demo = ElasticPlan(
        name="demo", sessions=16, order="AB", stages=("main", "resize", "equality"), orders={}, tax_rounds=0
    )
    baselines: ClassVar = {"polder": ("stock",)}
    intervals_how = "95 %, bootstrap: requests resampled within each arm (main runs), pairs of runs resampled (tax)"

    # ------------------------------------------------------------------ stages

    def measure(self) -> None:
        """The stages in bf16 have the engines of both arms up from first to last: idle ones take no CPU."""
        if {"main", "resize", "tax"} & set(self.plan.stages):
            with self.pool(self._arm, at_most=2, prepare=_warm) as pool:
                if "main" in self.plan.stages:
                    self._main(pool)
                if "resize" in self.plan.stages:
                    arm = pool.get("polder")
                    with self.stage("resizing engine A under load") as stage:
                        tokens = self.plan.resize_stream_tokens
                        found = asyncio.run(resize_under_load(arm, stream_tokens=tokens, stage=stage))
                    self.arms["polder-resize"] = {"A": found}
                if "tax" in self.plan.stages:
                    blocks = one_by_one(model="B", blocks=TAX_BLOCKS)
                    self.tax(pool, blocks, "-alone", engine="B", rounds=self.plan.tax_rounds, extra=1)
        if "equality" in self.plan.stages:
            with self.pool(self._exact_arm, suffix="-equality") as pool:
                self.equality(pool, ["polder"], rounds.resizing(self.plan.seed), MOVE_COUNTERS, settle_s=0.0)

    def _main(self, pool: ArmPool) -> None:
        load_a = agents(model="A", users=USERS, sessions=self.plan.sessions)
        load_b = bursts(model="B", rounds=BURST_ROUNDS)
        for number, name in enumerate(self.plan.runs, start=1):
            title = f"run {number} of {len(self.plan.runs)}: {name}"
            self.play(pool.get(name), title, {"A": load_a, "B": load_b}, kept_as=name)
        ideal = agents_ideal_hit_ratio(sessions=self.plan.sessions, block_tokens=BLOCK_TOKENS)
        runs = {name: [run for run in self.runs if run.arm == name] for name in ("stock", "polder")}
        self.summarise(runs, lambda of: agent_metrics(of, ideal))

    def suffixes(self) -> Iterable[str]:
        return "", "-alone"

    # ------------------------------------------------------------------ arms

    def _arm(self, name: str) -> ArmSpec:
        return ArmSpec("polder" if name == "polder" else "stock", self._engines(RECIPES, MAX_MODEL_LEN))

    def _exact_arm(self, name: str) -> ArmSpec:
        exact = {engine: recipe.in_float32() for engine, recipe in RECIPES.items()}
        return ArmSpec("polder" if name == "polder" else "stock", self._engines(exact, EQUALITY_MAX_MODEL_LEN))

    def _engines(self, recipes: Mapping[str, ModelRecipe], max_model_len: Mapping[str, int]) -> list[EnginePlan]:
        halves = dict.fromkeys(recipes, BUDGET_BYTES // len(recipes))
        return a_core_each(recipes, self.workdir / "models", max_model_len=max_model_len, share_bytes=halves)

    # ------------------------------------------------------------------ limits and report

    @classmethod
    def checks(cls, result: BenchResult) -> list[Check]:
        gain = limits.difference("polder:A.hit_ratio", "stock:A.hit_ratio")
        return [
            limits.at_most("a_ttft_p99_ratio_at_most_0_31", "polder/stock:A.ttft_p99_ms", 0.31),
            limits.at_most("b_ttft_p99_ratio_at_most_1_10", "polder/stock:B.ttft_p99_ms", 1.10),
            limits.at_least("a_hit_ratio_gain_at_least_0_30", gain, 0.30),
            limits.check(
                "giveback_p99_under_200_ms",
                Limit("polder:B.givebacks", ">", 0),
                Limit("polder:B.giveback_p99_ms", "<", 200, "ms"),
            ),
            limits.none_different("tokens_equal", "polder-equality", *MOVE_COUNTERS),
            limits.within_one_percent("tax_within_1_percent", "polder-alone", "stock-alone", "B"),
            limits.failed_requests(),
        ]

    @classmethod
    def tables(cls, result: BenchResult) -> Iterator[Table]:
        both = {"stock": "stock", "polder": "polder"}
        for engine, title in ENGINES.items():
            yield from arm_tables(result, title, both, engine, SHOWN, "stock")
        alone = {"stock": "stock-alone", "polder": "polder-alone"}
        yield from arm_tables(result, "Engine B alone, nothing to win", alone, "B", SHOWN, "stock-alone")
        for title, arm, engine in (
            ("Resize of 100 pages under load", "polder-resize", "A"),
            ("Same tokens while memory moves", "polder-equality", "all"),
        ):
            yield from arm_tables(result, title, {"polder": arm}, engine, metric_names(result, [arm]))

    @classmethod
    def plots(cls, result: BenchResult, runs: Sequence[Run]) -> Iterator[Plot]:
        from polder.bench.report import plots

        if runs:
            yield plots.ttft_distribution(runs)
            yield from (plots.memory_over_time(run) for run in [run for run in runs if run.timeline.samples][:1])
            yield plots.hit_ratio_over_time(runs)

    def describe(self) -> dict[str, Any]:
        engines = self._engines(RECIPES, MAX_MODEL_LEN)
        return {
            "plan": self.plan.describe(),
            "budget": {
                "bytes": BUDGET_BYTES,
                **self.prose("budget", tokens=BUDGET_BYTES // MODEL_A.kv_bytes_per_token),
                "stock": {engine.name: {"blocks": engine.blocks, "bytes": engine.share_bytes} for engine in engines},
                "polder": {"bytes": BUDGET_BYTES, "pages": BUDGET_BYTES // PAGE_BYTES, "page_bytes": PAGE_BYTES},
            },
            "engines": describe_engines(engines),
            "workload": self.prose("workload", users=USERS, last=self.plan.sessions - 1),
            "order": self.plan.runs,
        }


def _warm(arm: Arm) -> None:
    warm(arm, warm_up(time_scale=WARM_UP_TIME_SCALE))
