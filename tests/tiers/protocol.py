"""The lending protocol as a transition system: what polder/tiers/peer/lending.py does, one shared access a step.

Each step of a process is one read or write of one word of the table, one lock or unlock, or the copy of one half of a block. A
step's name stands beside the line of lending.py that it is; `test_lending_conformance.py` holds the real code to exactly these
steps. Between any two steps any other process may take any number of its own, and any process may be killed: its locks are then
free and its marks stay. A process that is stopped for ever is one that takes no more steps, which is among the interleavings.

A model is a tuple of values, see `Model.field`. What the protocol itself does not know, but its promises are about ("ghosts"):

    own[lot]     the lender may write here: take_back has returned, and the lot was not offered since
    has[b]       bit k: borrower b was given lot k, and neither took_back nor release have ended that
    late[b]      the lock of the write under way was taken while the lender was already waiting for the lot
    landing[b]   GPU: b is dead, and these halves of the copy that it had launched are yet to land
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

LENDER = 9
"""Who holds a lock, and whose bytes these are: borrowers 1, 2, ..., the lender (or the broker in its place), and those after it."""
NEXT_OWNER = 8

State = tuple[Any, ...]
Step = Callable[[list[Any]], bool]
"""Takes one step in place; False: not possible now."""


class Violation(AssertionError):
    pass


@dataclass(frozen=True)
class Scenario:
    blocks: tuple[tuple[int, int], ...]
    """For each borrower the lots that the two halves of its block lie in."""
    lots: int
    offers: int
    """How often the lender offers a lot, at most."""
    writes: int
    """How often each borrower writes its block, at most."""
    releases: int = 0
    filtered: bool = False
    """Whether claims are tried only where they may succeed at that moment (fewer states); else anywhere, at any time."""
    mutant: str = ""
    before: tuple[tuple[int, str, int], ...] = ()
    """(process, first step, lot): what was done, one after the other, before the exploration begins."""

    @property
    def cells(self) -> list[int]:
        """The lot of each cell of memory."""
        if any(first == second for first, second in self.blocks):
            return [lot for lot in range(self.lots) for _ in range(2)]
        return list(range(self.lots))

    def lots_of(self, borrower: int) -> list[int]:
        """The lots of a borrower's block, in the order in which it locks them; `k` numbers them everywhere."""
        lots = sorted(set(self.blocks[borrower - 1]))
        return lots[::-1] if self.mutant == "any_order" and borrower == 2 else lots

    def halves(self, borrower: int) -> tuple[int, int]:
        """The cells of a borrower's block."""
        first, second = self.blocks[borrower - 1]
        if len(self.cells) == self.lots:
            return first, second
        return 2 * first, 2 * second + 1


SHARED = ("epoch", "holder", "writer", "foreign", "recalled", "lock", "own")
LENDER_FIELDS = ("pc", "lot", "offers", "todo", "after")
BORROWER_FIELDS = (
    "pc",
    "version",
    "landing",
    "epoch0",
    "epoch1",
    "half0",
    "half1",
    "written",
    "late",
    "released",
    "back",
    "has",
)


class Model:
    """`steps[process][pc]`: the named steps it may take there."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.borrowers = range(1, len(scenario.blocks) + 1)
        self.field: dict[tuple[Any, ...], int] = {}
        initial: list[Any] = []

        def add(value: Any, *name: Any) -> None:
            self.field[name] = len(initial)
            initial.append(value)

        for name in SHARED:
            for lot in range(scenario.lots):
                add(int(name == "own"), name, lot)
        for cell in range(len(scenario.cells)):
            add(LENDER, "cell", cell)
        add(0, "closed")
        add(0, "releases")
        for name in LENDER_FIELDS:
            add({"pc": "idle"}.get(name, 0), "L", name)
        for b in self.borrowers:
            for name in BORROWER_FIELDS:
                add({"pc": "idle"}.get(name, 0), b, name)
        self.initial: State = tuple(initial)
        from tests.tiers import protocol_borrower, protocol_lender

        self.steps: dict[int, dict[str, list[tuple[str, int, Step]]]] = {LENDER: protocol_lender.steps(self)}
        for b in self.borrowers:
            self.steps[b] = protocol_borrower.steps(self, b)
        self._pc = {LENDER: self.field["L", "pc"], **{b: self.field[b, "pc"] for b in self.borrowers}}
        self._land = {b: self.field[b, "landing"] for b in self.borrowers}
        self._has = [
            [
                (b, self.field[b, "has"], 1 << scenario.lots_of(b).index(lot))
                for b in self.borrowers
                if lot in scenario.lots_of(b)
            ]
            for lot in range(scenario.lots)
        ]
        self._lock = [self.field["lock", lot] for lot in range(scenario.lots)]
        self._own = [self.field["own", lot] for lot in range(scenario.lots)]
        self._marked = [
            (self.field["cell", cell], self.field["foreign", lot], lot) for cell, lot in enumerate(scenario.cells)
        ]
        self._waiting = {
            (b, f"write.lock{k}"): lot for b in self.borrowers for k, lot in enumerate(scenario.lots_of(b))
        }
        self._no_lender, self._no_borrower = [0] * (len(LENDER_FIELDS) - 1), [0] * (len(BORROWER_FIELDS) - 3)
        for process, name, lot in scenario.before:
            self.initial = self._do(self.initial, process, name, lot)

    def at(self, *name: Any) -> int:
        return self.field[name]

    def _do(self, state: State, process: int, name: str, lot: int) -> State:
        """All of one operation, from its first step on, with nobody in between."""
        s, at = list(state), self._pc[process]
        (begin,) = [step for n, where, step in self.steps[process][s[at]] if (n, where) == (name, lot)]
        assert begin(s), name
        while s[at] != "idle":
            assert any(step(s) for _, _, step in self.steps[process][s[at]])
        return tuple(s)

    # ------------------------------------------------------------------ what may happen

    def next(self, state: State) -> Iterator[tuple[int, str, int, State]]:
        """(process, step, lot, state after it) for every step that is possible."""
        for process, at in self._pc.items():
            for name, lot, step in self.steps[process].get(state[at], ()):
                after = list(state)
                if step(after):
                    yield process, name, lot, tuple(after)
        yield from self._kills(state)

    def _kills(self, state: State) -> Iterator[tuple[int, str, int, State]]:
        for process, at in self._pc.items():
            if state[at] not in ("dead", "gone"):
                after = list(state)
                self.kill(after, process)
                yield process, "killed", 0, tuple(after)
        for b, at in self._land.items():
            for half in (0, 1):
                if state[at] >> half & 1:
                    after = list(state)
                    after[at] &= ~(1 << half)
                    self.copy(after, b, half)
                    yield b, "lands", half, tuple(after)

    def kill(self, s: list[Any], process: int) -> None:
        for lock in self._lock:
            if s[lock] == process:
                s[lock] = 0
        first = self._pc[process]
        if process == LENDER:  # the broker retires its table, and begins again when it is killed too
            s[first : first + len(LENDER_FIELDS)] = ["close", *self._no_lender]
            return
        landing = {"copy0": 3, "copy1": 2}.get(s[first], 0)
        version = s[self.field[process, "version"]] if landing else 0
        s[first : first + len(BORROWER_FIELDS)] = ["dead", version, landing, *self._no_borrower]

    def copy(self, s: list[Any], b: int, half: int) -> None:
        """Half of a borrower's block goes to its place."""
        lot = self.scenario.blocks[b - 1][half]
        if s[self.field["own", lot]]:
            raise Violation(f"borrower {b} writes into lot {lot} after take_back has returned")
        s[self.field["cell", self.scenario.halves(b)[half]]] = 10 * b + s[self.field[b, "version"]]

    # ------------------------------------------------------------------ what must hold

    def check(self, state: State) -> None:
        """Raises Violation; what is about one step only is checked in that step."""
        for lot, having in enumerate(self._has):
            holders = [b for b, at, bit in having if state[at] & bit]
            if len(holders) > 1:
                raise Violation(f"lot {lot} has two holders")
            if holders and state[self._own[lot]]:
                raise Violation(f"borrower {holders[0]} has lot {lot}, which is the lender's own")
        for cell, foreign, lot in self._marked:
            if state[cell] >= 10 and not state[foreign]:
                raise Violation(f"lot {lot} has bytes of borrower {state[cell] // 10}, and nobody knows to zero it")
        waits = {p: state[self._lock[lot]] for p in self._pc if (lot := self._waits(state, p)) is not None}
        for process, other in waits.items():
            if other == process or waits.get(other) == process:
                raise Violation(f"{process} and {other} wait for each other")
        if LENDER in waits:
            self._lender_finishes(state)

    def _waits(self, state: Sequence[Any], process: int) -> int | None:
        """The lot whose lock a process is waiting for."""
        pc = state[self._pc[process]]
        if process == LENDER:
            lot = state[self.field["L", "lot"]] if pc in ("offer.lock", "take.lock") else None
        else:
            lot = self._waiting.get((process, pc))
        return lot if lot is not None and state[self._lock[lot]] else None

    def _lender_finishes(self, state: State) -> None:
        """Alone, everybody else being stopped for ever: it kills who has the lock and comes to the end of what it was doing."""
        s = list(state)
        for _ in range(40):
            lot = self._waits(s, LENDER)
            if lot is not None:
                other = s[self.field["lock", lot]]
                if self.scenario.mutant == "kill_by_mark" and s[self.field["writer", lot]] != other:
                    raise Violation(f"the lender waits for lot {lot} for ever: it does not know whom to kill")
                self.kill(s, other)
            if s[self.field["L", "pc"]] in ("idle", "gone"):
                return
            if not any(step(s) for _, _, step in self.steps[LENDER][s[self.field["L", "pc"]]]):
                break
        raise Violation("the lender does not finish")


def explore(scenario: Scenario) -> tuple[int, int]:
    """Visits every state that can be reached. Returns (states, steps); raises Violation with the way to it."""
    model = Model(scenario)
    came_from: dict[State, tuple[State, int, str, int] | None] = {model.initial: None}
    frontier, steps = [model.initial], 0
    gc.disable()  # nothing here is in a circle, and looking for one takes a third of the time
    try:
        return _search(model, came_from, frontier, steps)
    finally:
        gc.enable()


def _search(
    model: Model, came_from: dict[State, tuple[State, int, str, int] | None], frontier: list[State], steps: int
) -> tuple[int, int]:
    while frontier:
        found: list[State] = []
        for state in frontier:
            try:
                model.check(state)
                for process, name, lot, after in model.next(state):
                    steps += 1
                    if after not in came_from:
                        came_from[after] = (state, process, name, lot)
                        found.append(after)
            except Violation as error:
                raise Violation(f"{error}\n" + "\n".join(_way(came_from, state))) from None
        frontier = found
    return len(came_from), steps


def _way(came_from: dict[State, tuple[State, int, str, int] | None], state: State) -> list[str]:
    lines: list[str] = []
    while (link := came_from[state]) is not None:
        state, process, name, lot = link
        lines.append(f"    {'lender' if process == LENDER else f'borrower {process}'}: {name} (lot {lot})")
    return lines[::-1]
