"""The traces as workloads: which requests each engine gets, in what order, and which of them count."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import msgspec
import numpy as np

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import ClosedLoop, OpenLoop, Turn, Workload, greedy, turns_of
from polder.bench.harness.runs import play_on
from polder.bench.workloads.models import MODEL_A, MODEL_B, RESERVED_IDS
from polder.bench.workloads.traces import (
    VOCAB,
    AgentRow,
    BurstRow,
    ChatRow,
    agent_prompt,
    burst_prompt,
    chat_prompt,
    ideal_hit_ratio,
    load,
)

__all__ = [
    *("BURST_PERIOD_S", "BURST_ROUNDS", "MAX_MODEL_LEN", "RECIPES", "TURNS", "USERS", "agents", "bursts", "chats"),
    *("ideal_of", "one_by_one", "parted", "questions", "unique_prompts", "unmeasured", "warm_up"),
]

STAGGER_S = 0.3
"""Users start one after the other."""
RECIPES = {"A": MODEL_A, "B": MODEL_B}
MAX_MODEL_LEN = {"A": 4224, "B": 1024}
"""A: the longest prompt of the trace, 3,988, and its 64 tokens, in whole blocks. B: 929 and 32."""
USERS = 16
BURST_ROUNDS = 8
"""More than a run ever needs: it ends when the last measured request has ended."""
TURNS = 16
"""Requests of each session of tiny-agent-v1."""
BURST_PERIOD_S = 120.0
"""Length of tiny-burst-v1 on its own clock."""


def agents(*, sessions: int) -> ClosedLoop:
    """Engine A: user u plays sessions u, u + USERS, ... below `sessions`, one turn at a time."""
    by_session: dict[int, list[AgentRow]] = {}
    for row in load(AgentRow):
        by_session.setdefault(row.session, []).append(row)

    def turn(row: AgentRow) -> Turn:
        cold = row.session < USERS and row.turn == 0
        key, pause = f"s{row.session}t{row.turn}", row.think_s
        return greedy("A", key, agent_prompt(row), row.output_tokens, think_s=pause, cold_start=cold)

    turns = [[turn(row) for s in range(u, sessions, USERS) for row in by_session.get(s, ())] for u in range(USERS)]
    return ClosedLoop(users=turns, stagger_s=STAGGER_S)


def parted(load: ClosedLoop, turns_before: int) -> tuple[ClosedLoop, ClosedLoop]:
    """The first `turns_before` turns of each session, and the others. Users keep their sessions and their order."""

    def part(wanted: Callable[[int], bool]) -> ClosedLoop:
        users = [[turn for at, turn in enumerate(turns) if wanted(at % TURNS)] for turns in load.users]
        return replace(load, users=users)

    return part(lambda at: at < turns_before), part(lambda at: at >= turns_before)


def unmeasured(load: ClosedLoop) -> ClosedLoop:
    """The same as load only, beside another engine that is measured."""
    return replace(load, users=[[replace(turn, measured=False) for turn in turns] for turns in load.users])


def ideal_of(load: Workload, block_tokens: int) -> float:
    """Its hit ratio with a prefix cache without limit."""
    return ideal_hit_ratio([msgspec.json.decode(turn.body)["prompt"] for turn in turns_of(load)], block_tokens)


def chats() -> OpenLoop:
    """Engine A under tiny-chat-v1: 227 requests at the times of the trace."""
    rows = enumerate(load(ChatRow))
    return OpenLoop(turns=[greedy("A", f"c{n}", chat_prompt(row), row.output_tokens, at_s=row.t) for n, row in rows])


def unique_prompts(*, requests: int, scale: int, blocks: int, at_a_time: int) -> list[ClosedLoop]:
    """Engine A: the first `requests` of tiny-burst-v1 with prompts `scale` times as long, of which no two share a prefix.

    Cut into `blocks` of about equal length; in a block `at_a_time` users send one request after the other.
    """
    turns = []
    for number, row in enumerate(load(BurstRow)[:requests]):
        longer = msgspec.structs.replace(row, input_tokens=row.input_tokens * scale)
        turns.append(greedy("A", f"u{number}", burst_prompt(longer), row.output_tokens))
    cut = [turns[number::blocks] for number in range(blocks)]
    return [ClosedLoop(users=[block[user::at_a_time] for user in range(at_a_time)]) for block in cut]


def one_by_one(*, blocks: int) -> list[ClosedLoop]:
    """Engine B's trace without its times: one request after the other, cut into `blocks` of about equal length."""
    turns = [replace(turn, at_s=0.0) for turn in bursts().turns]
    return [ClosedLoop(users=[turns[number::blocks]]) for number in range(blocks)]


def bursts(*, rounds: int = 1, time_scale: float = 1.0) -> OpenLoop:
    """Engine B: the trace once, and as load that is not measured `rounds - 1` times more, `BURST_PERIOD_S` apart.

    `time_scale` 0.2 plays it five times as fast.
    """
    once = [
        greedy("B", f"b{number}", burst_prompt(row), row.output_tokens, at_s=row.t * time_scale)
        for number, row in enumerate(load(BurstRow))
    ]
    again = [
        replace(turn, key=f"{turn.key}r{n}", at_s=turn.at_s + n * BURST_PERIOD_S * time_scale, measured=False)
        for n in range(1, rounds)
        for turn in once
    ]
    return OpenLoop(turns=once + again)


def warm_up(arm: Arm) -> None:
    """The longest prompt of each user's first session on A, one after the other, and B's trace, five times as fast.

    They fill all memory and run all code once. Memory that was never touched costs page faults at its first use, which
    must not fall on the first run of one arm.
    """
    rows = [row for row in load(AgentRow) if row.session < USERS and row.turn == TURNS - 1]
    longest = [greedy("A", f"w{row.session}", agent_prompt(row), 2) for row in rows]
    asyncio.run(play_on(arm, {"A": ClosedLoop(users=[longest]), "B": bursts(time_scale=0.2)}))


def questions(model: str, *, count: int, longest: int, seed: int, vocab: int = VOCAB) -> dict[str, list[int]]:
    """Prompts of up to `longest` tokens by key; every second one begins like the one before it."""
    rng = np.random.default_rng(seed)
    found: dict[str, list[int]] = {}
    before: list[int] = []
    for number in range(count):
        length = int(rng.integers(longest // 3, longest))
        prompt = rng.integers(RESERVED_IDS, vocab, size=length).tolist()
        if number % 2:
            prompt = before[: len(before) // 2] + prompt[: longest - len(before) // 2]
        found[f"{model}{number}"] = before = prompt
    return found
