"""`polder bench context`: how long can a context be with the same KV bytes on the device, and what does a token of it
cost?

Stock holds what fits. With a window most layers of a long context lie in host memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

from polder.bench.harness.arms import ArmGroup, ArmSpec
from polder.bench.harness.engines import BLOCK_TOKENS, engine_plans, links_env, on_one_core
from polder.bench.harness.runs import Run
from polder.bench.report import limits, plots
from polder.bench.report.html import Plot
from polder.bench.report.limits import Check, Figure, Limit, check
from polder.bench.report.result import BenchResult
from polder.bench.report.tables import Table, figures, same
from polder.bench.stages.context import Contexts, Shape
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads.models import ModelRecipe
from polder.window.regions import WindowShape

__all__ = ["ContextPlan", "ContextSuite"]

ENGINE = "long"
LINK_BYTES_PER_S = 1e9
"""Emulated link, for what is compared with the plan: a copy engine's copies take nobody's computing time."""
MODEL = ModelRecipe(
    name="deep-llama", family="llama", layers=16, kv_heads=2, max_positions=16_384, seed=7
).in_float32()  # float32, so that tokens can be compared whatever the batch
LAYER_BLOCK_BYTES = BLOCK_TOKENS * MODEL.kv_bytes_per_token // MODEL.layers


class Window(NamedTuple):
    """What an arm does with long contexts."""

    layers: int = MODEL.layers
    """Layers whose KV is local; in stock all of them."""
    emulated_link: bool = False


ARMS = {
    "enough": Window(),  # stock with memory for all lengths, which says what the tokens are
    "stock": Window(),
    "window": Window(2),
    "window-1": Window(1),
    "window-3": Window(3),
    "window-4": Window(4),
    "window-link": Window(2, emulated_link=True),
    "window-4-link": Window(4, emulated_link=True),
}
SHOWN = {"TTFT, ms": "ttft", "TTFT planned, ms": "planned_ttft", "TBT p50, ms": "tbt", "TBT planned, ms": "planned_tbt"}


@dataclass(frozen=True, kw_only=True)
class ContextPlan(Plan):
    """The local KV bytes are the same in all arms but `enough`."""

    choices: ClassVar[Mapping[str, StageArms]] = {"lengths": StageArms(known=tuple(ARMS), always=("enough",))}
    stages: tuple[str, ...] = ("lengths",)
    local_bytes: int
    page_bytes: int = 64 << 10
    """Small, so that a small local memory has many units."""
    growth: float
    """Factor from one length to the next."""
    samples: int
    """Pairs of requests at the longest context that stock holds."""
    batched_tokens: int = 512

    @property
    def arms(self) -> tuple[str, ...]:
        return self.orders["lengths"]

    def shape(self, arm: str) -> Shape:
        """What the arm has room for; `enough` has room for the longest of all others."""
        window_layers = ARMS[arm].layers
        unit_blocks = max(1, self.page_bytes // LAYER_BLOCK_BYTES)
        units = self.local_bytes // (unit_blocks * MODEL.layers * LAYER_BLOCK_BYTES)
        # The store is for as many as all units but one can carry.
        store_units = (units - 1) * (MODEL.layers // window_layers)
        return Shape(
            window=WindowShape(layers=MODEL.layers, window_layers=window_layers, store_units=store_units),
            units=units,
            unit_blocks=unit_blocks,
            batched_tokens=self.batched_tokens,
            block_bytes=LAYER_BLOCK_BYTES,
        )

    def longest(self, arm: str) -> int:
        """Tokens of the longest context that an arm can hold, prompt and output."""
        if arm == "enough":
            return max(self.longest(other) for other in self.arms if other != "enough")
        return min(self.shape(arm).longest, MODEL.max_positions)

    def lengths(self, arm: str) -> list[int]:
        """Growing contexts, the arm's longest at the end; prompt and output together. `enough` is asked all of the
        others'."""
        if arm == "enough":
            return sorted({length for other in self.arms if other != "enough" for length in self.lengths(other)})
        found = [self.longest("stock") // 2]
        while found[-1] * self.growth < self.longest("enough"):
            found.append(int(found[-1] * self.growth))
        most = self.longest(arm)
        return sorted({*(length for length in found if length < most), most, min(most, self.longest("stock"))})


class ContextSuite(Suite[ContextPlan]):
    """How long a context can be with the same KV bytes on the device: stock, and windows of some layers."""

    name = "context"
    full = ContextPlan(name="full", local_bytes=24 << 20, orders={"lengths": tuple(ARMS)}, growth=1.6, samples=12)
    quick = ContextPlan(
        name="quick",
        help="Less local memory, fewer arms and lengths.",
        local_bytes=16 << 20,
        orders={"lengths": ("enough", "stock", "window", "window-4", "window-link")},
        growth=2.0,
        samples=8,
    )
    baselines: ClassVar = dict.fromkeys(tuple(ARMS)[2:], ("stock", "enough"))

    def lengths(self) -> None:
        plan, contexts, group = self.plan, Contexts(ENGINE, self.plan.seed), ArmGroup(self.arm, at_most=2)
        for name in plan.arms:
            arm, shape, lengths = self.pool.get(group, name), plan.shape(name), plan.lengths(name)
            with self.stage(f"growing contexts: {name}") as update:
                for number, length in enumerate(contexts.grow(name, arm, lengths, shape), start=1):
                    if ARMS[name].emulated_link:
                        contexts.plan(name, arm, length, shape, self.pool.get(group, "enough"))
                    update(number, len(lengths))
        if {"stock", "window"} <= set(plan.arms):
            both = {name: self.pool.get(group, name) for name in ("stock", "window")}
            with self.stage("the longest context that stock holds, in turn") as update:
                contexts.alternate(both, plan.longest("stock"), samples=plan.samples, update=update)
        self.arms |= {name: {"all": contexts.found[name]} for name in plan.arms}
        self.conditions["longest"] = {arm: plan.longest(arm) for arm in plan.arms}

    def arm(self, name: str) -> ArmSpec:
        plan, shape, window = self.plan, self.plan.shape(name), ARMS[name]
        sizes = {"max_model_len": plan.longest(name), "share_bytes": plan.local_bytes}
        plans = engine_plans({ENGINE: MODEL}, self.models, batched_tokens=plan.batched_tokens, **sizes)
        (engine,) = on_one_core(plans)
        if name == "enough":
            blocks = -(-plan.longest(name) // BLOCK_TOKENS) + 2
            engine = replace(engine, share_bytes=blocks * BLOCK_TOKENS * MODEL.kv_bytes_per_token)
        if not name.startswith("window"):
            return ArmSpec("stock", [engine])
        link = {}
        if window.emulated_link:  # a goal that is always kept makes the engine measure what the plan needs
            link = links_env({"window": LINK_BYTES_PER_S}) | {"POLDER_TBT_GOAL": "60s"}
        engine = replace(engine, memory={"page": plan.page_bytes}, extra_env=link)
        store_bytes = shape.window.store_units * (plan.local_bytes // shape.units)
        return ArmSpec("polder", [engine.with_keys(window=store_bytes, window_layers=window.layers)])

    # ------------------------------------------------------------------ limits and report

    @classmethod
    def checks(cls, result: BenchResult) -> list[Check]:
        ratio, most = "window/stock:all.context_tokens", 0.9 * MODEL.layers / ARMS["window"].layers
        nearest = Limit("window/stock:all.ttft_stocks_longest_ms", "<=", 1.10, "medians")

        def served(result: BenchResult) -> Figure:
            count = sum(result.figure(f"{arm}:all.refused_beyond") == 0 for arm in result.arms)
            return Figure(count, "arms that served")

        equal = Limit(limits.total("answers_different"), "==", 0), Limit(limits.total("answers_compared"), ">", 0)
        swift = Limit(ratio, ">=", 3.98, "SwiftCache's best over chunked prefill")
        return [
            check("context_at_least_3_98_times_stocks", swift),
            check("context_at_least_nine_tenths_of_layers_over_window", Limit(ratio, ">=", most)),
            check("first_token_at_stocks_longest_at_most_1_10", nearest),
            check("decode_within_20_percent_of_the_plan", Limit(_worst_plan, "<=", 0.20, "of the step")),
            check("tokens_equal", *equal),
            check("longer_contexts_are_refused", Limit(served, "==", 0)),
        ]

    @classmethod
    def tables(cls, result: BenchResult) -> Iterator[Table]:
        arms, lengths = same(result.arms), {f"{n:,} tokens": n for n in _plan_of(result).lengths("enough")}
        longest = {"longest context, tokens": "context_tokens"}
        yield from figures(result, "The same KV bytes on the device", longest, arms, lambda m, arm: f"{arm}:all.{m}")
        for title, metric in SHOWN.items():
            at = lambda n, arm, m=metric: f"{arm}:all.{m}_{n}_ms"  # noqa: E731
            yield from figures(result, f"{title}, by context", lengths, arms, at)

    @classmethod
    def plots(cls, result: BenchResult, runs: Sequence[Run]) -> Iterator[Plot]:
        shown = {
            f"{title} (log scales)": f"{{arm}}:all.{SHOWN[title]}_{{point}}_ms" for title in ("TTFT, ms", "TBT p50, ms")
        }
        points: dict[float, str] = {n: str(n) for n in _plan_of(result).lengths("enough")}
        title, label = "What a longer context costs", "context, tokens"
        yield plots.curves(result, title, "", shown, result.arms, points, xlabel=label, xscale="log")


def _plan_of(result: BenchResult) -> ContextPlan:
    """The plan that a result was made by: its lengths are not in the result by themselves."""
    plan = ContextSuite.full if result.conditions["plan"]["name"] == "full" else ContextSuite.quick
    return replace(plan, orders={"lengths": tuple(result.arms)})


def _worst_plan(result: BenchResult) -> Figure | None:
    """The error of a planned decode step as a part of the measured one, where there are copies to plan."""
    errors = []
    for arm in result.arms:
        for length in _plan_of(result).lengths("enough"):
            planned, measured, blocks = (
                result.figure(f"{arm}:all.{metric}")
                for metric in (f"planned_tbt_{length}_ms", f"tbt_{length}_ms", f"windowed_{length}_blocks")
            )
            if planned and measured and blocks:
                errors.append(Figure(abs(planned / measured - 1), f"worst error, {arm} at {length} tokens,"))
    return max(errors, default=None)
