"""Do answers stay the same while a model's weights leave and come back?

Float32 models, greedy, the same prompts in five rounds, all at once. Stock answers undisturbed. Meanwhile Polder's engines are
told, in the middle of their answers, to fall asleep, which they do the moment they are idle, and pinned to other sizes, so that
the memory of the weights becomes KV. The next round's requests wake the sleeper: its layers come back while the other engine
answers and gives its memory up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import ClosedLoop, Tally, play
from polder.bench.harness.weights import COUNTERS, moved, weight_counts
from polder.bench.report.metrics import Metrics
from polder.bench.stages.equality import OUTPUT_TOKENS, Answers, Questions, compare, question_turn, questions
from polder.bench.workloads.models import RESERVED_IDS
from polder.bench.workloads.tenants_models import VOCAB
from polder.broker import client
from polder.broker.wire import Resize, Sleep

__all__ = ["EQUALITY_MAX_MODEL_LEN", "ROUNDS", "Act", "Answered", "Round", "answer", "compare_answers", "questions_of"]

EQUALITY_MAX_MODEL_LEN = 1280
LONGEST = 700
PROMPTS = 8
SETTLE_S = 1.0
"""Between rounds: an engine that was told to sleep does, once it is idle."""


@dataclass(frozen=True, kw_only=True)
class Act:
    """Send `message` to the broker once `at` of the round's output tokens have come."""

    at: float
    message: Resize | Sleep


@dataclass(frozen=True, kw_only=True)
class Round:
    engines: tuple[str, ...]
    """Asked in this round."""
    acts: tuple[Act, ...]


# In float32 a unit is 1,024 tokens: a share is 3 units, an engine's questions take about 5, and the weights of the other hold 12.
ROUNDS = (
    Round(
        engines=("T1", "T2"),
        acts=(
            Act(at=0.2, message=Resize(engine="T1", units=2)),
            Act(at=0.5, message=Resize(engine="T1", units=0)),
            Act(at=0.7, message=Sleep(engine="T2")),
        ),
    ),
    Round(
        engines=("T1",),
        acts=(
            Act(at=0.0, message=Resize(engine="T1", units=12)),
            Act(at=0.6, message=Resize(engine="T1", units=0)),
        ),
    ),
    Round(
        engines=("T1", "T2"),
        acts=(
            Act(at=0.3, message=Resize(engine="T2", units=2)),
            Act(at=0.5, message=Sleep(engine="T1")),
            Act(at=0.6, message=Resize(engine="T2", units=0)),
        ),
    ),
    Round(engines=("T1", "T2"), acts=(Act(at=0.4, message=Sleep(engine="T2")),)),
    Round(engines=("T2",), acts=()),
)


@dataclass(frozen=True, kw_only=True)
class Answered:
    """All rounds of one arm."""

    rounds: list[Answers]
    counts: Metrics
    """What happened to weights meanwhile, over all engines; nothing, in stock."""


def questions_of(engines: Sequence[str], seed: int) -> Questions:
    """As `questions`, of the tenants' vocabulary."""
    asked = {e: questions(model=e, count=PROMPTS, longest=LONGEST, seed=seed + n) for n, e in enumerate(engines)}
    return {
        engine: [(key, [RESERVED_IDS + token % (VOCAB - RESERVED_IDS) for token in prompt]) for key, prompt in prompts]
        for engine, prompts in asked.items()
    }


async def answer(arm: Arm, asked: Questions, rounds: Sequence[Round] = ROUNDS) -> Answered:
    """All rounds; the acts only where there is a broker."""
    before = await asyncio.to_thread(weight_counts, arm.broker)
    answers = []
    for one in rounds:
        answers.append(await _round(arm, {engine: asked[engine] for engine in one.engines}, one.acts))
        await asyncio.sleep(SETTLE_S)
    after = await asyncio.to_thread(weight_counts, arm.broker)
    await asyncio.to_thread(arm.check)
    gained = moved(before, after)
    counts: Metrics = {metric: float(sum(of[metric] for of in gained.values())) for metric in COUNTERS}
    return Answered(rounds=answers, counts=counts)


def compare_answers(stock: Answered, arm: Answered) -> Metrics:
    """As `compare`, and what happened to weights meanwhile."""
    return compare(stock.rounds, arm.rounds) | arm.counts


async def _round(arm: Arm, asked: Questions, acts: Sequence[Act]) -> Answers:
    workloads = {
        engine: (arm.endpoint, ClosedLoop(users=[[question_turn(engine, key, prompt)] for key, prompt in prompts]))
        for engine, prompts in asked.items()
    }
    tally = Tally()
    expected = sum(map(len, asked.values())) * OUTPUT_TOKENS
    acting = asyncio.create_task(_act(arm.broker, acts, tally, expected)) if arm.broker else None
    try:
        played = await play(workloads, tally)
    finally:
        if acting is not None:
            acting.cancel()  # ended long ago, unless requests failed
    if acting is not None:
        (outcome,) = await asyncio.gather(acting, return_exceptions=True)
        if isinstance(outcome, Exception):  # a cancellation is none
            raise outcome
    return {record.key: record.output_ids for records in played.records.values() for record in records}


async def _act(broker: Path, acts: Sequence[Act], tally: Tally, expected: int) -> None:
    for act in acts:
        while tally.output_tokens < act.at * expected:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(client.request, broker, act.message)
