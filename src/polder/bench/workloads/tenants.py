"""Models and loads of `polder bench tenants`: conversations whose contexts grow, of one model after the other, or of
two.

Temporal sharing: the trace tenants-v1 says whose turn a slot is and how busy it is; conversations begin in it at the
trace's times, and their turns follow at times of their own, whatever the server does (open loop). A rate multiplies the
conversations that begin, so contexts that are in use at once grow with it, as they do for a service with more users.
Spatial sharing: users of two models in a closed loop, without pauses.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import numpy as np

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import ClosedLoop, OpenLoop, Turn, greedy
from polder.bench.harness.runs import play_on
from polder.bench.workloads.models import ModelRecipe
from polder.bench.workloads.traces import TenantSlot, TenantStart, drawn_prompt, load

__all__ = [
    *("MAX_MODEL_LEN", "SLOT_S", "SPATIAL_ENGINES", "TENANTS", "TURNS", "VOCAB", "conversations_begun", "spatial"),
    *("temporal", "warm_up"),
]

VOCAB = 8192
"""Small, because embeddings and heads stay where they are in all arms and should be few beside the layers."""
_SHAPE: dict[str, Any] = {"layers": 12, "hidden": 768, "intermediate": 2016, "heads": 12, "vocab": VOCAB}
_WIDE: dict[str, Any] = {"hidden": 1024, "intermediate": 1504, "heads": 16}
TENANTS = {
    "T1": ModelRecipe(name="tenant-llama", family="llama", seed=11, **_SHAPE),
    "T2": ModelRecipe(name="tenant-qwen", family="qwen3", seed=12, **_SHAPE),
    "T3": ModelRecipe(name="tenant-wide", family="llama", seed=13, **(_SHAPE | _WIDE)),
}
"""Layers of 12, 12 and 14 MiB in bf16 that fill their pages to 99 %: 144, 144 and 168 MiB that move, and 24 to 32 MiB
beside them that do not. Three shapes, so that no layer of one fits another's place by chance. 12 KiB of KV per token
for each, so that the same bytes hold as many tokens of each."""
SLOT_S = 9.0
CONVERSATIONS_PER_SLOT = 1.0
"""At rate 1 and a load of 1."""
MOST_LOAD = 1.5
"""The Azure trace's busiest minutes have 3.5 times its mean: more than any arm serves in a slot."""
TURNS = 8
OUTPUT_SCALE = 2
"""The trace's replies are 8 to 48 tokens."""
GROWTH_TOKENS = (48, 112)
"""Added to a context by each turn: the last reply and what is asked next."""
PAUSE_S = (0.8, 1.6)
MAX_MODEL_LEN = 2304
"""The longest: 1,408 tokens in the first turn, 7 times 112 more, a reply of 96, in whole blocks."""
SPATIAL_ENGINES = ("T1", "T2")
SPATIAL_CONVERSATIONS = 2
"""Of each user, one after the other."""


def temporal(*, slots: range, rate: float, seed: int) -> dict[str, OpenLoop]:
    """Each tenant's load while the slots pass, SLOT_S each."""
    turns: dict[str, list[Turn]] = {name: [] for name in TENANTS}
    wanted = 0.0
    for number, slot in enumerate(load(TenantSlot)[slots.start : slots.stop]):
        before, wanted = round(wanted), wanted + CONVERSATIONS_PER_SLOT * rate * min(slot.load, MOST_LOAD)
        for index, start in enumerate(conversations_begun(slot, round(wanted) - before)):
            key = f"{slot.slot}.{index}"
            begun_s = (number + start.at) * SLOT_S
            turns[slot.tenant] += _conversation(slot.tenant, key, start, begun_s, (seed, slot.slot, index))
    return {name: OpenLoop(turns=sorted(found, key=lambda turn: turn.at_s)) for name, found in turns.items()}


def conversations_begun(slot: TenantSlot, count: int) -> list[TenantStart]:
    """`count` of the slot's starts, as far as there are so many, evenly spaced."""
    picked = np.linspace(0, len(slot.starts), min(len(slot.starts), count), endpoint=False).astype(int)
    return [slot.starts[number] for number in picked]


def spatial(*, users: int, seed: int) -> dict[str, ClosedLoop]:
    """Two models that are always in use."""
    starts = [start for slot in load(TenantSlot) for start in slot.starts]

    def of_user(model: str, user: int) -> Iterator[Turn]:
        for number in range(SPATIAL_CONVERSATIONS):
            index = user * SPATIAL_CONVERSATIONS + number
            start = starts[17 * index % len(starts)]  # 16 to a slot: the next slot, and the next of its starts
            yield from _conversation(model, f"s{index}", start, 0.0, (seed, 1000 + index, _tenant(model)))

    return {
        model: ClosedLoop(users=[list(of_user(model, user)) for user in range(users)], stagger_s=0.2)
        for model in SPATIAL_ENGINES
    }


def warm_up(arm: Arm) -> None:
    """Long prompts one after the other, on one engine after the other: they touch all memory and run all code once."""
    for engine in (engine.name for engine in arm.engines):
        prompts = [drawn_prompt(1400, (0, 2000 + number, _tenant(engine)), VOCAB) for number in range(5)]
        load = ClosedLoop(users=[[greedy(engine, f"w{n}", prompt, 4) for n, prompt in enumerate(prompts)]])
        asyncio.run(play_on(arm, {engine: load}))


def _conversation(model: str, key: str, start: TenantStart, begun_s: float, entropy: tuple[int, ...]) -> Iterator[Turn]:
    """Its turns; each prompt begins with the whole of the one before."""
    rng = np.random.default_rng((*entropy, 1))
    lengths = [start.input_tokens, *rng.integers(*GROWTH_TOKENS, size=TURNS - 1, endpoint=True).tolist()]
    pauses_s = [0.0, *rng.uniform(*PAUSE_S, size=TURNS - 1).tolist()]
    context, output_tokens = drawn_prompt(sum(lengths), entropy, VOCAB), OUTPUT_SCALE * start.output_tokens
    for turn in range(TURNS):
        prompt, at_s = context[: sum(lengths[: turn + 1])], begun_s + sum(pauses_s[: turn + 1])
        yield greedy(model, f"{key}.{turn}", prompt, output_tokens, at_s=at_s)


def _tenant(model: str) -> int:
    return list(TENANTS).index(model)
