"""The real LendingTable and the model, step by step: threads take turns at every shared access of the real code.

Each actor is a thread with a view of its own of one real table. Before every read or write of the table, every lock and every half
of a copy it waits for its turn; which actor has the next turn is drawn at random. What it then does must be a step that the model
has at this place, and after it the whole real table must equal the model's. The kernel's locks are real. A killed actor takes no
more steps, not even those in its `finally` clauses, and its locks are freed, as the kernel does.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from polder.tiers.peer import lending
from polder.tiers.peer.lending import LendingTable
from tests.tiers.protocol import LENDER, Model, Scenario

ARRAYS = ("epoch", "holder", "writer", "foreign", "recalled")


class Killed(BaseException):
    pass


class Watched(np.ndarray):
    """An array of the table that announces reads and writes of single elements."""

    name: str
    actor: Actor

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, np.ndarray):  # valid(): all of them at once
            return np.array([self[lot] for lot in key.tolist()], dtype=np.uint64)
        if not isinstance(key, int):
            return super().__getitem__(key)
        self.actor.turn()
        value = super().__getitem__(key)
        self.actor.stepped(f".r.{self.name}", None if self.name == "closed" else key)
        return value

    def __setitem__(self, key: Any, value: Any) -> None:
        self.actor.turn()
        super().__setitem__(key, value)
        self.actor.stepped(f".w.{self.name}", None if self.name == "closed" else key)

    def __array_finalize__(self, other: Any) -> None:
        self.name, self.actor = getattr(other, "name", ""), getattr(other, "actor", None)  # type: ignore[assignment]


class SteppedTable(LendingTable):
    actor: Actor

    def watch(self, actor: Actor) -> None:
        self.actor = actor
        for name in (*ARRAYS, "_header"):
            array = getattr(self, name).view(Watched)
            array.name, array.actor = "closed" if name == "_header" else name, actor
            setattr(self, name, array)

    def _try_lock(self, lot: int) -> bool:
        self.actor.turn()
        got = super()._try_lock(lot)
        self.actor.locked(lot, got)
        return got

    def _unlock(self, lot: int) -> None:
        self.actor.turn()
        super()._unlock(lot)
        del self.actor.world.locks[lot]
        self.actor.stepped(".unlock", lot)

    def _lock_for_write(self, lot: int, held: list[int]) -> bool:
        got = super()._lock_for_write(lot, held)
        if not got:
            self.actor.stepped("write.give_up", lot)
        return got

    def _kill_holders(self, lot: int) -> None:
        if lot in self.actor.world.locks:
            self.actor.world.kill(self.actor.world.locks[lot])


class World:
    """A table, its actors, the model's state, and whose turn it is."""

    def __init__(self, scenario: Scenario, seed: int) -> None:
        self.model, self.draw = Model(scenario), random.Random(seed)
        self.state = list(self.model.initial)
        self.fd = os.memfd_create("lockstep")
        self.cells = [LENDER] * len(scenario.cells)
        self.locks: dict[int, int] = {}
        self.landing: dict[int, list[int]] = {}
        """Killed borrower -> halves of its copy that are still to land."""
        self.actors: dict[int, Actor] = {}
        self.idle = threading.Semaphore(0)
        self.steps = self.kills = 0
        self.error: BaseException | None = None
        self.trail: list[tuple[int, str, int | None]] = []

    # ------------------------------------------------------------------ the model follows

    def pc(self, process: int) -> str:
        return str(self.state[self.model.at("L" if process == LENDER else process, "pc")])

    def step(self, process: int, suffix: str, lot: int | None, *, missing_ok: bool = False) -> bool:
        """Takes the model's step with this name. Returns whether there was one."""
        pc = self.pc(process)
        for name, where, step in self.model.steps[process].get(pc, ()):
            after = list(self.state)
            if name.endswith(suffix) and (lot is None or where in (-1, lot)) and step(after):
                self.state = after
                self.trail.append((process, name, lot))
                self.model.check(tuple(after))
                return True
        assert missing_ok, f"{process} does {suffix} on lot {lot}; the model is at {pc}"
        return False

    def compare(self) -> None:
        self.steps += 1
        table, at = self.plain, self.model.at
        for lot in range(self.model.scenario.lots):
            real = [int(getattr(table, name)[lot]) for name in ARRAYS]
            real[0] -= self.base
            assert real == [self.state[at(name, lot)] for name in ARRAYS], (lot, real)
            assert self.state[at("lock", lot)] == self.locks.get(lot, 0), (lot, self.locks, self.trail[-8:])
        assert table.closed == bool(self.state[at("closed")])
        assert self.cells == [self.state[at("cell", cell)] for cell in range(len(self.cells))]

    def kill(self, process: int) -> None:
        """SIGKILL: the kernel closes its file, and nothing else happens."""
        actor = self.actors[process]
        actor.killed = True
        for lot, owner in self.locks.items():
            if owner == process:
                LendingTable._unlock(actor.table, lot)
        self.kills += 1
        self.locks = {lot: owner for lot, owner in self.locks.items() if owner != process}
        self.model.kill(self.state, process)
        if process != LENDER:
            left = self.state[self.model.at(process, "landing")]
            self.landing[process] = [half for half in (0, 1) if left >> half & 1]
        self.compare()

    def land(self, process: int) -> None:
        """As on a GPU: a half of the copy that a killed borrower had launched comes to its place."""
        half = self.landing[process].pop(0)
        at = self.model.at(process, "landing")
        assert self.state[at] >> half & 1, f"a copy of borrower {process} lands, whose end was waited for"
        self.state[at] &= ~(1 << half)
        self.model.copy(self.state, process, half)
        version = self.state[self.model.at(process, "version")]
        self.cells[self.model.scenario.halves(process)[half]] = 10 * process + version
        self.compare()

    # ------------------------------------------------------------------ turns

    def run(self, most_steps: int, kill: float) -> None:
        geometry = lending.LentGeometry(
            blocks=self.model.scenario.lots,
            ranks=1,
            unit_blocks=1,
            unit_pages=1,
            page_bytes=4096,
            granules=1,
            granule_bytes=4096,
        )
        self.plain = LendingTable.create(self.fd, geometry)
        self.base = int(self.plain.epoch[0])
        from tests.tiers.lockstep_actors import Borrower, Lender

        self.actors = {LENDER: Lender(self, LENDER), **{b: Borrower(self, b) for b in self.model.borrowers}}
        try:
            while self.steps < most_steps and self.error is None:
                ready = [p for p, actor in self.actors.items() if not actor.ended and not actor.killed]
                if not ready:
                    break
                late = [b for b, halves in self.landing.items() if halves]
                if late and self.draw.random() < 0.01:
                    self.land(self.draw.choice(late))
                    continue
                # The lender's turns are rare: else borrowers hardly ever come to write.
                process = self.draw.choice([p for p in ready for _ in range(1 if p == LENDER else 9)])
                if self.draw.random() < kill * (100 if self.pc(process).startswith("copy") else 1):
                    self.kill(process)
                    if process == LENDER:
                        self.actors[LENDER].finish()
                        self.actors[LENDER] = Lender(self, LENDER, broker=True)
                else:
                    self.actors[process].go()
        finally:
            for actor in self.actors.values():
                actor.killed = True
                actor.finish()
            self.plain.close()
            os.close(self.fd)
            del self.plain
            self.actors = {}
        if self.error is not None:
            raise self.error


class Actor:
    """A process, as a thread. Subclasses say what it does in `life`."""

    def __init__(self, world: World, number: int) -> None:
        self.world, self.number = world, number
        self.killed = self.ended = False
        self.table = SteppedTable(world.fd)
        self.table.watch(self)
        self._may_go = threading.Semaphore(0)
        self._last = ""
        self._thread = threading.Thread(target=self._run, name=f"actor {number}", daemon=True)
        self._thread.start()
        world.idle.acquire(timeout=60)

    def life(self) -> None:
        raise NotImplementedError

    def _run(self) -> None:
        WHO.number, WHO.world = self.number, self.world
        try:
            self.turn()
            self.life()
        except Killed:
            pass
        except BaseException as error:
            self.world.error = self.world.error or error
        self.ended = True
        self.world.idle.release()

    def go(self) -> None:
        """By the scheduler: lets it take one step."""
        self._may_go.release()
        assert self.world.idle.acquire(timeout=60)

    def finish(self) -> None:
        while not self.ended:
            self.go()
        self._thread.join()
        self.table.close()

    def turn(self) -> None:
        if self.killed:
            raise Killed
        self.world.idle.release()
        self._may_go.acquire()
        if self.killed:
            raise Killed

    def stepped(self, name: str, lot: int | None) -> None:
        """The real code has just done this."""
        pc = self.world.pc(self.number)
        extra = (
            (name == self._last and name.startswith(".r."))  # a word read twice in a row
            or (name == ".r.closed" and pc == "idle")  # claim(), before its filter
            or (name == ".r.recalled" and pc.startswith("write.lock"))  # while waiting: whether to give up
            or (name == ".r.epoch" and pc == "idle")  # valid() has seen one that differs and reads the rest
            or (name == ".r.holder" and pc == "idle")  # reap() looks for whom there is to reap
        )
        self.world.step(self.number, name, lot, missing_ok=extra)
        self._last = name
        self.world.compare()

    def locked(self, lot: int, got: bool) -> None:
        if self.world.pc(self.number) == "idle":
            self.world.step(self.number, "look", lot)
        if got:
            self.world.locks[lot] = self.number
            self.stepped(".lock", lot)
            return
        self._last = ""
        if self.world.pc(self.number).startswith(("claim", "release")):  # these pass over the lot, the others try again
            self.world.step(self.number, ".lock", lot)
        self.world.compare()


WHO = threading.local()


class _Clock:
    """Time that passes when somebody looks: now and then more than any deadline."""

    def __init__(self, seed: int) -> None:
        self._draw, self._now = random.Random(seed), 0.0

    def monotonic(self) -> float:
        self._now += self._draw.choice((0.001, 0.001, 0.001, 0.001, 2.0))
        return self._now

    def sleep(self, seconds: float) -> None:
        pass


@contextlib.contextmanager
def stepped_lending(seed: int) -> Any:
    """Gives lending.py a clock of its own, and each actor its own process id."""
    own_os = SimpleNamespace(
        **{name: getattr(os, name) for name in ("open", "close", "fstat", "ftruncate", "pwrite", "O_RDWR", "O_CLOEXEC")}
    )
    own_os.getpid = lambda: WHO.number
    clock = _Clock(seed)
    own_time = SimpleNamespace(monotonic=clock.monotonic, sleep=clock.sleep, time_ns=time.time_ns)
    before = lending.os, lending.time, lending._wait_for_end
    lending.os, lending.time = own_os, own_time  # type: ignore[assignment]
    lending._wait_for_end = lambda pid: WHO.world.landing.pop(pid, None)
    try:
        yield
    finally:
        lending.os, lending.time, lending._wait_for_end = before  # type: ignore[misc]
