"""Do answers stay the same when their prefixes come from a tier?

Three rounds of the same prompts to engine A, all at once, greedy, on float32 models. They are more than A's pool holds, so what a
round left behind is evicted before it is asked for again, and comes back from a tier where there is one. In the second round
engine B, which lent its idle memory in the first, gets more prompts than fit beside the loan: what was lent is taken back while
A reads it. The answers of every arm are compared with stock's, token by token.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import ClosedLoop, play
from polder.bench.harness.scrape import gained
from polder.bench.report.metrics import Metrics
from polder.bench.stages.equality import Answers, Questions, compare, question_turn, questions

__all__ = ["EQUALITY_MAX_MODEL_LEN", "Answered", "answer", "compare_answers", "rounds_of_questions"]

EQUALITY_MAX_MODEL_LEN = {"A": 1280, "B": 1024}
LONGEST = {"A": 1100, "B": 900}
TIER_HITS = "vllm:external_prefix_cache_hits_total"
SETTLE_S = 0.5
"""Between rounds: stores of the last one end, engines report."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """All rounds of one arm."""

    rounds: list[Answers]
    cached_tokens: float
    """Of engine A's prompts, from its pool or a tier."""
    tier_hit_tokens: float
    """Of these, found behind its pool."""
    preemptions: float


def rounds_of_questions(seed: int) -> list[Questions]:
    """A's prompts are the same in every round; B has few, then many, then few."""
    of_a = questions(model="A", count=10, longest=LONGEST["A"], seed=seed)
    few = questions(model="B", count=2, longest=LONGEST["B"], seed=seed)
    many = questions(model="B", count=24, longest=LONGEST["B"], seed=seed + 1)
    return [{"A": of_a, "B": few}, {"A": of_a, "B": many}, {"A": of_a, "B": few}]


async def answer(arm: Arm, rounds: list[Questions]) -> Answered:
    """Asks the arm all rounds, from empty caches."""
    await asyncio.to_thread(arm.reset_prefix_caches)
    before, preempted = await asyncio.to_thread(arm.samples), await asyncio.to_thread(arm.preemptions)
    answers: list[Answers] = []
    cached = 0
    for asked in rounds:
        played = await play(
            {
                model: (arm.endpoint, ClosedLoop(users=[[question_turn(model, key, p)] for key, p in prompts]))
                for model, prompts in asked.items()
            }
        )
        answers.append({r.key: r.output_ids for records in played.records.values() for r in records})
        cached += sum(record.cached_tokens for record in played.records["A"])
        await asyncio.sleep(SETTLE_S)
    after = await asyncio.to_thread(arm.samples)
    await asyncio.to_thread(arm.check)
    return Answered(
        rounds=answers,
        cached_tokens=float(cached),
        tier_hit_tokens=gained(before["A"], after["A"]).get(TIER_HITS, 0.0),
        preemptions=(await asyncio.to_thread(arm.preemptions))["A"] - preempted["A"],
    )


def compare_answers(stock: Answered, arm: Answered) -> Metrics:
    """As `compare`, and whether the tiers had to do with it."""
    return {
        **compare(stock.rounds, arm.rounds),
        "cached_tokens": arm.cached_tokens,
        "stock_cached_tokens": stock.cached_tokens,
        "tier_hit_tokens": arm.tier_hit_tokens,
        "preemptions": arm.preemptions,
    }
