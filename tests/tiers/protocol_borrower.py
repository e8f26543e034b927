"""The borrower's steps in the model: claim, write, read, release. Names of steps are `what.access`; see protocol.py."""

from __future__ import annotations

from typing import Any

from tests.tiers.protocol import Model, Step, Violation

Steps = dict[str, list[tuple[str, int, Step]]]


def steps(model: Model, b: int) -> Steps:
    """Program of borrower b. Its block lies in `lots`; k numbers them. All its fields are in one list at `me + ...`."""
    lots = model.scenario.lots_of(b)
    mutant, filtered = model.scenario.mutant, model.scenario.filtered
    last = len(lots) - 1
    closed, releases = model.at("closed"), model.at("releases")
    epoch, holder, writer, foreign, recalled, lock = (
        [model.at(name, lot) for lot in lots] for name in ("epoch", "holder", "writer", "foreign", "recalled", "lock")
    )
    cells = [model.at("cell", cell) for cell in model.scenario.halves(b)]
    PC, HALF, VERSION, WRITTEN = model.at(b, "pc"), model.at(b, "half0"), model.at(b, "version"), model.at(b, "written")
    LATE, RELEASED, BACK, HAS = (model.at(b, name) for name in ("late", "released", "back", "has"))
    MINE = [model.at(b, "epoch0"), model.at(b, "epoch1")]  # 0: this lot is not ours, as far as we know
    program: Steps = {}

    def on(pc: str, name: str, k: int, step: Step) -> None:
        program.setdefault(pc, []).append((name, lots[k], step))

    def go(s: list[Any], pc: str) -> bool:
        s[PC] = pc
        return True

    def idle(s: list[Any]) -> bool:
        s[HALF] = s[HALF + 1] = 0
        if s[RELEASED]:
            s[MINE[0]] = s[MINE[1]] = s[RELEASED] = s[WRITTEN] = 0
        return go(s, "idle")

    def test(pc: str, name: str, k: int, ok: Any, yes: str, no: str) -> None:
        """A step that reads one word and goes where it says."""
        on(pc, name, k, lambda s: go(s, yes if ok(s) else no))

    def take(s: list[Any], k: int, *, needed: bool = True) -> bool:
        """F_OFD_SETLK: at once or not at all."""
        if needed:
            if s[lock[k]]:
                return False
            s[lock[k]] = b
        return True

    def drop(s: list[Any], k: int) -> bool:
        if s[lock[k]] == b:
            s[lock[k]] = 0
        return True

    for k in range(len(lots)):
        # -------------------------------------------------------------- what was taken back is noticed (_Lender.lose)
        def notice(s: list[Any], k: int = k) -> bool:
            if not s[MINE[k]] or s[epoch[k]] == s[MINE[k]]:
                return False
            s[MINE[k]] = s[WRITTEN] = 0
            return True

        on("idle", "notice", k, notice)

        # -------------------------------------------------------------- claim(): one lot at a time
        def look(s: list[Any], k: int = k) -> bool:
            # if not self.closed: for lot in np.flatnonzero((self.epoch % 2 == 1) & (self.holder == 0)): out of date at each lot
            if filtered and (s[MINE[k]] or s[closed] or s[epoch[k]] % 2 == 0 or s[holder[k]]):
                return False
            return go(s, f"claim.lock{k}")

        def claim_lock(s: list[Any], k: int = k) -> bool:  # if not self._try_lock(lot): continue
            if not take(s, k, needed=mutant != "claim_without_lock"):
                return idle(s)
            return go(s, f"claim.epoch{k}")

        def hold(s: list[Any], k: int = k) -> bool:  # self.holder[lot] = number
            s[holder[k]] = b
            s[HAS] |= 1 << k
            return go(s, f"claim.got{k}")

        def got(s: list[Any], k: int = k) -> bool:  # epochs.append(int(self.epoch[lot]))
            if s[MINE[k]]:  # what was lost meanwhile comes back as something new
                s[WRITTEN] = 0
            s[MINE[k]] = s[epoch[k]]
            return go(s, f"claim.unlock{k}")

        on("idle", "look", k, look)
        on(f"claim.lock{k}", "claim.lock", k, claim_lock)
        out = f"claim.unlock{k}"
        # self.epoch[lot] % 2 and not self.holder[lot] and not self.writer[lot]; not self.recalled[lot]
        test(f"claim.epoch{k}", "claim.r.epoch", k, lambda s, k=k: s[epoch[k]] % 2, f"claim.holder{k}", out)
        test(f"claim.holder{k}", "claim.r.holder", k, lambda s, k=k: not s[holder[k]], f"claim.writer{k}", out)
        test(f"claim.writer{k}", "claim.r.writer", k, lambda s, k=k: not s[writer[k]], f"claim.recalled{k}", out)
        test(f"claim.recalled{k}", "claim.r.recalled", k, lambda s, k=k: not s[recalled[k]], f"claim.hold{k}", out)
        on(f"claim.hold{k}", "claim.w.holder", k, hold)
        on(f"claim.got{k}", "claim.r.epoch", k, got)
        on(out, "claim.unlock", k, lambda s, k=k: drop(s, k) and idle(s))

        # -------------------------------------------------------------- writing(): lot by lot, all locks are kept
        def write_lock(s: list[Any], k: int = k) -> bool:  # self._lock_for_write(lot, held)
            if not take(s, k, needed=mutant != "no_lock_around_write"):
                return False
            s[LATE] |= s[recalled[k]]
            return go(s, f"write.closed{k}" if mutant != "epoch_before_lock" else f"write.writer{k}")

        def give_up(s: list[Any], k: int = k) -> bool:  # the deadline has passed, or another lot is recalled
            return go(s, f"unmark{k - 1}.{k - 1}" if k else "idle")

        def spoil(s: list[Any], k: int = k) -> bool:  # self.foreign[lot] = 1
            s[foreign[k]] = 1
            return go(s, f"mark{k}")

        def mark(s: list[Any], k: int = k) -> bool:  # self.writer[lot] = os.getpid()
            s[writer[k]] = b
            return go(s, f"write.lock{k + 1}" if k < last else "copy0")

        fail = f"unlock{k}" if k == 0 else f"unmark{k - 1}.{k}"
        first = f"write.lock{k}"
        if mutant == "epoch_before_lock":  # the checks come first
            test(
                f"write.lock{k}", "write.r.epoch", k, lambda s, k=k: s[epoch[k]] == s[MINE[k]], f"write.early{k}", fail
            )
            test(f"write.early{k}", "write.r.holder", k, lambda s, k=k: s[holder[k]] == b, f"write.locks{k}", fail)
            first = f"write.locks{k}"
        on(first, "write.lock", k, write_lock)
        on(first, "write.give_up", k, give_up)
        # ours = not self.closed and int(self.epoch[lot]) == epoch and int(self.holder[lot]) == number
        test(f"write.closed{k}", "write.r.closed", k, lambda s: not s[closed], f"write.epoch{k}", fail)
        test(f"write.epoch{k}", "write.r.epoch", k, lambda s, k=k: s[epoch[k]] == s[MINE[k]], f"write.holder{k}", fail)
        test(f"write.holder{k}", "write.r.holder", k, lambda s, k=k: s[holder[k]] == b, f"write.writer{k}", fail)
        # if not ours or self.writer[lot] or self.recalled[lot]: break
        test(f"write.writer{k}", "write.r.writer", k, lambda s, k=k: not s[writer[k]], f"write.recalled{k}", fail)
        ignores = mutant == "no_recalled_flag"
        test(
            f"write.recalled{k}",
            "write.r.recalled",
            k,
            lambda s, k=k, ignores=ignores: ignores or not s[recalled[k]],
            f"spoil{k}",
            fail,
        )
        on(f"spoil{k}", "write.w.foreign", k, spoil)
        on(f"mark{k}", "write.w.writer", k, mark)

        # -------------------------------------------------------------- _let_go(held, marked), of the lots 0 .. k
        def unmark(s: list[Any], k: int, held: int) -> bool:  # self.writer[marked.pop()] = 0
            s[writer[k]] = 0
            return go(s, f"unmark{k - 1}.{held}" if k else f"unlock{held}")

        def unlock(s: list[Any], k: int = k) -> bool:  # self._unlock(held.pop())
            drop(s, k)
            s[LATE] = 0
            return go(s, f"unlock{k - 1}") if k else idle(s)

        for held in range(len(lots)):  # `held` is the last lot that is locked
            on(f"unmark{k}.{held}", "write.w.writer", k, lambda s, k=k, held=held, unmark=unmark: unmark(s, k, held))
        on(f"unlock{k}", "write.unlock", k, unlock)

        # -------------------------------------------------------------- release()
        def release_lock(s: list[Any], k: int = k) -> bool:  # if not self._try_lock(lot): continue
            return go(s, f"release.holder{k}" if take(s, k) else after_release(s, k))

        def raise_epoch(s: list[Any], k: int = k) -> bool:  # self.epoch[lot] += 2, read and written under the lock
            if mutant != "release_keeps_epoch":
                s[epoch[k]] += 2
            s[HAS] &= ~(1 << k)
            return go(s, f"release.free{k}")

        def free(s: list[Any], k: int = k) -> bool:  # self.holder[lot] = 0
            s[holder[k]] = 0
            return go(s, f"release.unlock{k}")

        def after_release(s: list[Any], k: int) -> str:
            return f"release.lock{k + 1}" if k < last else f"back{last}"

        on(f"release.lock{k}", "release.lock", k, release_lock)
        # if int(self.holder[lot]) == number:
        test(
            f"release.holder{k}",
            "release.r.holder",
            k,
            lambda s, k=k: s[holder[k]] == b,
            f"release.epoch{k}",
            f"release.unlock{k}",
        )
        test(f"release.epoch{k}", "release.r.epoch", k, lambda s: True, f"release.raise{k}", "")
        on(f"release.raise{k}", "release.w.epoch", k, raise_epoch)
        on(f"release.free{k}", "release.w.holder", k, free)

        def release_unlock(s: list[Any], k: int = k) -> bool:
            drop(s, k)
            if k < last:
                return go(s, f"release.lock{k + 1}")
            return come_back(s)

        on(f"release.unlock{k}", "release.unlock", k, release_unlock)

    def come_back(s: list[Any]) -> bool:
        back, s[BACK] = s[BACK], 0
        return go(s, back) if back else idle(s)

    on(f"back{last}", "release.end", 0, come_back)

    def begin_write(s: list[Any]) -> bool:
        if s[VERSION] >= model.scenario.writes or s[RELEASED] or not all(s[MINE[k]] for k in range(len(lots))):
            return False
        s[VERSION] += 1
        s[WRITTEN] = 0
        return go(s, "write.lock0")

    def copy(half: int) -> Step:
        def step(s: list[Any]) -> bool:  # mover.copy(target, block), in two pieces
            if s[HAS] != (1 << len(lots)) - 1:
                raise Violation(f"borrower {b} writes into a lot that it does not hold")
            if s[LATE]:
                raise Violation(
                    f"borrower {b} goes on with a lot that its lender was waiting for before: the lender starves"
                )
            model.copy(s, b, half)
            if half:
                s[WRITTEN] = 1
                return go(s, f"unmark{last}.{last}")
            return go(s, "copy1")

        return step

    def begin_release(s: list[Any]) -> bool:
        """By the engine's scheduler, at any time but in a write; a worker of the same engine may be reading."""
        if s[RELEASED] or s[releases] >= model.scenario.releases or not any(s[MINE[k]] for k in range(len(lots))):
            return False
        s[releases] += 1
        s[RELEASED] = 1
        s[BACK] = s[PC] if s[PC] != "idle" else 0
        return go(s, "release.lock0")

    def read(half: int) -> Step:
        def step(s: list[Any]) -> bool:  # mover.copy(block, source), in two pieces
            if not s[WRITTEN] or (s[PC] == "idle" and s[RELEASED]):
                return False
            s[HALF + half] = s[cells[half]]
            if half == 0:
                return go(s, "read1")
            return validated(s) if mutant == "no_comparison_after_read" else go(s, "valid.closed0")

        return step

    def validated(s: list[Any]) -> bool:
        if s[HALF] != 10 * b + s[VERSION] or s[HALF + 1] != s[HALF]:
            raise Violation(f"borrower {b} takes bytes {s[HALF]}, {s[HALF + 1]} for its own")
        return idle(s)

    def invalid(s: list[Any]) -> bool:
        s[WRITTEN] = 0
        return idle(s)

    on("idle", "write.begin", 0, begin_write)
    on("copy0", "write.copy", 0, copy(0))
    on("copy1", "write.copy", last, copy(1))
    on("idle", "read", 0, read(0))
    on("read1", "read", last, read(1))
    for pc in ("idle", "read1", "valid.closed0"):
        on(pc, "release.begin", 0, begin_release)
    # return not self.closed and bool((self.epoch[lots] == epochs).all())
    on("valid.closed0", "valid.r.closed", 0, lambda s: invalid(s) if s[closed] else go(s, "valid.epoch0"))
    for k in range(len(lots)):

        def compare(s: list[Any], k: int = k) -> bool:
            if s[epoch[k]] != s[MINE[k]]:
                return invalid(s)
            return go(s, f"valid.epoch{k + 1}") if k < last else validated(s)

        on(f"valid.epoch{k}", "valid.r.epoch", k, compare)
    return program
