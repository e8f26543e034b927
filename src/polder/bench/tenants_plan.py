"""What a run of `polder bench tenants` consists of: arms, bytes, loads, stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from polder.bench.harness.engines import EnginePlan
from polder.bench.workloads.tenants_models import TENANTS, weights_bytes

__all__ = [
    "ARMS",
    "ARMS_UP",
    "BUDGET_BYTES",
    "COMEBACK_ENGINE",
    "COMEBACK_PROMPT",
    "EQUALITY_ENGINES",
    "FULL_TENANTS",
    "KV_SHARE_BYTES",
    "QUICK_TENANTS",
    "SHORT_BATCHED_TOKENS",
    "SLOT_S",
    "STAGES",
    "TBT_GOAL",
    "WEIGHTS_LINK_BYTES_PER_S",
    "Leg",
    "TenantsPlan",
    "engines_of",
]

ARMS: tuple[str, ...] = ("stock", "stock-short", "kv-only", "polder")
STAGES: tuple[str, ...] = ("temporal", "spatial", "comeback", "streaming", "equality")

KV_SHARE_BYTES = 48 << 20
"""Of each model, in stock for good: 4,096 tokens, two units, two or three conversations of the workload."""
BUDGET_BYTES = sum(map(weights_bytes, TENANTS.values())) + len(TENANTS) * KV_SHARE_BYTES
"""Weights of all layers, three quarters, and KV memory: the same in all arms."""
TBT_GOAL = "400ms"
"""Polder's arm: bounds its chunks of prefill while others decode, by measured times."""
SHORT_BATCHED_TOKENS = 256
"""The arm `stock-short`: the same by vLLM's own means, a limit for all steps, of about as many milliseconds on a core like this."""
ARMS_UP = 2
"""At a time, in the temporal and spatial stages: six engines are what a machine of 23 GB holds beside the rest."""
SLOT_S = 9.0
COMEBACK_ENGINE = "T2"
WEIGHTS_LINK_BYTES_PER_S = 1e9
"""Of the emulated link: a copy of all layers then takes about as long as the prefill of the prompt by which the comeback is judged,
as it does on a GPU for prompts of some thousand tokens, and it takes little of the cores' time."""
COMEBACK_PROMPT = 128
"""Tokens of the prompt by which the comeback is judged: in all plans."""
EQUALITY_ENGINES = ("T1", "T2")

_START_S = {1: 20, 2: 30, 3: 45}
"""Seconds that an arm of so many engines takes to start on two cores."""
_LEFT_OVER = {"stock": 1.0, "stock-short": 1.0, "kv-only": 0.8, "polder": 0.3}
"""Time that a run goes on after its last arrival, as part of its length, for each unit of the rate above 1."""
_WARM_S = 10
_PAUSE_S = 4
_SPATIAL_S = 80
_COMEBACK_SAMPLE_S = 3.5
_STREAMING_S = 90
_EQUALITY_ARM_S = 40


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One use of an arm: all of its loads, while it is up."""

    arm: str
    rates: tuple[float, ...]
    """Of the temporal stage, in time."""


@dataclass(frozen=True, kw_only=True)
class TenantsPlan:
    """Sizes of the stages. The order names the arms of the legs in time."""

    name: str
    slots: range
    """Of the trace tenants-v1, SLOT_S each: the length of a temporal run."""
    rates: tuple[float, ...]
    """Conversations begun, as multiples of what stock serves with ease."""
    order: tuple[str, ...]
    stages: tuple[str, ...]
    spatial_users: int
    """Of each of the two models, in a closed loop."""
    comeback_prompts: tuple[int, ...]
    """Lengths in tokens of the prompts that a reclaimed model is woken by."""
    comeback_samples: int
    seed: int = 0
    """Of all prompts; times and lengths of the first turns are the trace's."""

    def only(self, *, stages: Sequence[str] = (), arms: Sequence[str] = ()) -> TenantsPlan:
        """The same with these stages and arms alone; none named: all of the plan's.

        Comeback and equality compare arms of their own with stock, whichever are named.
        """
        kept = tuple(s for s in STAGES if s in stages) if stages else self.stages
        order = tuple(arm for arm in self.order if not arms or arm in arms)
        # An arm that the plan leaves out and the user names is run once, after the others.
        order += tuple(arm for arm in ARMS if arm in arms and arm not in order)
        return replace(self, stages=kept, order=order)

    @property
    def legs(self) -> list[Leg]:
        """Rates rise on one leg and fall on the next, so that what drifts falls on all of them alike."""
        rates = self.rates if "temporal" in self.stages else ()
        return [Leg(arm=arm, rates=rates[:: -1 if n % 2 else 1]) for n, arm in enumerate(self.order)]

    @property
    def expected_s(self) -> float:
        """Seconds that the run takes, about: a length to plan with, of two cores and nobody else on them."""
        total = 0.0
        if {"temporal", "spatial"} & set(self.stages):
            length_s = len(self.slots) * SLOT_S
            up: list[str] = []
            for leg in self.legs:
                total += _START_S[3] + _WARM_S if leg.arm not in up else 0
                up = [*(arm for arm in up if arm != leg.arm), leg.arm][-ARMS_UP:]
                total += sum(length_s * (1 + _LEFT_OVER[leg.arm] * max(0.0, rate - 1)) + _PAUSE_S for rate in leg.rates)
                total += _SPATIAL_S if "spatial" in self.stages else 0
        if "comeback" in self.stages:
            samples = self.comeback_samples * len(self.comeback_prompts)
            total += 5 * _START_S[1] + 9 * samples * _COMEBACK_SAMPLE_S
        if "streaming" in self.stages:
            total += _START_S[1] + _STREAMING_S
        if "equality" in self.stages:
            total += 2 * (_START_S[2] + _EQUALITY_ARM_S)
        return total


FULL_TENANTS = TenantsPlan(
    name="full",
    slots=range(4, 9),  # one slot of T1, two each of T2 and T3
    rates=(0.5, 1.0, 2.0, 4.0),
    order=("stock", "polder", "kv-only", "polder", "stock"),
    stages=STAGES,
    spatial_users=4,
    comeback_prompts=(32, COMEBACK_PROMPT, 512),
    comeback_samples=7,
)
QUICK_TENANTS = TenantsPlan(
    name="quick",
    slots=range(4, 9),  # one slot of T1, two each of T2 and T3
    rates=(0.5, 4.0),
    order=("stock", "polder", "polder", "stock"),
    stages=("temporal", "comeback", "streaming", "equality"),
    spatial_users=4,
    comeback_prompts=(COMEBACK_PROMPT,),
    comeback_samples=4,
)


def engines_of(arm: str, engines: Sequence[EnginePlan]) -> list[EnginePlan]:
    """The engines as `arm` serves them: those of stock and `kv-only` with resident weights, all others with elastic ones.

    A name that ends in "-link" means copies over the emulated link, not at memcpy's speed.
    """
    if arm in ("stock", "kv-only"):
        return list(engines)
    if arm == "stock-short":
        return [replace(engine, batched_tokens=SHORT_BATCHED_TOKENS) for engine in engines]
    if arm == "polder":
        return [replace(engine, weights="elastic", extra_env={"POLDER_TBT_GOAL": TBT_GOAL}) for engine in engines]
    wake = {"POLDER_WAKE": "whole" if "whole" in arm else "streamed"}
    link = {"POLDER_LINKS": f"weights={WEIGHTS_LINK_BYTES_PER_S / 1e9:g}GB/s"} if arm.endswith("-link") else {}
    return [replace(engine, weights="elastic", extra_env=wake | link) for engine in engines]
