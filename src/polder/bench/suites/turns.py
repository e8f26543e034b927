"""`polder bench turns`: agents that come back to their context, and the tiers behind an engine's pool.

Engine A serves the agents of tiny-agent-v1 from a pool that holds about half of what they come back to. Beside it
engine B, of another model, is idle between its bursts and has KV memory to lend. Compared are plain vLLM, vLLM's own
CPU offloading, and Polder with its host tier, its peer tier, and both. Pools are fixed in all arms: only what stands
behind A's pool differs. The restart stage has engine A alone, on both cores, over emulated disks that are equally fast
in all arms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from polder.bench.harness.arms import ArmGroup, ArmSpec
from polder.bench.harness.driver import Workload
from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan, a_core_each, engine_plans, links_env, on_one_core
from polder.bench.native import offloading_args
from polder.bench.report import limits
from polder.bench.report.limits import Check, Limit, check
from polder.bench.report.metrics import agent_metrics
from polder.bench.report.result import BenchResult
from polder.bench.stages import restart
from polder.bench.stages.equality import taking_back
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads import agents as loads
from polder.bench.workloads.agents import MAX_MODEL_LEN, RECIPES
from polder.bench.workloads.models import MODEL_A, ModelRecipe

__all__ = ["TurnsPlan", "TurnsSuite"]

ARMS = ("stock", "native", "polder-host", "polder-peer", "polder")
LINKS_BYTES_PER_S = {"peer": 3.2e9, "host": 400e6}
"""8 to 1, as NVLink is to PCIe, and slow enough that a tier's speed can be seen beside this machine's prefill."""
MIB = 1 << 20
BATCHED_TOKENS = 1024
EQUALITY_MAX_MODEL_LEN = {"A": 1280, "B": 1024}
NOREUSE = {"requests": 120, "scale": 2, "blocks": 8}
"""Prompts of 480 tokens on average on engine A: a block takes two or three seconds."""
NOREUSE_AT_A_TIME = (1, 4)
LENDER_SESSIONS = 48
"""More than B's trace lasts."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of pools and tiers."""

    pool_a: int
    pool_b: int
    lend_b: int
    """Most that B lends of its pool."""
    host: int
    """Host tier of A."""


LOAD_BYTES = Sizes(pool_a=128 * MIB, pool_b=128 * MIB, lend_b=96 * MIB, host=256 * MIB)
"""In tokens of A: a starved pool of 16,384, 12,288 on loan from B, 32,768 in the host tier."""
EQUALITY_BYTES = Sizes(pool_a=48 * MIB, pool_b=192 * MIB, lend_b=160 * MIB, host=160 * MIB)
"""In float32, in tokens of A: a pool of 3,072, under half of what comes back, and 10,240 in each tier: each alone holds
it."""


@dataclass(frozen=True, kw_only=True)
class TurnsPlan(Plan):
    choices: ClassVar[Mapping[str, StageArms]] = {
        # First, because it needs the two arms up together that the first runs of the agents need too.
        "noreuse": StageArms(known=("stock", "polder"), needs_all=("stock", "polder")),
        "agents": StageArms(known=ARMS),
        "chat": StageArms(known=ARMS),
        "lender": StageArms(known=("stock", "polder"), needs_all=("stock", "polder")),
        "restart": StageArms(known=restart.ARMS),
        "equality": StageArms(known=ARMS, always=("stock",)),
    }
    options: ClassVar = {"links": ("emulated", "none")}
    sessions: int
    """Sessions of tiny-agent-v1, 16 requests each."""
    noreuse_uncounted_rounds: int
    noreuse_rounds: int
    """Times that every block of unique prompts is played on both arms, at each number of requests at a time."""
    links: Literal["emulated", "none"] = "emulated"
    """Whether copies to and from a tier take as long as its link would; none: memcpy's speed."""

    @property
    def rates(self) -> dict[str, float]:
        """Bytes a second of the emulated links; empty where none is emulated."""
        return LINKS_BYTES_PER_S if self.links == "emulated" else {}


class TurnsSuite(Suite[TurnsPlan]):
    """Agents of many turns on a pool that is too small: plain vLLM, vLLM's CPU offloading, and Polder's tiers."""

    name = "turns"
    full = TurnsPlan(
        name="full",
        sessions=32,
        stages=tuple(TurnsPlan.choices),
        orders={
            "agents": (*ARMS, *reversed(ARMS)),
            "chat": ("stock", "native", "polder", "polder", "native", "stock"),
            "noreuse": ("stock", "polder"),
            "lender": ("stock", "polder", "polder", "stock"),
            "equality": ARMS,
            "restart": (*restart.ARMS, *reversed(restart.ARMS)),
        },
        noreuse_uncounted_rounds=1,
        noreuse_rounds=8,
    )
    quick = replace(
        full,
        name="quick",
        help="256 requests of the agents instead of 512, fewer arms and stages.",
        sessions=16,
        stages=("noreuse", "agents", "restart", "equality"),
        orders={
            "agents": ("stock", "polder", "native", "native", "polder"),
            **dict.fromkeys(("chat", "equality"), ("stock", "native", "polder")),
            **dict.fromkeys(("noreuse", "lender"), ("stock", "polder")),
            "restart": restart.ARMS,
        },
        noreuse_uncounted_rounds=0,
        noreuse_rounds=2,
    )
    baselines: ClassVar = {
        **dict.fromkeys(("native", "native-fs"), ("stock",)),
        **dict.fromkeys(("polder-host", "polder-peer"), ("stock", "native")),
        "polder": ARMS[:-1],
        "polder-disk": ("stock", "native-fs"),
    }

    # ------------------------------------------------------------------ stages

    def noreuse(self) -> None:
        plan = self.plan
        for count in NOREUSE_AT_A_TIME:
            blocks = loads.unique_prompts(at_a_time=count, **NOREUSE)
            rounds = {"rounds": plan.noreuse_rounds, "uncounted": plan.noreuse_uncounted_rounds}
            self.compare_tax(self._loaded, blocks, f"-noreuse-{count}", engine="A", **rounds)

    def agents(self) -> None:
        load = loads.agents(sessions=self.plan.sessions)
        self._in_turn("agents", load, "", loads.ideal_of(load, BLOCK_TOKENS))

    def chat(self) -> None:
        load = loads.chats()
        self._in_turn("chat", load, "-chat", loads.ideal_of(load, BLOCK_TOKENS))

    def lender(self) -> None:
        """B alone is measured: runs are as short as its trace, so there can be more."""
        pressing = loads.unmeasured(loads.agents(sessions=LENDER_SESSIONS))
        self._in_turn("lender", pressing, "-lender", None)

    def _in_turn(self, stage: str, load_a: Workload, suffix: str, ideal: float | None) -> None:
        """`ideal`: the hit ratio of A without a limit; None: A is not measured."""
        both, metrics = {"A": load_a, "B": loads.bursts(rounds=loads.BURST_ROUNDS)}, partial(agent_metrics, ideal=ideal)
        self.play_in_turn(self._loaded, self.plan.orders[stage], both, metrics, title=f"{stage}, run ", suffix=suffix)

    def restart(self) -> None:
        (engine,) = on_one_core(self._engines({"A": MODEL_A}, MAX_MODEL_LEN, LOAD_BYTES))
        parts = loads.parted(loads.agents(sessions=self.plan.sessions), restart.TURNS_BEFORE)
        order, rate = self.plan.orders["restart"], self.plan.rates.get("host")
        for name in order:
            with restart.empty_disks(name, self.workdir) as folder:
                for suffix, load in zip(restart.SUFFIXES, parts, strict=True):
                    with restart.served(name, self.pool, engine, folder, rate) as arm:
                        self.measure(arm, f"restart: {name}{suffix}", {"A": load}, kept_as=name + suffix)
        for suffix in restart.SUFFIXES:
            runs = {name + suffix: self.runs_of(name + suffix) for name in order}
            self.summarise(runs, restart.restart_metrics)

    def equality(self) -> None:
        order = self.plan.orders["equality"]
        self.compare_answers(self._exact_arm, order, taking_back(self.plan.seed), {}, settle_s=0.5)

    # ------------------------------------------------------------------ arms

    @property
    def _loaded(self) -> ArmGroup:
        return ArmGroup(self.arm, at_most=2, prepare=loads.warm_up)

    def arm(self, name: str) -> ArmSpec:
        return self._spec(name, self._engines(RECIPES, MAX_MODEL_LEN, LOAD_BYTES), LOAD_BYTES)

    def _exact_arm(self, name: str) -> ArmSpec:
        exact = {engine: recipe.in_float32() for engine, recipe in RECIPES.items()}
        return self._spec(name, self._engines(exact, EQUALITY_MAX_MODEL_LEN, EQUALITY_BYTES), EQUALITY_BYTES)

    def _spec(self, name: str, engines: Sequence[EnginePlan], sizes: Sizes) -> ArmSpec:
        (a, b), rates = a_core_each(engines), self.plan.rates
        if name == "stock":
            return ArmSpec("stock", [a, b])
        if name == "native":
            link: dict[str, Any] = {"link_bytes_per_s": rates["host"]} if rates else {}
            args = offloading_args("NativeOffloadingSpec", sizes.host + sizes.lend_b, **link)
            return ArmSpec("stock", [replace(a, extra_args=args), b])
        tiers = {"polder-host": ["host"], "polder-peer": ["peer"], "polder": ["peer", "host"]}[name]
        a = replace(a, extra_env=links_env(rates)).with_keys(tiers=tiers)
        if "host" in tiers:
            a = a.with_keys(host=sizes.host)
        if "peer" in tiers:
            b = b.with_keys(lend=sizes.lend_b)
        return ArmSpec("polder", [engine.of_fixed_size() for engine in (a, b)])

    def _engines(
        self, recipes: Mapping[str, ModelRecipe], longest: Mapping[str, int], sizes: Sizes
    ) -> list[EnginePlan]:
        pools = {"A": sizes.pool_a, "B": sizes.pool_b}
        of = {"max_model_len": longest, "share_bytes": pools, "batched_tokens": BATCHED_TOKENS}
        return engine_plans(recipes, self.models, **of)

    # ------------------------------------------------------------------ limits and report

    @classmethod
    def checks(cls, result: BenchResult) -> list[Check]:
        restarted, after = "polder-disk-restart", "-restart:A.ttft_p99_ms"
        first_turns = Limit(f"{restarted}:A.first_turn_hit_ratio", ">=", 0.8, "the rest is new")

        def of_lender(metric: str) -> limits.Source:
            """From the lender stage where it was run, which measures B alone; else from the agents' runs."""
            return limits.first_of(f"polder-lender/stock-lender:B.{metric}", f"polder/stock:B.{metric}")

        def tax(count: int) -> Check:
            name = f"noreuse_tax_within_1_percent_{count}_at_a_time"
            return limits.within_one_percent(name, f"polder-noreuse-{count}", f"stock-noreuse-{count}", "A")

        return [
            check("a_ttft_p99_ratio_to_stock_at_most_0_31", "polder/stock:A.ttft_p99_ms <= 0.31"),
            check("a_ttft_p99_ratio_to_native_at_most_1_00", "polder/native:A.ttft_p99_ms <= 1.00"),
            check("b_ttft_p99_ratio_at_most_1_05", Limit(of_lender("ttft_p99_ms"), "<=", 1.05)),
            check("b_tbt_p99_ratio_at_most_1_05", Limit(of_lender("tbt_p99_ms"), "<=", 1.05)),
            check("a_ttft_p99_after_a_restart_ratio_to_stock_at_most_0_31", f"{restarted}/stock{after} <= 0.31"),
            check("a_ttft_p99_after_a_restart_ratio_to_native_at_most_1_00", f"{restarted}/native-fs{after} <= 1.00"),
            check("first_turns_after_a_restart_hit", first_turns),
            *(tax(count) for count in NOREUSE_AT_A_TIME),
            # Equal answers say nothing of a tier that served none of them.
            *(
                limits.none_different(f"tokens_equal_{arm.replace('-', '_')}", f"{arm}-equality", "tier_hit_tokens")
                for arm in ARMS[1:]
            ),
            limits.failed_requests(),
        ]
