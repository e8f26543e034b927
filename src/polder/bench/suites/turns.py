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
from typing import Any, ClassVar, Literal

from polder.bench.harness.arms import Arm, ArmSpec
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
from polder.bench.harness.runs import Run, warm
from polder.bench.harness.scrape import summed
from polder.bench.native.args import offloading_args
from polder.bench.report import limits
from polder.bench.report.limits import Check, Limit
from polder.bench.report.metrics import Metrics
from polder.bench.report.result import BenchResult
from polder.bench.report.summary import arm_metrics, tier_metrics
from polder.bench.report.tables import SHOWN, Table, arm_tables, metric_names
from polder.bench.stages import restart
from polder.bench.stages.equality import Round
from polder.bench.suites.base import Suite
from polder.bench.suites.plan import Plan, StageArms
from polder.bench.workloads import agents as loads
from polder.bench.workloads.agents import BURST_ROUNDS, MAX_MODEL_LEN, RECIPES, USERS, bursts
from polder.bench.workloads.models import MODEL_A, ModelRecipe
from polder.bench.workloads.prompts import questions

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
    title = "Many turns, one small pool"
    subtitle = "Plain vLLM, vLLM's CPU offloading, and Polder's tiers."
    full = TurnsPlan(
        name="full",
        sessions=32,
        stages=tuple(TurnsPlan.choices),
        orders={
            "agents": (*ARMS, *reversed(ARMS)),
            "chat": ("stock", "native", "polder", "polder", "native", "stock"),
            "noreuse": ("stock", "polder"),
            "lender": ("stock", "polder", "polder", "stock"),
            "restart": (*restart.ARMS, *reversed(restart.ARMS)),
            "equality": ARMS,
        },
        noreuse_uncounted_rounds=1,
        noreuse_rounds=8,
    )
    quick = TurnsPlan(
        name="quick",
        sessions=16,
        stages=("agents", "noreuse", "restart", "equality"),
        orders={
            "agents": ("stock", "polder", "native", "native", "polder"),
            "chat": ("stock", "native", "polder"),
            "noreuse": ("stock", "polder"),
            "lender": ("stock", "polder"),
            "restart": restart.ARMS,
            "equality": ("stock", "native", "polder"),
        },
        noreuse_uncounted_rounds=0,
        noreuse_rounds=2,
    )
    baselines: ClassVar = {
        "native": ("stock",),
        "polder-host": ("stock", "native"),
        "polder-peer": ("stock", "native"),
        "polder": ("stock", "native", "polder-host", "polder-peer"),
        "native-fs": ("stock",),
        "polder-disk": ("stock", "native-fs"),
    }
    intervals_how = f"{Suite.intervals_how}; in noreuse, pairs of blocks"
    tiles: ClassVar = {
        "polder/stock:A.ttft_p99_ms": "A: p99 TTFT, Polder's over stock's",
        "polder/native:A.ttft_p99_ms": "A: p99 TTFT, Polder's over native offloading's",
        "polder/stock:B.ttft_p99_ms": "B, the lender: p99 TTFT, Polder's over stock's",
    }

    # ------------------------------------------------------------------ stages

    def measure(self) -> None:
        self.note(self._links())
        plan = self.plan
        if {"agents", "chat", "lender", "noreuse"} & set(plan.stages):
            with self.pool(self._arm, at_most=2, prepare=_warm) as pool:
                # First, because it needs the two arms up together that the first runs of the agents need too.
                for count in NOREUSE_AT_A_TIME if "noreuse" in plan.stages else ():
                    blocks = loads.unique_prompts(model="A", at_a_time=count, **NOREUSE)
                    rounds, extra = plan.noreuse_rounds, plan.noreuse_uncounted_rounds
                    self.tax(pool, blocks, f"-noreuse-{count}", engine="A", rounds=rounds, extra=extra)
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
                self.equality(pool, plan.orders["equality"], _rounds(plan.seed), {}, settle_s=0.5)

    def _load(self, pool: ArmPool, stage: str, load_a: Workload, suffix: str, ideal: float | None) -> None:
        """Runs in order, then figures of all arms. `ideal`: the hit ratio of A without a limit; None: A is not
        measured."""
        order = self.plan.orders[stage]
        for number, name in enumerate(order, start=1):
            title = f"{stage}, run {number} of {len(order)}: {name}"
            both = {"A": load_a, "B": bursts(model="B", rounds=BURST_ROUNDS)}
            self.play(pool.get(name), title, both, kept_as=name + suffix)
        runs = {name + suffix: [r for r in self.runs if r.arm == name + suffix] for name in dict.fromkeys(order)}
        self.summarise(runs, lambda of: _metrics(of, ideal), suffix)

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

    # ------------------------------------------------------------------ arms

    def _arm(self, name: str) -> ArmSpec:
        return self._spec(name, self._engines(), LOAD_BYTES)

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

    def _engines(self) -> list[EnginePlan]:
        return self._two(RECIPES, MAX_MODEL_LEN, LOAD_BYTES)

    def _two(self, recipes: Mapping[str, ModelRecipe], longest: Mapping[str, int], sizes: Sizes) -> list[EnginePlan]:
        pools, models = {"A": sizes.pool_a, "B": sizes.pool_b}, self.workdir / "models"
        engines = a_core_each(recipes, models, max_model_len=longest, share_bytes=pools)
        return [replace(engine, batched_tokens=BATCHED_TOKENS) for engine in engines]

    # ------------------------------------------------------------------ limits and report

    @classmethod
    def checks(cls, result: BenchResult) -> list[Check]:
        restarted, after = "polder-disk-restart", "-restart:A.ttft_p99_ms"
        first_turns = Limit(
            figure=f"{restarted}:A.first_turn_hit_ratio", relation=">=", bound=0.8, why="the rest is new"
        )
        return [
            limits.at_most("a_ttft_p99_ratio_to_stock_at_most_0_31", "polder/stock:A.ttft_p99_ms", 0.31),
            limits.at_most("a_ttft_p99_ratio_to_native_at_most_1_00", "polder/native:A.ttft_p99_ms", 1.00),
            *(
                # From the lender stage where it was run, which measures B alone; else from the agents' runs.
                limits.at_most(
                    f"b_{metric}_p99_ratio_at_most_1_05",
                    limits.first_of(f"polder-lender/stock-lender:B.{metric}_p99_ms", f"polder/stock:B.{metric}_p99_ms"),
                    1.05,
                )
                for metric in ("ttft", "tbt")
            ),
            limits.at_most("a_ttft_p99_after_a_restart_ratio_to_stock_at_most_0_31", f"{restarted}/stock{after}", 0.31),
            limits.at_most(
                "a_ttft_p99_after_a_restart_ratio_to_native_at_most_1_00", f"{restarted}/native-fs{after}", 1.00
            ),
            Check("first_turns_after_a_restart_hit", (first_turns,)),
            *(
                limits.within_one_percent(
                    f"noreuse_tax_within_1_percent_{n}_at_a_time", f"polder-noreuse-{n}", f"stock-noreuse-{n}", "A"
                )
                for n in NOREUSE_AT_A_TIME
            ),
            # Equal answers say nothing of a tier that served none of them.
            *(
                limits.none_different(f"tokens_equal_{arm.replace('-', '_')}", f"{arm}-equality", "tier_hit_tokens")
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
        sizes, per_token = LOAD_BYTES, MODEL_A.kv_bytes_per_token
        return {
            "plan": self.plan.describe(),
            "links": self._links(),
            "bytes": {
                "pools, all arms": {"A": sizes.pool_a, "B": sizes.pool_b},
                "stock": "pools alone",
                "native": f"A: CPU tier of {sizes.native} B = host tier and loan together, vLLM's OffloadingConnector, LRU",
                "polder-host": f"A: host tier of {sizes.host} B",
                "polder-peer": f"A: at most {sizes.lend_b} B of B's own pool, on loan: no bytes beyond the stock arm's",
                "polder": f"A: host tier of {sizes.host} B and at most {sizes.lend_b} B on loan",
                "tokens of A": {
                    name: size // per_token
                    for name, size in {**asdict(sizes), "native": sizes.native}.items()
                    if name != "pool_b"
                },
                "equality, float32": asdict(EQUALITY_BYTES),
            },
            "engines": describe_engines(self._engines()),
            "workload": {
                "A": f"agents: tiny-agent-v1, closed loop, {USERS} users, sessions 0-{self.plan.sessions - 1}; "
                "first turns of the users' first sessions are not in TTFT. chat: tiny-chat-v1, open loop",
                "B": "tiny-burst-v1, open loop: its 238 requests once, measured; "
                "then again as load, not measured, until A is through",
                "warm-up": "each arm, once up, gets the last prompt of every user's first session on A and B's trace; not "
                "counted; all caches and tiers are emptied before each run",
                "noreuse": "engine A alone, unique prompts in blocks that alternate between stock and polder",
                "lender": "B under its trace while A, not measured, is under the agents' pressure",
                "equality": "float32; the same prompts in three rounds, all at once; B's load of the second takes its memory back",
            },
            "restart": restart.describe(self.plan.sessions),
            "order": list(self.plan.orders["agents"]),
        }

    def _links(self) -> str:
        """One line that has to stand beside every figure of a run."""
        if not (rates := self._rates()):
            return "links not emulated: peer and host are both this machine's memory, at the speed of memcpy"
        speeds = f"peer {rates['peer'] / 1e9:g} GB/s, host {rates['host'] / 1e6:g} MB/s"
        return (
            f"links emulated: {speeds}, each direction by itself; bytes are copied, then the copying thread sleeps until the link "
            "would have carried them; native's CPU tier is behind the host link"
        )


def _warm(arm: Arm) -> None:
    warm(arm, loads.warm_up(time_scale=WARM_UP_TIME_SCALE))


def _metrics(runs: Sequence[Run], ideal: float | None) -> dict[str, Metrics]:
    """Each engine's own counters are under "counters"."""
    found = arm_metrics(runs)
    for engine in RECIPES:
        found[engine]["counters"] = summed([run.samples.get(engine, {}) for run in runs])
    if ideal is None:
        return {"B": found["B"]}
    hit = found["A"]["hit_ratio"]
    assert isinstance(hit, float)
    found["A"] |= {"hit_ratio_of_ideal": hit / ideal, **tier_metrics(runs, hit)}
    return found


def _rounds(seed: int) -> list[Round]:
    """A's prompts are more than its pool holds, and the same in every round: what one round left behind comes back from
    a tier.

    B, which lends its idle memory in the first round, gets more prompts in the second than fit beside the loan.
    """
    of_a = questions(model="A", count=10, longest=1100, seed=seed)
    few, many = (questions(model="B", count=n, longest=900, seed=s) for n, s in ((2, seed), (24, seed + 1)))
    return [Round(asked={"A": of_a, "B": of_b}) for of_b in (few, many, few)]
