"""`polder bench tenants`: three models on one device, whose weights and KV share a budget.

They take turns, as the traces' models do, and two of them are in use at once. Compared are plain vLLM, where each model
has its weights and a third of the KV memory for good; Polder with elastic KV alone; and Polder with weights that make
room too. All arms have the same bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

from polder.bench.harness.arms import Arm, ArmSpec
from polder.bench.harness.control import WEIGHT_COUNTERS, moved, weight_counts
from polder.bench.harness.driver import Workload
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan, describe_engines, links_env, on_one_core
from polder.bench.harness.runs import Run, warm
from polder.bench.report import limits
from polder.bench.report.limits import Check, Figure, Limit
from polder.bench.report.metrics import Metrics
from polder.bench.report.page import Plot
from polder.bench.report.result import BenchResult
from polder.bench.report.summary import arm_metrics, exhausted_loads, weight_metrics
from polder.bench.report.tables import SHOWN, Table, arm_tables, metric_names
from polder.bench.stages import comeback, rounds, streaming
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads import tenants as load_of
from polder.bench.workloads.models import ModelRecipe, layer_bytes, weights_bytes
from polder.bench.workloads.tenants import TENANTS

__all__ = ["Leg", "TenantsPlan", "TenantsSuite"]

ARMS = ("stock", "stock-short", "kv-only", "polder")
KV_SHARE_BYTES = 48 << 20
"""KV memory of each model, in stock for good: 4,096 tokens, two units, two or three conversations of the workload."""
BUDGET_BYTES = sum(map(weights_bytes, TENANTS.values())) + len(TENANTS) * KV_SHARE_BYTES
"""Weights of all layers, three quarters, and KV memory: the same in all arms."""
BATCHED_TOKENS = 2048
"""The default of `vllm serve`."""
TBT_GOAL = "400ms"
"""Polder's arm bounds its chunks of prefill while others decode, by measured times."""
SHORT_BATCHED_TOKENS = 256
"""`stock-short` does the same by vLLM's own means: a limit for all steps, here about as many milliseconds."""
ARMS_UP = 2
"""Up at a time in the temporal and spatial stages: six engines are what a machine of 23 GB holds beside the rest."""
COMEBACK_ENGINE, COMEBACK_PROMPT = "T2", 128
"""The model that comes back, and the tokens of the prompt by which that is judged: in all plans."""
LINK_BYTES_PER_S = 1e9
"""Emulated link for weights: a copy of all layers then takes about as long as the prefill of that prompt, as it does on
a GPU for prompts of some thousand tokens, and it takes little of the cores' time."""
STREAMING_ERROR = f"polder-streaming:{COMEBACK_ENGINE}.worst_error"


class Leg(NamedTuple):
    """One use of an arm: all of its loads, while it is up."""

    arm: str
    rates: tuple[float, ...]
    """Rates of the temporal stage, in time."""


@dataclass(frozen=True, kw_only=True)
class TenantsPlan(Plan):
    choices: ClassVar[Mapping[str, StageArms]] = {
        "temporal": StageArms(known=ARMS, described_as="order"),
        "spatial": StageArms(known=ARMS),
        **{stage: StageArms() for stage in ("comeback", "streaming", "equality")},
    }
    slots: tuple[int, int] = (4, 9)
    """First and end, of tenants-v1: one slot of T1, two each of T2 and T3, SLOT_S each."""
    rates: tuple[float, ...]
    """Conversations begun, as multiples of what stock serves with ease."""
    spatial_users: int = 4
    """Users of each of the two models, in a closed loop."""
    comeback_prompts: tuple[int, ...]
    """Lengths in tokens of the prompts that a reclaimed model is woken by."""
    comeback_samples: int

    @property
    def legs(self) -> list[Leg]:
        """Rates rise on one leg and fall on the next, so that what drifts falls on all of them alike."""
        rates = self.rates if "temporal" in self.stages else ()
        return [Leg(arm, rates[:: -1 if n % 2 else 1]) for n, arm in enumerate(self.orders["temporal"])]


class TenantsSuite(Suite[TenantsPlan]):
    name = "tenants"
    full = TenantsPlan(
        name="full",
        stages=tuple(TenantsPlan.choices),
        orders=dict.fromkeys(("temporal", "spatial"), ("stock", "polder", "kv-only", "polder", "stock")),
        rates=(0.5, 1.0, 2.0, 4.0),
        comeback_prompts=(32, COMEBACK_PROMPT, 512),
        comeback_samples=7,
    )
    quick = TenantsPlan(
        name="quick",
        stages=("temporal", "comeback", "streaming", "equality"),
        orders=dict.fromkeys(("temporal", "spatial"), ("stock", "polder", "polder", "stock")),
        rates=(0.5, 4.0),
        comeback_prompts=(COMEBACK_PROMPT,),
        comeback_samples=4,
    )
    baselines: ClassVar = {arm: ARMS[:number] for number, arm in enumerate(ARMS)} | {"kv-only": ("stock",)}
    also_compared: ClassVar = (
        *(
            ("polder-resident", "stock-resident"),
            ("polder-streamed", "stock-resident"),
            ("polder-streamed", "stock-anew"),
        ),
        *(("polder-whole", "polder-streamed"), ("polder-whole-link", "polder-streamed-link")),
    )
    interval_engines = ("all",)

    def measure(self) -> None:
        if {"temporal", "spatial"} & set(self.plan.stages):
            self._under_load()
        if "comeback" in self.plan.stages:
            self._comeback()
        if "streaming" in self.plan.stages:
            with self.pool(self._one_arm, suffix="-streaming") as pool:
                arm = pool.get("polder-link")
                with self.stage("steps while layers are streamed") as stage:
                    found = asyncio.run(streaming.measure_streaming(arm, COMEBACK_ENGINE, stage=stage))
            self.arms["polder-streaming"] = {COMEBACK_ENGINE: found}
        if "equality" in self.plan.stages:
            with self.pool(self._exact_arm, suffix="-equality") as pool:
                self.equality(pool, ["polder"], rounds.sleeping(self.plan.seed), WEIGHT_COUNTERS, settle_s=1.0)

    def _under_load(self) -> None:
        with self.pool(self._arm, at_most=ARMS_UP, prepare=_warm) as pool:
            for number, leg in enumerate(self.plan.legs, start=1):
                for load, loads in self._loads(leg.rates):
                    arm = pool.get(leg.arm)
                    before = weight_counts(arm.broker)
                    title = f"leg {number} of {len(self.plan.legs)}: {leg.arm}, {load}"
                    run = self.play(arm, title, loads, kept_as=leg.arm, load=load)
                    run.weights = moved(before, weight_counts(arm.broker))
        for load in dict.fromkeys(run.load for run in self.runs):
            self._summarise(f"-{load}", [load])
        interim = BenchResult(bench=self.name, conditions={}, arms=self.arms, ratios={}, checks={})
        self._summarise("", exhausted_loads(interim, self._rates()))  # without a suffix: all runs at these rates

    def _summarise(self, suffix: str, loads: Sequence[str]) -> None:
        runs = {arm + suffix: [run for run in self.runs if run.arm == arm and run.load in loads] for arm in ARMS}
        self.summarise({name: of for name, of in runs.items() if of}, self._metrics, suffix)

    def _metrics(self, runs: Sequence[Run]) -> dict[str, Metrics]:
        pool_tokens = {engine.name: engine.blocks * BLOCK_TOKENS for engine in self._engines(TENANTS)}
        return {name: of | weight_metrics(runs, pool_tokens, name) for name, of in arm_metrics(runs).items()}

    def _loads(self, rates: tuple[float, ...]) -> Iterator[tuple[str, Mapping[str, Workload]]]:
        """Loads of one leg: name -> engines' workloads."""
        for rate in rates:
            yield f"x{rate:g}", load_of.temporal(slots=range(*self.plan.slots), rate=rate, seed=self.plan.seed)
        if "spatial" in self.plan.stages:
            yield "spatial", load_of.spatial(users=self.plan.spatial_users, seed=self.plan.seed)

    def _comeback(self) -> None:
        for name in comeback.ARMS:
            with (
                self.pool(self._one_arm, suffix="-comeback") as pool,
                self.stage(f"the first token after sleep: {name}") as stage,
            ):
                found = comeback.measure_comeback(
                    name,
                    lambda of=name: pool.get(of),  # type: ignore[misc]
                    prompts=self.plan.comeback_prompts,
                    anew_prompt=COMEBACK_PROMPT,
                    samples=self.plan.comeback_samples,
                    stage=stage,
                )
            self.arms |= {arm: {COMEBACK_ENGINE: metrics} for arm, metrics in found.items()}

    def suffixes(self) -> Iterable[str]:
        return "", "-spatial", *(f"-{rate}" for rate in self._rates())

    def _rates(self) -> list[str]:
        return [f"x{rate:g}" for rate in self.plan.rates]

    def _arm(self, name: str) -> ArmSpec:
        return _spec(name, self._engines(TENANTS))

    def _one_arm(self, name: str) -> ArmSpec:
        return _spec(name, self._engines({COMEBACK_ENGINE: TENANTS[COMEBACK_ENGINE]}))

    def _exact_arm(self, name: str) -> ArmSpec:
        exact = {engine: TENANTS[engine].in_float32() for engine in rounds.SLEEPING_ENGINES}
        return _spec(name, [replace(engine, max_model_len=1280) for engine in self._engines(exact)])

    def _engines(self, recipes: Mapping[str, ModelRecipe]) -> list[EnginePlan]:
        sizes = {
            "max_model_len": load_of.MAX_MODEL_LEN,
            "share_bytes": KV_SHARE_BYTES,
            "batched_tokens": BATCHED_TOKENS,
        }
        engines = on_one_core(recipes, self.workdir / "models", **sizes)
        return [replace(engine, weights_bytes=weights_bytes(engine.recipe)) for engine in engines]

    @classmethod
    def checks(cls, result: BenchResult) -> list[Check]:
        loads = _loads_of(result)
        exhausted = exhausted_loads(result, loads)

        def part(_: BenchResult) -> Figure | None:
            which = f"{', '.join(exhausted)} of {', '.join(loads)}"
            return Figure(len(exhausted) / len(loads), which) if loads else None

        sooner = f"polder-whole-link/polder-streamed-link:{COMEBACK_ENGINE}.ttft_{COMEBACK_PROMPT}_p50_ms"
        where = f"where stock's KV is exhausted: {', '.join(exhausted)}"
        over, woken = "polder/stock:all.", f"polder-streamed:{COMEBACK_ENGINE}."
        metrics = [f"{metric}_{q}_ms" for metric in ("ttft", "tbt") for q in ("p50", "p99")]
        below = {  # every rate by itself: no gain at one makes good a loss at another
            load.replace(".", "_"): limits.highest(f"polder-{load}/stock-{load}:all.{metric}" for metric in metrics)
            for load in loads
            if load not in exhausted
        }
        return [
            limits.check("stock_exhausts_its_kv_at_some_rates_not_at_all", Limit(part, ">", 0), Limit(part, "<", 1)),
            limits.at_least("temporal_throughput_at_least_1_40", f"{over}output_tokens_per_s", 1.40, where),
            limits.at_most("temporal_ttft_p99_at_most_0_25", f"{over}ttft_p99_ms", 0.25, where),
            limits.at_most("temporal_tbt_p99_at_most_0_55", f"{over}tbt_p99_ms", 0.55, where),
            *(limits.at_most(f"below_saturation_no_worse_by_2_percent_{load}", of, 1.02) for load, of in below.items()),
            limits.at_least("streamed_at_least_1_30_sooner_than_whole", sooner, 1.30),
            limits.check(
                "reclaimed_model_had_lost_all_its_layers",
                Limit(f"{woken}wakes", ">", 0),
                Limit(f"{woken}layers_loaded_a_wake", ">=", 1),
            ),
            limits.at_most("streaming_step_within_15_percent_of_the_formula", STREAMING_ERROR, 0.15),
            limits.none_different("tokens_equal", "polder-equality", "sleeps", "wakes"),
            limits.failed_requests(),
        ]

    @classmethod
    def tables(cls, result: BenchResult) -> Iterator[Table]:
        for load in (*_loads_of(result), "spatial"):
            title = "Two models at a time" if load == "spatial" else f"One model at a time, rate {load}"
            yield from arm_tables(result, title, {arm: f"{arm}-{load}" for arm in ARMS}, "all", SHOWN, f"stock-{load}")
        anew = (*comeback.RESIDENT.values(), *comeback.ARMS[1:], "stock-anew")
        for title, arms, engine in (
            ("The first token of a model that was asleep", anew, COMEBACK_ENGINE),
            ("A step, by layers given up", ["polder-streaming"], COMEBACK_ENGINE),
            ("The same tokens as stock (float32)", ["polder-equality"], "all"),
        ):
            yield from arm_tables(result, title, {arm: arm for arm in arms}, engine, metric_names(result, arms))

    @classmethod
    def plots(cls, result: BenchResult, runs: Sequence[Run]) -> Iterator[Plot]:
        from polder.bench.report import plots

        rates = {f"x{rate:g}": rate for rate in sorted(result.conditions["plan"]["rates"])}
        loads = _loads_of(result)
        if len(loads) > 1:
            exhausted = [rates[load] for load in exhausted_loads(result, loads)]
            yield plots.sweep(result, ARMS, {load: rates[load] for load in loads}, exhausted)

    def describe(self) -> dict[str, Any]:
        engines = self._engines(TENANTS)
        weights = sum(engine.weights_bytes for engine in engines)
        sizes = {"bytes": BUDGET_BYTES, "weights_bytes": weights, "kv_bytes": BUDGET_BYTES - weights}
        named = {"plan": self.plan, "load": load_of, "comeback": comeback, "rounds": rounds, "engine": COMEBACK_ENGINE}
        return {
            "plan": self.plan.describe(),
            "budget": {**sizes, "weights_part": round(weights / BUDGET_BYTES, 3)}
            | self.prose("budget", share=KV_SHARE_BYTES, short=SHORT_BATCHED_TOKENS, goal=TBT_GOAL, **sizes),
            "engines": describe_engines(engines) | {"layer_bytes": {e.name: layer_bytes(e.recipe) for e in engines}},
            "workload": self.prose("workload", link=LINK_BYTES_PER_S / 1e9, **named),
            "legs": [leg._asdict() for leg in self.plan.legs],
        }


def _loads_of(result: BenchResult) -> list[str]:
    """Loads of the temporal stage that stock and Polder ran under, rising."""
    loads = [f"x{rate:g}" for rate in sorted(result.conditions["plan"]["rates"])]
    return [load for load in loads if result.figure(f"polder-{load}/stock-{load}:all.ttft_p99_ms") is not None]


def _spec(name: str, engines: Sequence[EnginePlan]) -> ArmSpec:
    """Weights are resident in stock and in `kv-only`, elastic in all others. "-link": copies go over the emulated
    link."""
    if name in ("stock", "kv-only"):
        return ArmSpec("stock" if name == "stock" else "polder", engines)
    if name == "stock-short":
        return ArmSpec("stock", [replace(engine, batched_tokens=SHORT_BATCHED_TOKENS) for engine in engines])
    env = {"POLDER_TBT_GOAL": TBT_GOAL}
    if name != "polder":
        env = {"POLDER_WAKE": "whole" if "whole" in name else "streamed"}
        env |= links_env({"weights": LINK_BYTES_PER_S} if name.endswith("-link") else {})
    return ArmSpec("polder", [replace(engine, weights="elastic", extra_env=env) for engine in engines])


def _warm(arm: Arm) -> None:
    """Touches all memory and runs all code of all engines once, one engine after the other."""
    for engine in arm.engines:
        warm(arm, {engine.name: load_of.warm_up(engine.name, seed=0)})
