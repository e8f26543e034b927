"""What the actors of lockstep.py do: random lives of a lender and of borrowers, in calls of the real table."""

from __future__ import annotations

import numpy as np

from tests.tiers.lockstep import Actor, World
from tests.tiers.protocol import LENDER, NEXT_OWNER


class Lender(Actor):
    def __init__(self, world: World, number: int, *, broker: bool = False) -> None:
        self.broker, self.reaping = broker, False
        super().__init__(world, number)

    def life(self) -> None:
        world, lots = self.world, self.world.model.scenario.lots
        lent: set[int] = set()
        while not self.broker and world.draw.random() > 0.02:
            lot = world.draw.randrange(lots)
            if world.draw.random() < 0.3 + 0.4 * (lot not in lent):
                self.turn()
                world.step(LENDER, "offer.begin", lot)
                self.table.offer(np.array([lot]))
                lent.add(lot)
            elif lot in lent and world.draw.random() < 0.2:
                self.reaping = True
                self.table.reap([b for b in world.model.borrowers if world.draw.random() < 0.5])
                self.reaping = False
            elif lot in lent:
                foreign = self.table.take_back(lot)
                lent.discard(lot)
                if foreign:
                    self.table.foreign[lot] = 0
                for cell, of in enumerate(world.model.scenario.cells):
                    if of == lot:
                        self.turn()
                        world.cells[cell] = LENDER
                        self.stepped("own.write", lot)
        self.turn()
        if not self.broker:
            world.step(LENDER, "retire.begin", 0)
        self.table.retire()
        self.turn()
        world.step(LENDER, "retire.next", 0)
        world.cells = [NEXT_OWNER] * len(world.cells)
        self.stepped("reuse", 0)

    def stepped(self, name: str, lot: int | None) -> None:
        if name == ".w.recalled" and self.reaping and self.world.pc(LENDER) == "idle":
            self.world.step(LENDER, "reap.begin", lot)
        elif name == ".w.recalled" and self.world.pc(LENDER) == "retire.next":
            name, lot = "retire.next", None
        if name == ".w.foreign":  # zeroed with it
            self.world.cells = [
                LENDER if of == lot else cell
                for cell, of in zip(self.world.cells, self.world.model.scenario.cells, strict=True)
            ]
        super().stepped(name, lot)
        if name == ".w.closed":
            self.world.step(LENDER, "retire.look", 0)


class Borrower(Actor):
    """Does what PeerSlots and PeerMemory do, and ends when it has looked at a closed table."""

    def life(self) -> None:
        world, me = self.world, self.number
        self.lots = world.model.scenario.lots_of(me)
        self.mine: dict[int, int] = {}
        self.written = self.released = False
        while not self.world.plain.closed:
            self.turn()
            actions = [self.claim, self.notice]
            version = world.state[world.model.at(me, "version")]
            if len(self.mine) == len(self.lots) and version < world.model.scenario.writes:
                actions += [self.write] * 3
            if self.written:
                actions += [self.read] * 3
            if self.mine and world.draw.random() < 0.1:
                actions.append(self.release)
            world.draw.choice(actions)()

    def claim(self) -> None:
        lots, epochs = self.table.claim(self.number, 1)
        for lot, epoch in zip(lots.tolist(), epochs.tolist(), strict=True):
            if lot in self.mine:
                self.written = False
            self.mine[lot] = epoch

    def notice(self) -> None:
        for lot in list(self.mine):
            self.turn()
            if int(self.world.plain.epoch[lot]) != self.mine[lot]:
                del self.mine[lot]
                self.written = False
                self.stepped("notice", lot)

    def write(self) -> None:
        world, lots = self.world, sorted(self.mine)
        world.step(self.number, "write.begin", self.lots[0])
        self.written = False
        version = world.state[world.model.at(self.number, "version")]
        with self.table.writing(self.number, lots, [self.mine[lot] for lot in lots]) as ours:
            if ours:
                for half, cell in enumerate(world.model.scenario.halves(self.number)):
                    self.turn()
                    world.cells[cell] = 10 * self.number + version
                    self.stepped("write.copy", world.model.scenario.blocks[self.number - 1][half])
                self.written = True

    def read(self) -> None:
        world = self.world
        for half in range(2):
            self.turn()
            self.stepped("read", self.lots[0] if half == 0 else self.lots[-1])
            if world.draw.random() < 0.1 and not self.released:
                self.release_amid_read()
        lots = np.array(self.lots)
        valid = self.table.valid(lots, np.array([self.mine[lot] for lot in self.lots]))
        self.written = valid and not self.released
        self.after_release()

    def release(self) -> None:
        self.release_amid_read()
        self.after_release()

    def release_amid_read(self) -> None:
        self.released = True
        self.world.step(self.number, "release.begin", self.lots[0])
        self.table.release(self.number, np.array(self.lots))
        self.world.step(self.number, "release.end", self.lots[0], missing_ok=True)

    def after_release(self) -> None:
        if self.released:
            self.released = self.written = False
            self.mine = {}
