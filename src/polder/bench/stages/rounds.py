"""What is asked in the rounds of the equality stages, and what is ordered meanwhile."""

from __future__ import annotations

from polder.bench.stages.equality import Act, Round
from polder.bench.workloads.prompts import questions
from polder.bench.workloads.tenants import VOCAB
from polder.broker.wire import Resize, Sleep

__all__ = ["SLEEPING_ENGINES", "resizing", "sleeping", "taking_back"]

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
        "A": questions(model="A", count=12, longest=1200, seed=seed),
        "B": questions(model="B", count=6, longest=700, seed=seed),
    }
    return [
        Round(asked=asked, acts=tuple(Act(at=at, message=Resize(engine="A", units=n)) for at, n in units_at.items()))
        for units_at in UNITS_AT
    ]


def taking_back(seed: int) -> list[Round]:
    """A's prompts are more than its pool holds, and the same in every round: what one round left behind comes from a tier.

    B, which lends its idle memory in the first round, gets more prompts in the second than fit beside the loan.
    """
    of_a = questions(model="A", count=10, longest=1100, seed=seed)
    few, many = (questions(model="B", count=n, longest=900, seed=s) for n, s in ((2, seed), (24, seed + 1)))
    return [Round(asked={"A": of_a, "B": of_b}) for of_b in (few, many, few)]


def sleeping(seed: int) -> list[Round]:
    """Engines fall asleep and wake while the other answers."""
    asked = {
        engine: questions(model=engine, count=8, longest=700, seed=seed + number, vocab=VOCAB)
        for number, engine in enumerate(SLEEPING_ENGINES)
    }
    return [
        Round(
            asked={engine: asked[engine] for engine in engines},
            acts=tuple(Act(at=at, message=message) for at, message in acts.items()),
        )
        for engines, acts in SLEEPING_ROUNDS
    ]
