"""`polder bench turns`: agents whose contexts outgrow their engine, with and without tiers behind its pool.

Engine A serves the agents of tiny-agent-v1 from a pool that holds about half of what they come back to. Beside it
engine B, of another model, is idle between its bursts and has KV memory to lend. Compared are plain vLLM, vLLM's own
CPU offloading, and Polder with its host tier, its peer tier, and both. Pools are fixed in all arms: only what stands
behind A's pool differs. The restart stage has engine A alone, on both cores, over emulated disks that are equally fast
in all arms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

from polder.bench.harness.arms import ArmSpec
from polder.bench.harness.driver import Workload
from polder.bench.harness.engines import (
    BLOCK_TOKENS,
    EnginePlan,
    TierPlan,
    a_core_each,
    describe_engines,
    links_env,
    on_one_core,
)
from polder.bench.harness.pool import ArmPool
from polder.bench.harness.runs import warm
from polder.bench.native.args import offloading_args
from polder.bench.report import limits
from polder.bench.report.limits import Check
from polder.bench.report.result import BenchResult
from polder.bench.report.summary import agent_metrics
from polder.bench.report.tables import SHOWN, Table, arm_tables, metric_names
from polder.bench.stages import restart, rounds
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads import agents as loads
from polder.bench.workloads.agents import BURST_ROUNDS, MAX_MODEL_LEN, RECIPES, USERS, bursts
from polder.bench.workloads.models import MODEL_A, ModelRecipe

__all__ = ["TurnsPlan", "TurnsSuite"]

ARMS = ("stock", "native", "polder-host", "polder-peer", "polder")
LINKS_BYTES_PER_S = {"peer": 3.2e9, "host": 400e6}
"""8 to 1, as NVLink is to PCIe, and slow enough that a tier's speed can be seen beside this machine's prefill."""
MIB = 1 << 20
BATCHED_TOKENS = 1024
WARM_UP_TIME_SCALE = 0.1
EQUALITY_MAX_MODEL_LEN = {"A": 1280, "B": 1024}
NOREUSE = {"requests": 120, "scale": 2, "blocks": 8}
"""Prompts of 480 tokens on average on engine A: a block takes two or three seconds."""
NOREUSE_AT_A_TIME = (1, 4)
GROUPS = (
    ("A: agents", "", "A"),
    ("B: bursts, beside the agents", "", "B"),
    ("A: chat", "-chat", "A"),
    ("B: bursts, measured alone", "-lender", "B"),
    ("A: agents over disks, alone", "-before", "A"),
    ("A: the same sessions after a restart", "-restart", "A"),
    ("A: nothing to reuse, one at a time", "-noreuse-1", "A"),
    ("A: nothing to reuse, four at a time", "-noreuse-4", "A"),
)
"""Title of a table, suffix of the arms' names, engine."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Bytes of pools and tiers."""

    pool_a: int
    pool_b: int
    lend_b: int
    """Most that B lends of its pool."""
    host: int
    """Host tier of A."""

    @property
    def native(self) -> int:
        """CPU tier of the native arm: the bytes of both tiers together."""
        return self.host + self.lend_b


LOAD_BYTES = Sizes(pool_a=128 * MIB, pool_b=128 * MIB, lend_b=96 * MIB, host=256 * MIB)
"""In tokens of A: a starved pool of 16,384, 12,288 on loan from B, 32,768 in the host tier."""
EQUALITY_BYTES = Sizes(pool_a=48 * MIB, pool_b=192 * MIB, lend_b=160 * MIB, host=160 * MIB)
"""In float32, in tokens of A: a pool of 3,072, under half of what comes back, and 10,240 in each tier: each alone holds
it."""


@dataclass(frozen=True, kw_only=True)
class TurnsPlan(Plan):
    choices: ClassVar[Mapping[str, StageArms]] = {
        "agents": StageArms(known=ARMS, described_as="agents_order"),
        "chat": StageArms(known=ARMS, described_as="chat_order"),
        "noreuse": StageArms(known=("stock", "polder"), needs_all=("stock", "polder")),
        "lender": StageArms(known=("stock", "polder"), needs_all=("stock", "polder"), described_as="lender_order"),
        "restart": StageArms(known=restart.ARMS, described_as="restart_order"),
        "equality": StageArms(known=ARMS, always=("stock",), described_as="equality_arms"),
    }
    sessions: int
    """Sessions of tiny-agent-v1, 16 requests each."""
    noreuse_uncounted_rounds: int
    noreuse_rounds: int
    """Times that every block of unique prompts is played on both arms, at each number of requests at a time."""
    links: Literal["emulated", "none"] = "emulated"


class TurnsSuite(Suite[TurnsPlan]):
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
        sessions=16,
        stages=("agents", "noreuse", "restart", "equality"),
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

    def measure(self) -> None:
        self.note(self._links())
        plan, warmed = self.plan, partial(warm, loads=loads.warm_up(time_scale=WARM_UP_TIME_SCALE))
        if {"agents", "chat", "lender", "noreuse"} & set(plan.stages):
            with self.pool(self._arm, at_most=2, prepare=warmed) as pool:
                # First, because it needs the two arms up together that the first runs of the agents need too.
                for count in NOREUSE_AT_A_TIME if "noreuse" in plan.stages else ():
                    blocks = loads.unique_prompts(model="A", at_a_time=count, **NOREUSE)
                    counted, extra = plan.noreuse_rounds, plan.noreuse_uncounted_rounds
                    self.tax(pool, blocks, f"-noreuse-{count}", engine="A", rounds=counted, extra=extra)
                if "agents" in plan.stages:
                    ideal = loads.agents_ideal_hit_ratio(sessions=plan.sessions, block_tokens=BLOCK_TOKENS)
                    self._load(pool, "agents", loads.agents(model="A", users=USERS, sessions=plan.sessions), "", ideal)
                if "chat" in plan.stages:
                    ideal = loads.chats_ideal_hit_ratio(block_tokens=BLOCK_TOKENS)
                    self._load(pool, "chat", loads.chats(model="A"), "-chat", ideal)
                if "lender" in plan.stages:  # B alone is measured: runs are as short as its trace, so there can be more
                    pressing = loads.unmeasured(loads.agents(model="A", users=USERS, sessions=48))
                    self._load(pool, "lender", pressing, "-lender", None)
        if "restart" in plan.stages:
            self._restart()
        if "equality" in plan.stages:
            with self.pool(self._exact_arm, suffix="-equality") as pool:
                self.equality(pool, plan.orders["equality"], rounds.taking_back(plan.seed), {}, settle_s=0.5)

    def _load(self, pool: ArmPool, stage: str, load_a: Workload, suffix: str, ideal: float | None) -> None:
        """Runs in order, then figures of all arms. `ideal`: the hit ratio of A without a limit; None: A is not
        measured."""
        order = self.plan.orders[stage]
        for number, name in enumerate(order, start=1):
            title = f"{stage}, run {number} of {len(order)}: {name}"
            both = {"A": load_a, "B": bursts(model="B", rounds=BURST_ROUNDS)}
            self.play(pool.get(name), title, both, kept_as=name + suffix)
        runs = {name + suffix: [r for r in self.runs if r.arm == name + suffix] for name in dict.fromkeys(order)}
        self.summarise(runs, lambda of: agent_metrics(of, ideal), suffix)

    def _restart(self) -> None:
        order, models, a = self.plan.orders["restart"], self.workdir / "models", {"A": MODEL_A}
        shape = {
            "max_model_len": MAX_MODEL_LEN["A"],
            "share_bytes": LOAD_BYTES.pool_a,
            "batched_tokens": BATCHED_TOKENS,
        }
        for name in order:
            self.runs += restart.run_restart(
                name,
                *on_one_core(a, models, **shape),
                sessions=self.plan.sessions,
                host_bytes_per_s=self._rates().get("host"),
                workdir=self.workdir,
                pool=lambda spec: self.pool(lambda _: spec, suffix="-restart"),
                stage=self.stage,
            )
        for suffix in restart.SUFFIXES:
            names = [arm + suffix for arm in dict.fromkeys(order)]
            runs = {name: [run for run in self.runs if run.arm == name] for name in names}
            self.summarise(runs, restart.restart_metrics, suffix)

    def suffixes(self) -> Iterable[str]:
        return dict.fromkeys(suffix for _, suffix, _ in GROUPS)

    def _arm(self, name: str) -> ArmSpec:
        return self._spec(name, self._two(RECIPES, MAX_MODEL_LEN, LOAD_BYTES), LOAD_BYTES)

    def _exact_arm(self, name: str) -> ArmSpec:
        exact = {engine: recipe.in_float32() for engine, recipe in RECIPES.items()}
        return self._spec(name, self._two(exact, EQUALITY_MAX_MODEL_LEN, EQUALITY_BYTES), EQUALITY_BYTES)

    def _spec(self, name: str, engines: Sequence[EnginePlan], sizes: Sizes) -> ArmSpec:
        a, b = engines
        if name == "stock":
            return ArmSpec("stock", engines)
        rates = self._rates()
        if name == "native":
            link: dict[str, object] = {"link_bytes_per_s": rates["host"]} if rates else {}
            args = offloading_args(spec="NativeOffloadingSpec", module="offload", cpu_bytes=sizes.native, options=link)
            return ArmSpec("stock", [replace(a, extra_args=args), b])
        host = sizes.host if name in ("polder-host", "polder") else 0
        lend = sizes.lend_b if name in ("polder-peer", "polder") else 0
        stores: tuple[Literal["peer", "host"], ...] = (*(("peer",) if lend else ()), *(("host",) if host else ()))
        a = replace(a, tiers=TierPlan(store_to=stores, host_bytes=host), extra_env=links_env(rates))
        b = replace(b, tiers=TierPlan(lend_bytes=lend))
        return ArmSpec("polder", [replace(engine, sizing="fixed") for engine in (a, b)])

    def _rates(self) -> dict[str, float]:
        """Bytes a second of the emulated links; empty where none is emulated."""
        return LINKS_BYTES_PER_S if self.plan.links == "emulated" else {}

    def _two(self, recipes: Mapping[str, ModelRecipe], longest: Mapping[str, int], sizes: Sizes) -> list[EnginePlan]:
        pools, models = {"A": sizes.pool_a, "B": sizes.pool_b}, self.workdir / "models"
        engines = a_core_each(recipes, models, max_model_len=longest, share_bytes=pools)
        return [replace(engine, batched_tokens=BATCHED_TOKENS) for engine in engines]

    @classmethod
    def checks(cls, result: BenchResult) -> list[Check]:
        restarted, after = "polder-disk-restart", "-restart:A.ttft_p99_ms"
        taxes = {n: (f"polder-noreuse-{n}", f"stock-noreuse-{n}", "A") for n in NOREUSE_AT_A_TIME}
        hits = "tier_hit_tokens"
        lent = {  # from the lender stage where it was run, which measures B alone; else from the agents' runs
            metric: limits.first_of(f"polder-lender/stock-lender:B.{metric}_p99_ms", f"polder/stock:B.{metric}_p99_ms")
            for metric in ("ttft", "tbt")
        }
        return [
            limits.at_most("a_ttft_p99_ratio_to_stock_at_most_0_31", "polder/stock:A.ttft_p99_ms", 0.31),
            limits.at_most("a_ttft_p99_ratio_to_native_at_most_1_00", "polder/native:A.ttft_p99_ms", 1.00),
            *(limits.at_most(f"b_{metric}_p99_ratio_at_most_1_05", of, 1.05) for metric, of in lent.items()),
            limits.at_most("a_ttft_p99_after_a_restart_ratio_to_stock_at_most_0_31", f"{restarted}/stock{after}", 0.31),
            limits.at_most(
                "a_ttft_p99_after_a_restart_ratio_to_native_at_most_1_00", f"{restarted}/native-fs{after}", 1.00
            ),
            limits.at_least(
                "first_turns_after_a_restart_hit", f"{restarted}:A.first_turn_hit_ratio", 0.8, "the rest is new"
            ),
            *(
                limits.within_one_percent(f"noreuse_tax_within_1_percent_{n}_at_a_time", *tax)
                for n, tax in taxes.items()
            ),
            # Equal answers say nothing of a tier that served none of them.
            *(
                limits.none_different(f"tokens_equal_{arm.replace('-', '_')}", f"{arm}-equality", hits)
                for arm in ARMS[1:]
            ),
            limits.failed_requests(),
        ]

    @classmethod
    def tables(cls, result: BenchResult) -> Iterator[Table]:
        for title, suffix, engine in GROUPS:
            arms = {arm: arm + suffix for arm in dict.fromkeys((*ARMS, *restart.ARMS))}
            yield from arm_tables(result, title, arms, engine, SHOWN, f"stock{suffix}")
        equal = {arm: f"{arm}-equality" for arm in ARMS}
        names = metric_names(result, equal.values())
        yield from arm_tables(result, "The same tokens as stock (float32)", equal, "all", names)

    def describe(self) -> dict[str, Any]:
        sizes = {**asdict(LOAD_BYTES), "native": LOAD_BYTES.native}
        tokens = {name: size // MODEL_A.kv_bytes_per_token for name, size in sizes.items() if name != "pool_b"}
        return {
            "plan": self.plan.describe(),
            "links": self._links(),
            "bytes": {
                "pools, all arms": {"A": LOAD_BYTES.pool_a, "B": LOAD_BYTES.pool_b},
                **self.prose("bytes", **sizes),
                "tokens of A": tokens,
                "equality, float32": asdict(EQUALITY_BYTES),
            },
            "engines": describe_engines(self._two(RECIPES, MAX_MODEL_LEN, LOAD_BYTES)),
            "workload": self.prose("workload", users=USERS, last=self.plan.sessions - 1),
            "restart": self.prose("restart", of=restart) | {"turns_before": restart.TURNS_BEFORE},
            "order": list(self.plan.orders["agents"]),
        }

    def _links(self) -> str:
        """One line that has to stand beside every figure of a run."""
        peer, host = LINKS_BYTES_PER_S["peer"] / 1e9, LINKS_BYTES_PER_S["host"] / 1e6
        return str(self.prose("links", peer=peer, host=host)[self.plan.links])
