"""Do answers stay the same while memory moves?

The same prompts, greedy, on float32 models (in bf16 stock vLLM itself gives other tokens when a batch has another
shape), in several rounds, all prompts of a round at once. Stock answers undisturbed. An arm with a broker answers while
the bench resizes its engines, puts them to sleep, or asks so much of one that it takes back what it lent. Every token
has to be the same.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polder.bench.harness.arms import Arm
from polder.bench.harness.control import REPORT_S
from polder.bench.harness.driver import ClosedLoop, RequestRecord, Tally, play
from polder.bench.harness.scrape import TIER_HITS, gained
from polder.bench.report.metrics import Metrics
from polder.bench.workloads.prompts import single
from polder.broker import client
from polder.broker.wire import Resize, Sleep

__all__ = ["MOVE_COUNTERS", "OUTPUT_TOKENS", "Act", "Answered", "Round", "answer", "compare"]

OUTPUT_TOKENS = 96
MOVE_COUNTERS = {
    "grows": "grows_total",
    "shrinks": "shrinks_total",
    "migrated_blocks": "migrated_blocks_total",
    "evicted_blocks": "evicted_blocks_total",
    "preemptions": "preemptions_total",
}
"""Metric -> engine's counter: what has to happen while answers are compared, or their equality says nothing."""

Answers = dict[str, list[int]]
"""Request key -> output token ids."""
Questions = Mapping[str, Sequence[tuple[str, list[int]]]]
"""Model -> (key, prompt's token ids)."""


@dataclass(frozen=True, kw_only=True)
class Act:
    """Send `message` to the broker once the fraction `at` of the round's output tokens has come."""

    at: float
    message: Resize | Sleep


@dataclass(frozen=True, kw_only=True)
class Round:
    asked: Questions
    acts: tuple[Act, ...] = ()
    """Only where there is a broker."""


@dataclass(frozen=True, kw_only=True)
class Answered:
    """All rounds of one arm."""

    rounds: list[Answers]
    cached_tokens: float
    """Prompt tokens of all engines that came from a pool or a tier."""
    counts: Metrics
    """What happened to memory meanwhile, over all engines."""


async def answer(arm: Arm, rounds: Sequence[Round], counters: Mapping[str, str], *, settle_s: float) -> Answered:
    """Asks the arm all rounds, from empty caches. Raises what a message to the broker raised.

    `counters`: metric -> engine's counter. `settle_s`: between rounds, in which stores end and idle engines fall
    asleep.
    """
    await asyncio.to_thread(arm.reset_prefix_caches)
    before, preempted = await asyncio.to_thread(arm.samples), await asyncio.to_thread(arm.preemptions)
    counted = await asyncio.to_thread(_counts, arm.broker, counters, after_s=0.0)
    answers: list[Answers] = []
    cached_tokens = 0
    for one in rounds:
        records = [r for of in (await _round(arm, one)).values() for r in of]
        answers.append({record.key: record.output_ids for record in records})
        cached_tokens += sum(record.cached_tokens for record in records)
        await asyncio.sleep(settle_s)
    after = await asyncio.to_thread(arm.samples)
    await asyncio.to_thread(arm.check)
    moved = await asyncio.to_thread(_counts, arm.broker, counters, after_s=REPORT_S)
    counts: Metrics = {
        "tier_hit_tokens": sum(gained(before[e], after[e]).get(TIER_HITS, 0.0) for e in after),
        "preemptions": sum((await asyncio.to_thread(arm.preemptions)).values()) - sum(preempted.values()),
        **{metric: count - counted[metric] for metric, count in moved.items()},
    }
    return Answered(rounds=answers, cached_tokens=float(cached_tokens), counts=counts)


def compare(stock: Answered, arm: Answered) -> Metrics:
    """How many answers were compared, how many are not the same token by token, and what happened meanwhile."""
    pairs = [(ours[key], theirs[key]) for ours, theirs in zip(arm.rounds, stock.rounds, strict=True) for key in theirs]
    tokens = [token for _, theirs in pairs for token in theirs]
    return {
        "answers_compared": float(len(pairs)),
        "answers_different": float(sum(ours != theirs for ours, theirs in pairs)),
        "failed_requests": float(sum(len(answer) != OUTPUT_TOKENS for pair in pairs for answer in pair)),
        "tokens_compared": float(len(tokens)),
        "distinct_tokens": float(len(set(tokens))),
        "cached_tokens": arm.cached_tokens,
        "stock_cached_tokens": stock.cached_tokens,
        **arm.counts,
    }


async def _round(arm: Arm, one: Round) -> dict[str, list[RequestRecord]]:
    workloads = {
        model: ClosedLoop(users=[[single(model, key, ids, output_tokens=OUTPUT_TOKENS)] for key, ids in prompts])
        for model, prompts in one.asked.items()
    }
    tally = Tally()
    expected = sum(map(len, one.asked.values())) * OUTPUT_TOKENS
    acting = asyncio.create_task(_act(arm.broker, one.acts, tally, expected))
    try:
        played = await play({model: (arm.endpoint, load) for model, load in workloads.items()}, tally)
    finally:
        acting.cancel()  # ended long ago, unless requests failed
    (outcome,) = await asyncio.gather(acting, return_exceptions=True)
    if isinstance(outcome, Exception):  # a cancellation is none
        raise outcome
    return played.records


async def _act(broker: Path | None, acts: Sequence[Act], tally: Tally, expected: int) -> None:
    for act in acts if broker is not None else ():
        while tally.output_tokens < act.at * expected:
            await asyncio.sleep(0.005)
        assert broker is not None
        await asyncio.to_thread(client.request, broker, act.message)


def _counts(broker: Path | None, counters: Mapping[str, str], *, after_s: float) -> dict[str, float]:
    """Sums over all engines; nothing without a broker."""
    if broker is None:
        return {}
    time.sleep(after_s)
    engines = client.status(broker).engines
    return {metric: sum(e.stats.get(counter, 0.0) for e in engines) for metric, counter in counters.items()}
