"""Do answers stay the same while memory moves under them?

A fixed set of prompts, greedy, on float32 models (in bf16 stock vLLM itself gives other tokens when a batch has another
shape), sent all at once, then all once more, which hits the prefixes of the first time. Stock answers undisturbed. Polder
answers while the bench pins the engine to other sizes in mid-decode: up, down with migration, down below what is in use so
that requests are preempted, up again. Every token has to be the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from polder.bench.harness.arms import Arm
from polder.bench.harness.completions import encode_body
from polder.bench.harness.driver import ClosedLoop, Tally, Turn, play
from polder.bench.harness.pinning import engine_status
from polder.bench.report.metrics import Metrics
from polder.bench.workloads.models import RESERVED_IDS
from polder.bench.workloads.traces import VOCAB
from polder.broker import client
from polder.broker.wire import Resize

__all__ = ["MOVES", "Answers", "Pin", "Questions", "compare", "disturbed", "question_turn", "questions", "undisturbed"]

OUTPUT_TOKENS = 96
REPORT_S = 0.3  # engines report their counters every 50 ms


@dataclass(frozen=True, kw_only=True)
class Pin:
    """Pin engine A to `units` once `at` of the round's output tokens have come."""

    at: float
    units: int


# Engine A in float32 has 1,024 tokens a unit; the questions of a round need about 8 units at their end.
ROUNDS = (
    (
        Pin(at=0.0, units=10),
        Pin(at=0.15, units=16),
        Pin(at=0.35, units=9),
        Pin(at=0.55, units=5),
        Pin(at=0.75, units=14),
    ),
    (Pin(at=0.0, units=12), Pin(at=0.3, units=16), Pin(at=0.5, units=4), Pin(at=0.75, units=14)),
)
"""What is done to engine A in each round. In the second, the first one's prompts are asked again."""

MOVES = {
    "grows": "grows_total",
    "shrinks": "shrinks_total",
    "migrated_blocks": "migrated_blocks_total",
    "evicted_blocks": "evicted_blocks_total",
    "preemptions": "preemptions_total",
}
"""Metric -> engine's counter: what has to have happened while answers were compared, else their equality says nothing."""

Answers = dict[str, list[int]]
"""Request key -> output token ids."""

Questions = Mapping[str, Sequence[tuple[str, list[int]]]]
"""Model -> (key, prompt's token ids)."""


def questions(*, model: str, count: int, longest: int, seed: int) -> list[tuple[str, list[int]]]:
    """(key, prompt) of `count` prompts of up to `longest` tokens; every second one begins like the one before it."""
    rng = np.random.default_rng(seed)
    found: list[tuple[str, list[int]]] = []
    for number in range(count):
        length = int(rng.integers(longest // 3, longest))
        prompt = rng.integers(RESERVED_IDS, VOCAB, size=length).tolist()
        if number % 2:
            before = found[-1][1]
            prompt = before[: len(before) // 2] + prompt[: longest - len(before) // 2]
        found.append((f"{model}{number}", prompt))
    return found


async def undisturbed(arm: Arm, asked: Questions) -> list[Answers]:
    """Both rounds."""
    return [await _round(arm, asked) for _ in ROUNDS]


async def disturbed(arm: Arm, asked: Questions) -> tuple[list[Answers], Metrics]:
    """Both rounds, with engine A resized in mid-decode, and what happened to its memory meanwhile."""
    broker = arm.broker
    assert broker is not None, "only an elastic arm can be resized"
    before = engine_status(await asyncio.to_thread(client.status, broker), "A")
    answers = [await _round(arm, asked, broker, pins) for pins in ROUNDS]
    await asyncio.sleep(REPORT_S)
    after = engine_status(await asyncio.to_thread(client.status, broker), "A")
    return answers, {name: after.stats[counter] - before.stats[counter] for name, counter in MOVES.items()}


def compare(stock: Sequence[Answers], polder: Sequence[Answers]) -> Metrics:
    """How many answers were compared, and how many of them are not the same token by token."""
    pairs = [(ours[key], theirs[key]) for ours, theirs in zip(polder, stock, strict=True) for key in theirs]
    tokens = [token for _, theirs in pairs for token in theirs]
    return {
        "answers_compared": float(len(pairs)),
        "answers_different": float(sum(ours != theirs for ours, theirs in pairs)),
        "failed_requests": float(sum(len(answer) != OUTPUT_TOKENS for pair in pairs for answer in pair)),
        "tokens_compared": float(len(tokens)),
        "distinct_tokens": float(len(set(tokens))),
    }


async def _round(arm: Arm, asked: Questions, broker: Path | None = None, pins: Sequence[Pin] = ()) -> Answers:
    """All questions at once, engine by engine; `pins` are carried out on engine A meanwhile."""
    workloads = {
        model: (arm.endpoint, ClosedLoop(users=[[question_turn(model, key, prompt)] for key, prompt in prompts]))
        for model, prompts in asked.items()
    }
    tally = Tally()
    expected = sum(len(prompts) for prompts in asked.values()) * OUTPUT_TOKENS
    pinning = asyncio.create_task(_pin(broker, pins, tally, expected)) if broker else None
    try:
        played = await play(workloads, tally)
    finally:
        if pinning is not None:
            pinning.cancel()  # ended long ago, unless requests failed
            await asyncio.gather(pinning, return_exceptions=True)
    return {record.key: record.output_ids for of_engine in played.records.values() for record in of_engine}


def question_turn(model: str, key: str, prompt: list[int]) -> Turn:
    """A question as a request whose answer brings its token ids."""
    extra = {"return_token_ids": True}
    return Turn(
        key=key,
        body=encode_body(model=model, prompt=prompt, output_tokens=OUTPUT_TOKENS, extra=extra),
        output_tokens=OUTPUT_TOKENS,
    )


async def _pin(broker: Path, pins: Sequence[Pin], tally: Tally, expected: int) -> None:
    for pin in pins:
        while tally.output_tokens < pin.at * expected:
            await asyncio.sleep(0.005)
        await asyncio.to_thread(client.request, broker, Resize(engine="A", units=pin.units))
