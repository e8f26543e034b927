"""What a run of `polder bench turns` consists of: arms, bytes, links, stages."""

from __future__ import annotations

import json
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from polder.bench.harness.engines import EnginePlan, TierPlan
from polder.errors import ConfigError

__all__ = [
    "ARMS",
    "EQUALITY_BYTES",
    "FULL_TURNS",
    "LINKS_BYTES_PER_S",
    "LOAD_BYTES",
    "QUICK_TURNS",
    "RESTART_ARMS",
    "STAGES",
    "USERS",
    "Links",
    "TurnsBytes",
    "TurnsPlan",
    "compared",
    "engines_of",
    "links_text",
    "parse_names",
]

Links = Literal["emulated", "none"]
ARMS: tuple[str, ...] = ("stock", "native", "polder-host", "polder-peer", "polder")
STAGES: tuple[str, ...] = ("agents", "chat", "noreuse", "lender", "restart", "equality")

RESTART_ARMS: tuple[str, ...] = ("stock", "native-fs", "polder-disk")
"""Of the restart stage alone."""

_ARMS_OF: dict[str, tuple[str, ...]] = {
    "agents": ARMS,
    "chat": ARMS,
    "noreuse": ("stock", "polder"),
    "lender": ("stock", "polder"),
    "restart": RESTART_ARMS,
    "equality": tuple(arm for arm in ARMS if arm != "stock"),
}
"""Of each stage; equality compares them with stock, which it always asks."""
_PAIRED = ("noreuse", "lender")
"""Stages that compare their arms with each other, and need all."""

USERS = 16
LINKS_BYTES_PER_S = {"peer": 3.2e9, "host": 400e6}
"""8 to 1, as NVLink is to PCIe, and slow enough that a tier's speed can be seen beside this machine's prefill."""


@dataclass(frozen=True, kw_only=True)
class TurnsBytes:
    """Sizes of pools and tiers in bytes."""

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


LOAD_BYTES = TurnsBytes(pool_a=128 << 20, pool_b=128 << 20, lend_b=96 << 20, host=256 << 20)
"""In tokens of A: a starved pool of 16,384, 12,288 on loan from B, 32,768 in the host tier."""
EQUALITY_BYTES = TurnsBytes(pool_a=48 << 20, pool_b=192 << 20, lend_b=160 << 20, host=160 << 20)
"""In float32, in tokens of A: a pool of 3,072, under half of what comes back, and 10,240 in each tier: each alone holds it."""


@dataclass(frozen=True, kw_only=True)
class TurnsPlan:
    """Sizes of the stages. An order names the arms of the runs in time."""

    name: str
    sessions: int
    """Sessions of tiny-agent-v1, 16 requests each."""
    stages: tuple[str, ...]
    agents_order: tuple[str, ...]
    chat_order: tuple[str, ...]
    lender_order: tuple[str, ...]
    restart_order: tuple[str, ...]
    """Of the arms with a disk behind their pool, and stock."""
    equality_arms: tuple[str, ...]
    noreuse_uncounted_rounds: int
    noreuse_rounds: int
    """Times that every block of unique prompts is played on both arms, at each number of requests at a time."""
    links: Links = "emulated"
    seed: int = 0
    """Of the prompts of the equality stage; traces are fixed."""

    def only(self, *, stages: Sequence[str] = (), arms: Sequence[str] = ()) -> TurnsPlan:
        """The same with these stages and arms alone; none named: all of the plan's.

        A stage of the plan stays only with some of its arms, noreuse and lender with both: they compare stock with polder. Equality
        always asks stock too. Raises ConfigError when a stage that is named cannot stay.
        """
        plan = replace(self, stages=tuple(s for s in STAGES if s in stages)) if stages else self
        if not arms:
            return plan

        def kept(order: tuple[str, ...]) -> tuple[str, ...]:
            # An arm that the plan leaves out and the user names is run once, after the others.
            return tuple(a for a in order if a in arms) + tuple(a for a in ARMS if a in arms and a not in order)

        lacking = {stage: text for stage in plan.stages if (text := _lacking(stage, arms))}
        if stages and lacking:
            raise ConfigError("; ".join(lacking.values()))
        return replace(
            plan,
            stages=tuple(stage for stage in plan.stages if stage not in lacking),
            agents_order=kept(plan.agents_order),
            chat_order=kept(plan.chat_order),
            restart_order=tuple(arm for arm in plan.restart_order if arm in arms),
            equality_arms=kept(plan.equality_arms),
        )


_THERE_AND_BACK = (*ARMS, *reversed(ARMS))
FULL_TURNS = TurnsPlan(
    name="full",
    sessions=32,
    stages=STAGES,
    agents_order=_THERE_AND_BACK,
    chat_order=("stock", "native", "polder", "polder", "native", "stock"),
    lender_order=("stock", "polder", "polder", "stock"),
    restart_order=(*RESTART_ARMS, *reversed(RESTART_ARMS)),
    equality_arms=ARMS,
    noreuse_uncounted_rounds=1,
    noreuse_rounds=8,
)
QUICK_TURNS = TurnsPlan(
    name="quick",
    sessions=16,
    stages=("agents", "noreuse", "restart", "equality"),
    agents_order=("stock", "polder", "native", "native", "polder"),
    chat_order=("stock", "native", "polder"),
    lender_order=("stock", "polder"),
    restart_order=RESTART_ARMS,
    equality_arms=("stock", "native", "polder"),
    noreuse_uncounted_rounds=0,
    noreuse_rounds=2,
)


_BASELINES = {
    "native": ("stock",),
    "polder-host": ("stock", "native"),
    "polder-peer": ("stock", "native"),
    "polder": ("stock", "native", "polder-host", "polder-peer"),
    "native-fs": ("stock",),
    "polder-disk": ("stock", "native-fs"),
}


def compared(names: Container[str], suffix: str) -> list[tuple[str, str]]:
    """(arm, baseline) of the pairs that are both among `names`, which end in `suffix`."""
    pairs = [(arm + suffix, baseline + suffix) for arm, of_arm in _BASELINES.items() for baseline in of_arm]
    return [(arm, baseline) for arm, baseline in pairs if arm in names and baseline in names]


def engines_of(arm: str, engines: Sequence[EnginePlan], sizes: TurnsBytes, links: Links) -> list[EnginePlan]:
    """Engines A and B as `arm` serves them. Pools are the same in all arms; what is added differs."""
    a, b = engines
    if arm == "stock":
        return [a, b]
    if arm == "native":
        return [replace(a, extra_args=("--kv-transfer-config", _native_config(sizes, links))), b]
    host = sizes.host if arm in ("polder-host", "polder") else 0
    lend = sizes.lend_b if arm in ("polder-peer", "polder") else 0
    stores: tuple[Literal["peer", "host"], ...] = (*(("peer",) if lend else ()), *(("host",) if host else ()))
    emulation = {"POLDER_LINKS": links_text()} if links == "emulated" else {}
    return [
        replace(a, sizing="fixed", tiers=TierPlan(store_to=stores, host_bytes=host), extra_env=emulation),
        replace(b, sizing="fixed", tiers=TierPlan(lend_bytes=lend)),
    ]


def links_text() -> str:
    """The emulated links as POLDER_LINKS has them."""
    return f"peer={LINKS_BYTES_PER_S['peer'] / 1e9:g}GB/s,host={LINKS_BYTES_PER_S['host'] / 1e6:g}MB/s"


def parse_names(text: str, known: Sequence[str], *, what: str) -> list[str]:
    """ "a,b" -> [a, b]; empty text: none. Raises ConfigError on a name that is not known."""
    names = [name for name in (word.strip() for word in text.split(",")) if name]
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {what} {name!r}; known are {', '.join(known)}")
    return names


def _lacking(stage: str, arms: Sequence[str]) -> str:
    """Why these arms give the stage nothing to run; empty when they do."""
    of_stage = _ARMS_OF[stage]
    least, words = (len(of_stage), "all") if stage in _PAIRED else (1, "some")
    if len(set(of_stage) & set(arms)) >= least:
        return ""
    return f"stage {stage} has nothing to run of {', '.join(arms)}: name {words} of {', '.join(of_stage)}"


def _native_config(sizes: TurnsBytes, links: Links) -> str:
    extra: dict[str, object] = {
        "spec_name": "NativeOffloadingSpec",
        "spec_module_path": "polder.bench.native.offload",
        "cpu_bytes_to_use": sizes.native,
        "offload_prompt_only": False,
    }
    if links == "emulated":
        extra["link_bytes_per_s"] = LINKS_BYTES_PER_S["host"]
    return json.dumps(
        {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": extra,
        }
    )
