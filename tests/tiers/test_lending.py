"""The lending table between real processes that are killed and stopped."""

from __future__ import annotations

import ast
import mmap
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polder.errors import ProtocolError
from polder.tiers.peer import lending
from polder.tiers.peer.lending import LendingTable, LentGeometry, open_table, table_bytes
from tests.tiers.lending_processes import PAGE, owner_of, page_of

LOTS = 12
GEOMETRY = LentGeometry(
    blocks=LOTS, ranks=1, unit_blocks=1, unit_pages=1, page_bytes=PAGE, granules=1, granule_bytes=PAGE
)
REPOSITORY = Path(__file__).parents[2]


class Lent:
    """A table, one page a lot, and processes that borrow."""

    def __init__(self) -> None:
        self.table_fd, self.pages_fd = os.memfd_create("table"), os.memfd_create("pages")
        self.table = LendingTable.create(self.table_fd, GEOMETRY)
        os.ftruncate(self.pages_fd, LOTS * PAGE)
        self.pages = mmap.mmap(self.pages_fd, LOTS * PAGE)
        self.started: list[subprocess.Popen[str]] = []

    def start(self, role: str, *numbers: float) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.tiers.lending_processes", role, str(self.table_fd), str(self.pages_fd)]
            + [str(number) for number in numbers],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=(self.table_fd, self.pages_fd),
            cwd=REPOSITORY,
        )
        self.started.append(process)
        return process

    def page(self, lot: int) -> bytes:
        return self.pages[lot * PAGE : (lot + 1) * PAGE]

    def close(self) -> None:
        for process in self.started:
            process.kill()
            process.communicate()
        self.pages.close()
        self.table.close()
        os.close(self.table_fd)
        os.close(self.pages_fd)


@pytest.fixture
def lent(no_fd_leak: None) -> Iterator[Lent]:
    lent = Lent()
    yield lent
    lent.close()
    del lent.table


def told(process: subprocess.Popen[str]) -> object:
    assert process.stdout is not None
    line = process.stdout.readline()
    return ast.literal_eval(line) if line[:1] in "[0123456789" else line.strip()


def all_is_lent(lent: Lent) -> None:
    lent.table.offer(np.arange(LOTS))


def test_a_borrower_killed_in_mid_write_leaves_nothing_locked_and_writes_no_more(lent: Lent) -> None:
    all_is_lent(lent)
    process = lent.start("write_half_and_hang")
    lot = told(process)
    assert isinstance(lot, int)
    assert lent.table.writer[lot] == process.pid
    process.kill()
    assert lent.table.take_back(lot)
    assert lent.table.writer[lot] == 0
    own = page_of(7, 1)
    lent.pages[lot * PAGE : (lot + 1) * PAGE] = own
    time.sleep(0.05)
    assert lent.page(lot) == own


@pytest.mark.parametrize("role", ["write_half_and_hang", "claim_and_hang"])
def test_a_borrower_that_is_stopped_with_the_lock_is_killed(
    lent: Lent, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that has left no mark."""
    monkeypatch.setattr(lending, "RECALL_DEADLINE_S", 0.05)
    all_is_lent(lent)
    process = lent.start(role)
    lot = told(process)
    assert isinstance(lot, int)
    process.send_signal(signal.SIGSTOP)
    before = time.monotonic()
    assert lent.table.take_back(lot) == (role == "write_half_and_hang")
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert time.monotonic() - before >= 0.05
    assert lent.table.holder[lot] == 0
    assert lent.table.writer[lot] == 0


def test_a_block_of_a_dead_writer_is_waited_for_until_its_process_has_ended(lent: Lent) -> None:
    all_is_lent(lent)
    process = lent.start("die_slowly")
    lot = told(process)
    assert isinstance(lot, int)
    assert process.stdin is not None
    taken: list[bool] = []
    lender = threading.Thread(target=lambda: taken.append(lent.table.take_back(lot)))
    lender.start()
    lender.join(0.3)
    assert not taken, "its copy may still land"
    process.stdin.write("\n")
    process.stdin.flush()
    lender.join(30.0)
    assert taken == [True]
    own = page_of(7, 1)
    lent.pages[lot * PAGE : (lot + 1) * PAGE] = own
    assert process.wait(timeout=10) == 0
    assert lent.page(lot) == own
    assert lent.table.writer[lot] == 0


def test_a_mark_whose_number_belongs_to_another_process_by_now_holds_nobody_up(lent: Lent) -> None:
    all_is_lent(lent)
    bystander = lent.start("lend")
    told(bystander)
    lots, _ = lent.table.claim(41, 1)
    lent.table.writer[lots] = bystander.pid
    before = time.monotonic()
    lent.table.take_back(int(lots[0]))
    assert time.monotonic() - before < 1.0


def test_only_who_has_the_lock_is_killed(lent: Lent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mark may be older than its process's number."""
    monkeypatch.setattr(lending, "RECALL_DEADLINE_S", 0.05)
    all_is_lent(lent)
    process, bystander = lent.start("claim_and_hang"), lent.start("lend")
    lot = told(process)
    told(bystander)
    assert isinstance(lot, int)
    lent.table.writer[lot] = bystander.pid
    lent.table.take_back(lot)
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert bystander.poll() is None


def test_a_read_from_a_lender_that_died_meanwhile_is_invalid(lent: Lent) -> None:
    lender = lent.start("lend")
    assert told(lender) == "offered"
    lots, epochs = lent.table.claim(os.getpid(), 3)
    with lent.table.writing(os.getpid(), lots.tolist(), epochs.tolist()) as ours:
        assert ours
    assert lent.table.valid(lots, epochs)
    lender.kill()
    lender.wait()
    broker = LendingTable(lent.table_fd)
    broker.retire()
    broker.close()
    assert lent.table.closed
    assert not lent.table.valid(lots, epochs)
    with lent.table.writing(os.getpid(), lots.tolist(), epochs.tolist()) as ours:
        assert not ours
    assert not len(lent.table.claim(os.getpid(), 1)[0])
    lent.table.check_integrity()


def test_borrowers_that_race_never_share_a_lot(lent: Lent) -> None:
    racers = [lent.start("claim_all") for _ in range(3)]
    for racer in racers:
        assert told(racer) == "ready"
    all_is_lent(lent)
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    claimed = [lot for racer in racers for lot in told(racer)]  # type: ignore[attr-defined]
    assert sorted(claimed) == list(range(LOTS))
    by_number = {racer.pid: 0 for racer in racers}
    for holder in lent.table.holder.tolist():
        by_number[holder] += 1
    assert sum(by_number.values()) == LOTS


def test_random_lives_of_three_processes_never_mix_bytes(lent: Lent) -> None:
    """One lends and takes back, two borrow; every page is one whole block of somebody, and of the right one."""
    all_is_lent(lent)
    draw, own, foreign, taken = random.Random(5), dict[int, int](), 0, 0
    borrowers = [lent.start("live", 1 + i, i, 2.0) for i in range(2)]
    while any(borrower.poll() is None for borrower in borrowers):
        lot = draw.randrange(LOTS)
        if lot in own:
            foreign += owner_of(lent.page(lot)) != (9, own.pop(lot))
            lent.table.offer(np.array([lot]))
        else:
            lent.table.take_back(lot)
            taken += 1
            own[lot] = taken
            lent.pages[lot * PAGE : (lot + 1) * PAGE] = page_of(9, taken)
        for mine, serial in own.items():
            foreign += owner_of(lent.page(mine)) != (9, serial)
        if draw.random() < 0.05:
            time.sleep(0.002)
    assert foreign == 0
    assert taken > 20
    for borrower in borrowers:
        wrong, right, _, written = told(borrower)  # type: ignore[misc]
        assert wrong == 0
        assert right > 20
        assert written > 20
    lent.table.check_integrity()


def test_lots_of_borrowers_that_are_gone_are_offered_again_and_their_epochs_are_new(lent: Lent) -> None:
    all_is_lent(lent)
    lots, epochs = lent.table.claim(41, 2)
    others, other_epochs = lent.table.claim(42, 2)
    assert lent.table.reap([42]) == 2
    assert not lent.table.valid(lots, epochs)
    assert lent.table.valid(others, other_epochs)
    again, new_epochs = lent.table.claim(43, 2)
    assert again.tolist() == lots.tolist()
    assert (new_epochs > epochs).all()


def test_offering_what_is_borrowed_takes_it_from_nobody(lent: Lent) -> None:
    all_is_lent(lent)
    lots, epochs = lent.table.claim(41, LOTS)
    all_is_lent(lent)
    assert lent.table.valid(lots, epochs)
    assert not len(lent.table.claim(42, 1)[0])


def test_a_read_is_invalid_when_its_lots_are_released(lent: Lent) -> None:
    all_is_lent(lent)
    lots, epochs = lent.table.claim(41, 2)
    lent.table.release(41, lots)
    assert not lent.table.valid(lots, epochs)
    assert lent.table.claim(42, 2)[0].tolist() == lots.tolist()


@pytest.mark.parametrize("who", ["lender", "borrower", "broker"])
def test_the_lender_knows_what_was_written_whoever_has_let_go_of_it(lent: Lent, who: str) -> None:
    """And only that: what was claimed and not written holds the lender's own bytes."""
    all_is_lent(lent)
    lots, epochs = lent.table.claim(41, 2)
    with lent.table.writing(41, lots[:1].tolist(), epochs[:1].tolist()) as ours:
        assert ours
    other = LendingTable(lent.table_fd)
    if who == "lender":
        assert lent.table.reap([]) == 2
    elif who == "borrower":
        other.release(41, lots)
    else:
        other.retire()
    other.close()
    assert not lent.table.holder.any()
    assert [lent.table.take_back(lot) for lot in lots.tolist()] == [True, False]


def test_all_views_of_one_table_and_of_no_other_have_its_identity(lent: Lent) -> None:
    fd = os.memfd_create("next")
    following, view = LendingTable.create(fd, GEOMETRY), LendingTable(lent.table_fd)
    assert view.identity == lent.table.identity != following.identity
    following.close()
    view.close()
    os.close(fd)


def test_taking_back_locks_and_unlocks_once(lent: Lent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its cost in a step of the lender's scheduler: two system calls."""
    calls: list[str] = []
    for name in ("_try_lock", "_unlock"):
        real = getattr(LendingTable, name)
        monkeypatch.setattr(
            LendingTable, name, lambda table, lot, name=name, real=real: (calls.append(name), real(table, lot))[1]
        )
    all_is_lent(lent)
    lent.table.claim(41, LOTS)
    calls.clear()
    for lot in range(LOTS):
        lent.table.take_back(lot)
    assert calls == ["_try_lock", "_unlock"] * LOTS


def malformed() -> dict[str, bytes]:
    fd = os.memfd_create("good")
    LendingTable.create(fd, GEOMETRY).close()
    good = os.pread(fd, table_bytes(GEOMETRY), 0)
    os.close(fd)

    def with_field(at: int, value: int) -> bytes:
        return good[: 8 * at] + value.to_bytes(8, "little") + good[8 * at + 8 :]

    return {
        "empty": b"",
        "a header cut short": good[:100],
        "another magic": with_field(0, 7),
        "cut short": good[:-64],
        "no lots": with_field(2, 0),
        "no lots in a unit": with_field(4, 0),
        "half a unit": with_field(4, 5),
        "more lots than bytes": with_field(2, 1 << 40),
        "more than can be counted": with_field(2, (1 << 64) - 1),
        "as many granules as overflow": with_field(7, 1 << 61),
        "no granules": with_field(7, 0),
    }


@pytest.mark.parametrize("what", malformed())
@pytest.mark.usefixtures("no_fd_leak")
def test_what_is_no_table_is_refused(what: str) -> None:
    fd = os.memfd_create("bad")
    os.pwrite(fd, malformed()[what], 0)
    with pytest.raises(ProtocolError):
        open_table(fd)
