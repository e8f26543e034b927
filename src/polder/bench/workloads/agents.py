"""The traces as workloads: which requests each engine gets, in what order, and which of them count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import msgspec

from polder.bench.harness.completions import encode_body
from polder.bench.harness.driver import ClosedLoop, OpenLoop, Turn
from polder.bench.workloads.traces import (
    AgentRow,
    agent_prompt,
    burst_prompt,
    chat_prompt,
    ideal_hit_ratio,
    load_agent,
    load_burst,
    load_chat,
)

__all__ = [
    "BURST_PERIOD_S",
    "agents",
    "agents_ideal_hit_ratio",
    "bursts",
    "chats",
    "chats_ideal_hit_ratio",
    "one_by_one",
    "parted",
    "unique_prompts",
    "unmeasured",
    "warm_up",
]

STAGGER_S = 0.3
"""Users start one after the other (reference/workloads.md section 2)."""
BURST_PERIOD_S = 120.0
"""Length of tiny-burst-v1 on its own clock."""


def agents(*, model: str, users: int, sessions: int) -> ClosedLoop:
    """Engine A: user u plays sessions u, u + users, ... below `sessions`, one turn at a time."""
    by_session: dict[int, list[AgentRow]] = {}
    for row in load_agent():
        by_session.setdefault(row.session, []).append(row)

    def turn(row: AgentRow) -> Turn:
        return Turn(
            key=f"s{row.session}t{row.turn}",
            body=encode_body(model=model, prompt=agent_prompt(row), output_tokens=row.output_tokens),
            output_tokens=row.output_tokens,
            think_s=row.think_s,
            cold_start=row.session < users and row.turn == 0,
        )

    return ClosedLoop(
        users=[
            [turn(row) for row in chain.from_iterable(by_session[s] for s in range(user, sessions, users))]
            for user in range(users)
        ],
        stagger_s=STAGGER_S,
    )


def parted(load: ClosedLoop, turns_before: int, turns_of_session: int) -> tuple[ClosedLoop, ClosedLoop]:
    """The first `turns_before` turns of each session, and the others. Users keep their sessions and their order."""
    parts: list[list[list[Turn]]] = [[], []]
    for turns in load.users:
        early = [turn for at, turn in enumerate(turns) if at % turns_of_session < turns_before]
        late = [turn for at, turn in enumerate(turns) if at % turns_of_session >= turns_before]
        parts[0].append(early)
        parts[1].append(late)
    before, after = (ClosedLoop(users=users, stagger_s=load.stagger_s) for users in parts)
    return before, after


def unmeasured(load: ClosedLoop) -> ClosedLoop:
    """The same as load only, beside another engine that is measured."""
    users = [[replace(turn, measured=False) for turn in turns] for turns in load.users]
    return ClosedLoop(users=users, stagger_s=load.stagger_s)


def agents_ideal_hit_ratio(*, sessions: int, block_tokens: int) -> float:
    """Hit ratio of `agents` with a prefix cache without limit."""
    return ideal_hit_ratio([agent_prompt(row) for row in load_agent() if row.session < sessions], block_tokens)


def chats(*, model: str) -> OpenLoop:
    """Engine A under tiny-chat-v1: 227 requests at the times of the trace."""
    return OpenLoop(
        turns=[
            Turn(
                key=f"c{number}",
                body=encode_body(model=model, prompt=chat_prompt(row), output_tokens=row.output_tokens),
                output_tokens=row.output_tokens,
                at_s=row.t,
            )
            for number, row in enumerate(load_chat())
        ]
    )


def chats_ideal_hit_ratio(*, block_tokens: int) -> float:
    """Hit ratio of `chats` with a prefix cache without limit."""
    return ideal_hit_ratio([chat_prompt(row) for row in load_chat()], block_tokens)


def unique_prompts(*, model: str, requests: int, scale: int, blocks: int, at_a_time: int) -> list[ClosedLoop]:
    """The first `requests` of tiny-burst-v1 with prompts `scale` times as long, of which no two share a prefix.

    Cut into `blocks` of about equal length; in a block `at_a_time` users send one request after the other.
    """
    turns = []
    for number, row in enumerate(load_burst()[:requests]):
        longer = msgspec.structs.replace(row, input_tokens=row.input_tokens * scale)
        body = encode_body(model=model, prompt=burst_prompt(longer), output_tokens=row.output_tokens)
        turns.append(Turn(key=f"u{number}", body=body, output_tokens=row.output_tokens))
    cut = [turns[number::blocks] for number in range(blocks)]
    return [ClosedLoop(users=[block[user::at_a_time] for user in range(at_a_time)]) for block in cut]


def one_by_one(*, model: str, blocks: int) -> list[ClosedLoop]:
    """Engine B's trace without its times: one request after the other, cut into `blocks` of about equal length."""
    turns = [replace(turn, at_s=0.0) for turn in bursts(model=model).turns]
    return [ClosedLoop(users=[turns[number::blocks]]) for number in range(blocks)]


def bursts(*, model: str, rounds: int = 1, time_scale: float = 1.0) -> OpenLoop:
    """Engine B: the trace once, and as load that is not measured `rounds - 1` times more, `BURST_PERIOD_S` apart.

    `time_scale` 0.2 plays it five times as fast.
    """
    rows = load_burst()
    once: Sequence[tuple[float, bytes, int]] = [
        (
            row.t,
            encode_body(model=model, prompt=burst_prompt(row), output_tokens=row.output_tokens),
            row.output_tokens,
        )
        for row in rows
    ]
    return OpenLoop(
        turns=[
            Turn(
                key=f"b{number}" if turn == 0 else f"b{number}r{turn}",
                body=body,
                output_tokens=output_tokens,
                at_s=(at_s + turn * BURST_PERIOD_S) * time_scale,
                measured=turn == 0,
            )
            for turn in range(rounds)
            for number, (at_s, body, output_tokens) in enumerate(once)
        ]
    )


def warm_up(*, model: str, users: int) -> ClosedLoop:
    """The longest prompt of each user's first session, one after the other: they fill the whole budget once.

    Memory that was never touched costs page faults at its first use, and first steps allocate: neither is to fall on
    the first run of one arm.
    """
    rows = [row for row in load_agent() if row.session < users and row.turn == 15]
    return ClosedLoop(
        users=[
            [
                Turn(
                    key=f"w{row.session}",
                    body=encode_body(model=model, prompt=agent_prompt(row), output_tokens=2),
                    output_tokens=2,
                )
                for row in rows
            ]
        ]
    )
