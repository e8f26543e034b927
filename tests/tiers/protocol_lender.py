"""The lender's steps in the model: offer, take_back and then write, retire; and the broker's, which retires for a dead one."""

from __future__ import annotations

from typing import Any

from tests.tiers.protocol import LENDER, NEXT_OWNER, Model, Step, Violation

Steps = dict[str, list[tuple[str, int, Step]]]


def steps(model: Model) -> Steps:
    scenario, mutant = model.scenario, model.scenario.mutant
    closed = model.at("closed")
    PC, LOT, OFFERS, TODO, AFTER = (model.at("L", name) for name in ("pc", "lot", "offers", "todo", "after"))
    epoch, holder, writer, foreign, recalled, lock, own = (
        [model.at(name, lot) for lot in range(scenario.lots)]
        for name in ("epoch", "holder", "writer", "foreign", "recalled", "lock", "own")
    )
    cells = [[model.at("cell", c) for c, of in enumerate(scenario.cells) if of == lot] for lot in range(scenario.lots)]
    program: Steps = {}

    def on(pc: str, name: str, lot: int, step: Step) -> None:
        program.setdefault(pc, []).append((name, lot, step))

    def go(s: list[Any], pc: str) -> bool:
        s[PC] = pc
        return True

    def do(pc: str, name: str, step: Any, then: str) -> None:
        """A step on the lot at hand that is always possible."""

        def run(s: list[Any]) -> bool:
            step(s, s[LOT])
            return go(s, then)

        on(pc, name, -1, run)

    def take_lock(pc: str, name: str, then: str) -> None:
        def run(s: list[Any]) -> bool:  # self._lock(lot): until it is free; _kill_holders is "killed", at any time
            if s[lock[s[LOT]]]:
                return False
            s[lock[s[LOT]]] = LENDER
            return go(s, then)

        on(pc, name, -1, run)

    def put(array: list[int], value: int) -> Any:
        return lambda s, lot: s.__setitem__(array[lot], value)

    def nothing(s: list[Any], lot: int) -> None:
        pass

    # ------------------------------------------------------------------ offer(): with self._locked(lot)
    for lot in range(scenario.lots):

        def begin_offer(s: list[Any], lot: int = lot) -> bool:
            if s[OFFERS] >= scenario.offers:
                return False
            s[OFFERS] += 1
            s[LOT] = lot
            return go(s, "offer.lock")

        on("idle", "offer.begin", lot, begin_offer)
    take_lock("offer.lock", "offer.lock", "offer.test")

    def offer_test(s: list[Any]) -> bool:  # if not self.epoch[lot] % 2:
        return go(s, "offer.unlock" if s[epoch[s[LOT]]] % 2 else "offer.free")

    def offer_free(s: list[Any], lot: int) -> None:
        s[own[lot]] = 0
        s[holder[lot]] = 0

    def offer_raise(s: list[Any], lot: int) -> None:
        s[epoch[lot]] += 1

    on("offer.test", "offer.r.epoch", -1, offer_test)
    do("offer.free", "offer.w.holder", offer_free, "offer.read")  # self.holder[lot] = 0
    do("offer.read", "offer.r.epoch", nothing, "offer.raise")  # self.epoch[lot] += 1
    do("offer.raise", "offer.w.epoch", offer_raise, "offer.unlock")
    do("offer.unlock", "offer.unlock", put(lock, 0), "idle")

    # ------------------------------------------------------------------ take_back()
    for lot in range(scenario.lots):

        def begin_take(s: list[Any], lot: int = lot) -> bool:  # self.recalled[lot] = 1
            if s[own[lot]]:
                return False
            s[LOT] = lot
            s[recalled[lot]] = 1
            return go(s, "take.lock")

        on("idle", "take.w.recalled", lot, begin_take)

        # -------------------------------------------------------------- reap(): take_back(lot), offer([lot])
        def begin_reap(s: list[Any], lot: int = lot) -> bool:
            """Of any lot: the list of borrowers who live may be old, and the holder may have let go meanwhile."""
            if s[own[lot]] or s[OFFERS] >= scenario.offers:
                return False
            s[OFFERS] += 1
            s[AFTER] = "offer.lock"
            return go(s, f"reap{lot}")

        on("idle", "reap.begin", lot, begin_reap)
        on(f"reap{lot}", "take.w.recalled", lot, begin_take)

    def lower_epoch(s: list[Any], lot: int) -> None:  # self.epoch[lot] += self.epoch[lot] % 2
        if mutant == "epoch_goes_back":
            s[epoch[lot]] -= s[epoch[lot]] % 2
        elif mutant != "epoch_not_raised":
            s[epoch[lot]] += s[epoch[lot]] % 2
        for b in model.borrowers:
            if lot in scenario.lots_of(b):
                s[model.at(b, "has")] &= ~(1 << scenario.lots_of(b).index(lot))

    def look_for_dead(s: list[Any]) -> bool:  # self._bury(int(self.writer[lot]), lot)
        dead = s[writer[s[LOT]]]
        if dead and mutant != "dead_writer_ignored":
            s[model.at(dead, "landing")] = 0  # _wait_for_end(pid): its copies have ended
        return go(s, "take.bury" if dead else "take.read")

    def look_for_bytes(s: list[Any]) -> bool:  # foreign = bool(self.foreign[lot])
        told = s[holder[s[LOT]] if mutant == "told_by_holder" else foreign[s[LOT]]]
        if not s[AFTER]:
            s[AFTER] = "retire.next" if s[closed] else "zero" if told else "own0"
        return go(s, "take.writer")

    def returned(s: list[Any]) -> bool:
        lot = s[LOT]
        s[lock[lot]] = 0
        s[own[lot]] = 1
        after, s[AFTER] = s[AFTER], 0
        if after == "own0" and any(s[cell] >= 10 for cell in cells[lot]):
            raise Violation(f"the lender uses lot {lot} and does not know of a borrower's bytes in it")
        return go(s, after)

    take_lock("take.lock", "take.lock", "take.foreign")
    on("take.foreign", "take.r.foreign", -1, look_for_bytes)
    on("take.writer", "take.r.writer", -1, look_for_dead)
    do("take.bury", "take.w.writer", put(writer, 0), "take.read")  # if pid: self.writer[lot] = 0
    do("take.read", "take.r.epoch", nothing, "take.epoch")
    do("take.epoch", "take.w.epoch", lower_epoch, "take.free")
    do("take.free", "take.w.holder", put(holder, 0), "take.recalled")  # self.holder[lot] = 0
    do("take.recalled", "take.w.recalled", put(recalled, 0), "take.unlock")  # self.recalled[lot] = 0
    on("take.unlock", "take.unlock", -1, returned)

    def zero(s: list[Any], lot: int) -> None:  # take_dirty(): self._table.foreign[dirty] = 0, and the workers zero them
        s[foreign[lot]] = 0
        for cell in cells[lot]:
            s[cell] = LENDER

    do("zero", "zero.w.foreign", zero, "own0")
    for half in (0, 1):

        def write(s: list[Any], half: int = half) -> bool:  # the lender's model writes its own block there
            mine = cells[s[LOT]]
            if half < len(mine):
                s[mine[half]] = LENDER
            return go(s, "own1" if half == 0 and len(mine) > 1 else "idle")

        on(f"own{half}", "own.write", -1, write)

    # ------------------------------------------------------------------ retire(), by the lender or, when it is dead, the broker
    def close(s: list[Any]) -> bool:  # self._header[1] = 1
        s[closed] = 1
        s[OFFERS] = 0
        return go(s, "retire.look")

    def look(s: list[Any]) -> bool:  # for lot in np.flatnonzero(self.epoch % 2)
        s[TODO] = sum(1 << lot for lot in range(scenario.lots) if s[epoch[lot]] % 2)
        return go(s, "retire.next")

    def following(s: list[Any]) -> bool:
        todo = s[TODO]
        s[LOT] = 0
        if not todo:
            for lot in range(scenario.lots):
                s[own[lot]] = 1
            return go(s, "reuse")
        s[LOT] = (todo & -todo).bit_length() - 1
        s[TODO] = todo & (todo - 1)
        s[recalled[s[LOT]]] = 1  # self.recalled[lot] = 1
        return go(s, "take.lock")

    def reuse(s: list[Any]) -> bool:  # the pages are somebody else's now
        for lot in range(scenario.lots):
            for cell in cells[lot]:
                s[cell] = NEXT_OWNER
        return go(s, "gone")

    on("idle", "retire.begin", 0, lambda s: go(s, "close"))
    on("close", "retire.w.closed", 0, close)
    on("retire.look", "retire.look", 0, look)
    on("retire.next", "retire.next", 0, following)
    on("reuse", "reuse", 0, reuse)
    return program
