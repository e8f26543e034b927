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
from pathlib import Path
from typing import NamedTuple

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import ClosedLoop, RequestRecord, Tally, greedy
from polder.bench.harness.runs import play_on
from polder.bench.harness.scrape import PREEMPTIONS, REPORTED, TIER_HITS, gained
from polder.bench.report.metrics import Metrics
from polder.bench.workloads.agents import questions
from polder.bench.workloads.tenants import VOCAB
from polder.broker import client
from polder.broker.wire import Resize, Sleep

__all__ = [
    *("MOVE_COUNTERS", "OUTPUT_TOKENS", "SLEEPING_ENGINES", "Answered", "Round", "answer", "compare", "resizing"),
    *("sleeping", "taking_back"),
]

OUTPUT_TOKENS = 96
MOVES = ("grows", "shrinks", "migrated_blocks", "evicted_blocks", "preemptions")
MOVE_COUNTERS = {move: f"{REPORTED}{move}_total" for move in MOVES}
"""Metric -> sample: what has to happen while answers are compared, or their equality says nothing."""


class Round(NamedTuple):
    asked: Mapping[str, Mapping[str, Sequence[int]]]
    """Engine -> key -> prompt."""
    acts: Mapping[float, Resize | Sleep]
    """What the broker is told once this part of the round's output tokens has come; only where there is a broker."""


class Answered(NamedTuple):
    """All rounds of one arm."""

    rounds: list[dict[str, list[int]]]
    """Key -> output token ids."""
    cached_tokens: float
    """Prompt tokens of all engines that came from a pool or a tier."""
    counts: Metrics
    """What happened to memory meanwhile, over all engines."""


def answer(arm: Arm, rounds: Sequence[Round], counters: Mapping[str, str], *, settle_s: float) -> Answered:
    """Asks the arm all rounds, from empty caches. Raises what a message to the broker raised.

    `counters`: metric -> sample. `settle_s`: between rounds, in which stores end and idle engines fall asleep.
    """
    arm.reset_prefix_caches()
    before = arm.samples()
    answers: list[dict[str, list[int]]] = []
    cached_tokens = 0
    for one in rounds:
        records = asyncio.run(_round(arm, one))
        answers.append({record.key: record.output_ids for record in records})
        cached_tokens += sum(record.cached_tokens for record in records)
        time.sleep(settle_s)
    counts = [gained(before[engine], after) for engine, after in arm.samples().items()]
    arm.check()
    counted = {"tier_hit_tokens": TIER_HITS, "preemptions": PREEMPTIONS, **counters}
    sums: Metrics = {metric: sum(of.get(name, 0.0) for of in counts) for metric, name in counted.items()}
    return Answered(answers, float(cached_tokens), sums)


async def _round(arm: Arm, one: Round) -> list[RequestRecord]:
    loads = {
        engine: ClosedLoop(users=[[greedy(engine, key, prompt, OUTPUT_TOKENS)] for key, prompt in asked.items()])
        for engine, asked in one.asked.items()
    }
    tally, expected = Tally(), OUTPUT_TOKENS * sum(map(len, one.asked.values()))
    played, _ = await asyncio.gather(play_on(arm, loads, tally), _act(arm.broker, one.acts, tally, expected))
    return [record for records in played.records.values() for record in records]


async def _act(broker: Path | None, acts: Mapping[float, Resize | Sleep], tally: Tally, expected: int) -> None:
    if broker is None:
        return
    for at, message in acts.items():
        while tally.output_tokens < at * expected and not tally.over:  # it ends early when requests fail
            await asyncio.sleep(0.005)
        if not tally.over:
            await asyncio.to_thread(client.request, broker, message)


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


# ---------------------------------------------------------------------- what is asked, and what is ordered meanwhile

# Engine A in float32 has 1,024 tokens a unit; the questions of a round need about 8 units at their end.
UNITS_AT = (
    {0.0: 10, 0.15: 16, 0.35: 9, 0.55: 5, 0.75: 14},
    {0.0: 12, 0.3: 16, 0.5: 4, 0.75: 14},
)
"""Sizes of engine A in each round, by the part of the round's tokens that has come: up, down with migration, down below
what is in use so that requests are preempted, up again. The second round asks the first one's prompts again, which hits
their prefixes."""

SLEEPING_ENGINES = ("T1", "T2")
SLEEPING_ROUNDS: tuple[tuple[tuple[str, ...], dict[float, Resize | Sleep]], ...] = (
    (("T1", "T2"), {0.2: Resize(engine="T1", units=2), 0.5: Resize(engine="T1", units=0), 0.7: Sleep(engine="T2")}),
    (("T1",), {0.0: Resize(engine="T1", units=12), 0.6: Resize(engine="T1", units=0)}),
    (("T1", "T2"), {0.3: Resize(engine="T2", units=2), 0.5: Sleep(engine="T1"), 0.6: Resize(engine="T2", units=0)}),
    (("T1", "T2"), {0.4: Sleep(engine="T2")}),
    (("T2",), {}),
)
"""Who is asked in each round, and what is ordered once a part of the round's tokens has come. An engine that is told to sleep does
once it is idle; then the memory of its weights becomes KV of the other. The next round's requests wake it. In float32 a unit is
1,024 tokens: a share is 3 units, an engine's questions take about 5, and the weights of the other hold 12."""


def resizing(seed: int) -> list[Round]:
    """Engine A is resized in mid-decode."""
    asked = {
        "A": questions("A", count=12, longest=1200, seed=seed),
        "B": questions("B", count=6, longest=700, seed=seed),
    }
    return [Round(asked, {at: Resize(engine="A", units=n) for at, n in units_at.items()}) for units_at in UNITS_AT]


def taking_back(seed: int) -> list[Round]:
    """A's prompts are more than its pool holds, and the same in every round: what one round left behind comes from a tier.

    B, which lends its idle memory in the first round, gets more prompts in the second than fit beside the loan.
    """
    of_a = questions("A", count=10, longest=1100, seed=seed)
    few, many = (questions("B", count=n, longest=900, seed=s) for n, s in ((2, seed), (24, seed + 1)))
    return [Round({"A": of_a, "B": of_b}, {}) for of_b in (few, many, few)]


def sleeping(seed: int) -> list[Round]:
    """Engines fall asleep and wake while the other answers."""
    asked = {
        engine: questions(engine, count=8, longest=700, seed=seed + number, vocab=VOCAB)
        for number, engine in enumerate(SLEEPING_ENGINES)
    }
    return [Round({engine: asked[engine] for engine in engines}, acts) for engines, acts in SLEEPING_ROUNDS]
