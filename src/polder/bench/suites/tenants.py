"""`polder bench tenants`: three models on one device, whose weights and KV share a budget.

They take turns, as the traces' models do, and two of them are in use at once. Compared are plain vLLM, where each model
has its weights and a third of the KV memory for good; Polder with elastic KV alone; and Polder with weights that make
room too. All arms have the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

from polder.bench.harness.arms import ArmGroup, ArmSpec
from polder.bench.harness.driver import Workload
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan, engine_plans, links_env, on_one_core
from polder.bench.harness.runs import Run
from polder.bench.report import limits, plots
from polder.bench.report.html import Plot
from polder.bench.report.limits import Check, Figure, Limit, check
from polder.bench.report.metrics import WEIGHT_COUNTERS, Metrics, arm_metrics, weight_metrics
from polder.bench.report.result import Arms, BenchResult
from polder.bench.report.tables import Table, arm_tables
from polder.bench.stages import equality, weights
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads import tenants as load_of
from polder.bench.workloads.models import ModelRecipe, weights_bytes
from polder.bench.workloads.tenants import TENANTS

__all__ = ["TenantsPlan", "TenantsSuite"]

ARMS = ("stock", "stock-short", "kv-only", "polder")
KV_SHARE_BYTES = 48 << 20
"""KV memory of each model, in stock for good: 4,096 tokens, two units, two or three conversations of the workload."""
KV_BYTES = len(TENANTS) * KV_SHARE_BYTES
BUDGET_BYTES = sum(map(weights_bytes, TENANTS.values())) + KV_BYTES
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
CURVES = {
    "output tokens per s": "output_tokens_per_s",
    "TTFT p99, ms (log scale)": "ttft_p99_ms",
    "TBT p99, ms (log scale)": "tbt_p99_ms",
}
EXHAUSTED_PART = 0.05
"""A load exhausts stock's pools when its contexts do not fit them for more than this part of the time with work."""


@dataclass(frozen=True, kw_only=True)
class TenantsPlan(Plan):
    choices: ClassVar[Mapping[str, StageArms]] = {
        "temporal": StageArms(known=ARMS),
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
    def legs(self) -> list[tuple[str, tuple[float, ...]]]:
        """The uses of arms: (arm, its rates in time). They rise on one leg and fall on the next, so that what drifts falls
        on all of them alike."""
        rates = self.rates if "temporal" in self.stages else ()
        return [(arm, rates[:: -1 if n % 2 else 1]) for n, arm in enumerate(self.orders["temporal"])]


class TenantsSuite(Suite[TenantsPlan]):
    """Three models under one budget for weights and KV: fixed parts, elastic KV alone, and elastic weights too."""

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
        help="Two rates instead of four, stock and polder alone, no spatial stage.",
        stages=("temporal", "comeback", "streaming", "equality"),
        orders=dict.fromkeys(("temporal", "spatial"), ("stock", "polder", "polder", "stock")),
        rates=(0.5, 4.0),
        comeback_prompts=(COMEBACK_PROMPT,),
        comeback_samples=4,
    )
    baselines: ClassVar = {
        **{arm: ARMS[:number] for number, arm in enumerate(ARMS)},
        "kv-only": ("stock",),
        "polder-streamed": ("stock-resident", "stock-anew"),
        "polder-whole": ("polder-streamed",),
    }

    # ------------------------------------------------------------------ stages

    def temporal(self) -> None:
        """Each arm under all of its loads, those of the stage `spatial` too, while it is up."""
        legs = self.plan.legs
        for number, (name, rates) in enumerate(legs, start=1):
            for load, loads in self._loads(rates):
                arm = self.pool.get(ArmGroup(self.arm, at_most=ARMS_UP, prepare=load_of.warm_up), name)
                self.play(arm, f"leg {number} of {len(legs)}: {name}, {load}", loads, kept_as=name, load=load)
        for load in dict.fromkeys(run.load for run in self.runs):
            self._summarise(f"-{load}", [load])
        named = [f"x{rate:g}" for rate in self.plan.rates]
        self._summarise("", _exhausted(self.arms, named))  # without a suffix: all runs at these rates

    def spatial(self) -> None:
        if "temporal" not in self.plan.stages:
            self.temporal()

    def comeback(self) -> None:
        group, plan = ArmGroup(self._one_arm, "-comeback"), self.plan
        sizes = {"prompts": plan.comeback_prompts, "anew_prompt": COMEBACK_PROMPT, "samples": plan.comeback_samples}
        for name in weights.COMEBACK_ARMS:
            with self.stage(f"the first token after sleep: {name}") as update:
                start = partial(self.pool.get, group, name)
                found = weights.measure_comeback(name, start, update=update, **sizes)  # type: ignore[arg-type]
            self.arms |= {arm: {COMEBACK_ENGINE: metrics} for arm, metrics in found.items()}

    def streaming(self) -> None:
        arm = self.pool.get(ArmGroup(self._one_arm, "-streaming"), "polder-link")
        with self.stage("steps while layers are streamed") as update:
            found = weights.measure_streaming(arm, COMEBACK_ENGINE, update)
        self.arms["polder-streaming"] = {COMEBACK_ENGINE: found}

    def equality(self) -> None:
        rounds = equality.sleeping(self.plan.seed)
        self.compare_answers(self._exact_arm, ["polder"], rounds, WEIGHT_COUNTERS, settle_s=1.0)

    def _summarise(self, suffix: str, loads: Sequence[str]) -> None:
        runs = {arm + suffix: [run for run in self.runs_of(arm) if run.load in loads] for arm in ARMS}
        self.summarise({name: of for name, of in runs.items() if of}, self._metrics)

    def _metrics(self, runs: Sequence[Run]) -> dict[str, Metrics]:
        pool_tokens = {engine.name: engine.blocks * BLOCK_TOKENS for engine in self._engines(TENANTS)}
        return {name: of | weight_metrics(runs, pool_tokens, name) for name, of in arm_metrics(runs).items()}

    def _loads(self, rates: tuple[float, ...]) -> Iterator[tuple[str, Mapping[str, Workload]]]:
        """Loads of one leg: name -> engines' workloads."""
        for rate in rates:
            yield f"x{rate:g}", load_of.temporal(slots=range(*self.plan.slots), rate=rate, seed=self.plan.seed)
        if "spatial" in self.plan.stages:
            yield "spatial", load_of.spatial(users=self.plan.spatial_users, seed=self.plan.seed)

    # ------------------------------------------------------------------ arms

    def arm(self, name: str) -> ArmSpec:
        return _spec(name, self._engines(TENANTS))

    def _one_arm(self, name: str) -> ArmSpec:
        return _spec(name, self._engines({COMEBACK_ENGINE: TENANTS[COMEBACK_ENGINE]}))

    def _exact_arm(self, name: str) -> ArmSpec:
        exact = {engine: TENANTS[engine].in_float32() for engine in equality.SLEEPING_ENGINES}
        return _spec(name, [replace(engine, max_model_len=1280) for engine in self._engines(exact)])

    def _engines(self, recipes: Mapping[str, ModelRecipe]) -> list[EnginePlan]:
        sizes = {"max_model_len": load_of.MAX_MODEL_LEN, "share_bytes": KV_SHARE_BYTES}
        return on_one_core(engine_plans(recipes, self.models, batched_tokens=BATCHED_TOKENS, **sizes))

    # ------------------------------------------------------------------ limits and report

    @classmethod
    def checks(cls, result: BenchResult) -> list[Check]:
        loads = _loads_of(result)
        exhausted = _exhausted(result.arms, loads)

        def part(_: BenchResult) -> Figure | None:
            which = f"{', '.join(exhausted)} of {', '.join(loads)}"
            return Figure(len(exhausted) / len(loads), which) if loads else None

        sooner = f"polder-whole-link/polder-streamed-link:{COMEBACK_ENGINE}.ttft_{COMEBACK_PROMPT}_p50_ms"
        woken, streaming = f"polder-streamed:{COMEBACK_ENGINE}.", f"polder-streaming:{COMEBACK_ENGINE}"
        metrics = [f"{metric}_{q}_ms" for metric in ("ttft", "tbt") for q in ("p50", "p99")]
        below = []  # every rate by itself: no gain at one makes good a loss at another
        for load in (load for load in loads if load not in exhausted):
            worst = limits.highest(f"polder-{load}/stock-{load}:all.{metric}" for metric in metrics)
            name = f"below_saturation_no_worse_by_2_percent_{load.replace('.', '_')}"
            below.append(check(name, Limit(worst, "<=", 1.02)))
        return [
            check("stock_exhausts_its_kv_at_some_rates_not_at_all", Limit(part, ">", 0), Limit(part, "<", 1)),
            check("temporal_throughput_at_least_1_40", "polder/stock:all.output_tokens_per_s >= 1.40"),
            check("temporal_ttft_p99_at_most_0_25", "polder/stock:all.ttft_p99_ms <= 0.25"),
            check("temporal_tbt_p99_at_most_0_55", "polder/stock:all.tbt_p99_ms <= 0.55"),
            *below,
            check("streamed_at_least_1_30_sooner_than_whole", f"{sooner} >= 1.30"),
            check("reclaimed_model_had_lost_all_its_layers", f"{woken}wakes > 0", f"{woken}layers_loaded_a_wake >= 1"),
            check("streaming_step_within_15_percent_of_the_formula", f"{streaming}.worst_error <= 0.15"),
            limits.none_different("tokens_equal", "polder-equality", "sleeps", "wakes"),
            limits.failed_requests(),
        ]

    @classmethod
    def tables(cls, result: BenchResult) -> Iterator[Table]:
        for load in _loads_of(result):
            yield from arm_tables(result, f"One model at a time, rate {load}", f"-{load}:all", ARMS)
        yield from super().tables(result)

    @classmethod
    def plots(cls, result: BenchResult, runs: Sequence[Run]) -> Iterator[Plot]:
        loads = _loads_of(result)
        if len(loads) > 1:
            yield plots.curves(
                result,
                "One model at a time",
                "All models together. Shaded: rates at which the contexts asked for at once do not fit stock's pools.",
                {title: f"{{arm}}-{{point}}:all.{metric}" for title, metric in CURVES.items()},
                ARMS,
                {float(load[1:]): load for load in loads},
                xlabel="rate",
                shaded=[float(load[1:]) for load in _exhausted(result.arms, loads)],
            )


def _loads_of(result: BenchResult) -> list[str]:
    """Loads of the temporal stage that stock and Polder ran under, rising."""
    loads = [f"x{rate:g}" for rate in sorted(result.conditions["plan"]["rates"])]
    return [load for load in loads if result.figure(f"polder-{load}/stock-{load}:all.ttft_p99_ms") is not None]


def _exhausted(arms: Arms, loads: Sequence[str]) -> list[str]:
    """Those of `loads` ("x2", ...) at which stock had more contexts to serve than its pools hold, or had to preempt."""
    of = {load: arms.get(f"stock-{load}", {}).get("all", {}) for load in loads}
    limits_of = {"kv_exhausted_part": EXHAUSTED_PART, "preemptions": 0.0}
    return [load for load in loads if any(of[load].get(name, 0.0) > most for name, most in limits_of.items())]  # type: ignore[operator]


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
    return ArmSpec("polder", [replace(engine, extra_env=env).with_keys(weights="elastic") for engine in engines])
