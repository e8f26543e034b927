"""A broker that is stopped costs blocks and no time: one question without an answer, then misses at once, until it runs again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polder.broker.client import fetch_table, status
from polder.broker.wire import FetchTable
from polder.errors import BrokerUnavailable, PolderError, UsageError
from polder.memory.cpu import CpuBackend
from polder.tiers import worker as transfer
from polder.tiers.host import HostMemory
from polder.tiers.jobs import Job, Mover, Part, Pieces
from polder.tiers.movers import CpuMover
from polder.tiers.peer.borrowing import ChunkGeometry
from polder.tiers.peer.circuit_breaker import ASK_TIMEOUT_S, CircuitBreaker
from polder.tiers.peer.lending import open_table
from polder.tiers.peer.memory import Lent, PeerMemory
from polder.tiers.slots import LentChunks
from polder.tiers.worker import TierWorker
from tests.serve.fakes import wait_for
from tests.tiers.fakes import ids_of

ROWS, BYTES = 32, 512


@pytest.fixture
def broker(short_dir: Path) -> Iterator[tuple[Path, int]]:
    """A real broker in a process of its own: its socket and its process id."""
    socket = short_dir / "b"
    command = [
        *(sys.executable, "-m", "polder.cli.main", "broker"),
        *("--socket", str(socket), "--device", "cpu:0=4MiB"),
    ]
    process = subprocess.Popen(command)

    def answers() -> bool:
        try:
            status(socket)
        except BrokerUnavailable:
            return False
        return True

    try:
        wait_for(answers, "the broker")
        yield socket, process.pid
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(60)


def job(number: int, rows: int = ROWS, lender: str = "b") -> Job:
    numbers = np.arange(rows)
    chunks = np.zeros((rows, 1, 1), dtype=np.int64)
    lent = LentChunks(lender=lender, table=1, chunks=chunks, epochs=chunks)
    part = Part(tier=0, rows=numbers, blocks=numbers, slots=numbers, ids=ids_of(range(rows)), lent=lent)
    return Job(number=number, direction="store", parts=(part,))


def test_a_stopped_broker_costs_one_question_and_every_row_is_a_miss(broker: tuple[Path, int]) -> None:
    socket, pid = broker
    asked: list[float] = []
    reach = CircuitBreaker(lambda: status(socket, timeout_s=ASK_TIMEOUT_S), probe_every_s=0.05)

    def open_lender(name: str) -> Lent:
        def question() -> int:
            asked.append(time.monotonic())
            return fetch_table(socket, FetchTable(engine="a", lender=name), timeout_s=ASK_TIMEOUT_S)

        table = open_table(reach.ask(question))
        return Lent(table=table, cut=ChunkGeometry.of(table.geometry, BYTES), generation=0, fetch=lambda *_: None)

    backend = CpuBackend(page_bytes=4096)
    lanes = [PeerMemory(number=1, rank=0, backend=backend, open_lender=open_lender) for _ in range(2)]
    worker = TierWorker({(0, "store"): lanes[0], (0, "load"): lanes[1]}, CpuMover(), seed=1, capacities={0: ROWS})
    block: Pieces = [(np.zeros(BYTES, dtype=np.uint8).ctypes.data, BYTES)]
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    for number, lender in enumerate(["b", "c", "b"]):
        worker.submit(job(number, lender=lender), [block] * ROWS)
    worker.wait_all()
    took = time.monotonic() - started
    found = worker.poll()
    assert [set(finished.failed.values()) for finished in found] == [{"error"}] * 3
    assert all(len(finished.failed) == ROWS for finished in found)
    assert len(asked) == 1, "every other row fails without a question"
    assert took < ROWS * ASK_TIMEOUT_S / 2
    assert not reach.answers

    os.kill(pid, signal.SIGCONT)
    wait_for(lambda: reach.answers, "the broker to be found again")
    with pytest.raises(PolderError):  # it knows no engine "a"
        lanes[1]._mirror("b", 1)
    assert len(asked) == 2, "it is asked again"
    worker.close()
    reach.close()
    backend.close()


def test_a_lender_that_is_refused_is_not_asked_for_again_at_once() -> None:
    asked = []

    def open_lender(name: str) -> Lent:
        asked.append(name)
        raise UsageError(f"{name} lends nothing")

    backend = CpuBackend(page_bytes=4096)
    memory = PeerMemory(number=1, rank=0, backend=backend, open_lender=open_lender)
    for name in "bbbcbc":
        with pytest.raises(PolderError):
            memory._mirror(name, 1)
    assert asked == ["b", "c"]
    backend.close()


def test_who_waits_for_jobs_waits_for_the_row_that_is_copied_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_PATIENCE_S", 0.05)
    go_on, begun = threading.Event(), threading.Event()
    stored: list[int] = []

    class Slow(HostMemory):
        def store(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
            begun.set()
            go_on.wait(60.0)
            stored.append(row)
            return super().store(part, row, block, mover)

    region, kv = np.zeros(ROWS * BYTES, dtype=np.uint8), np.ones(BYTES, dtype=np.uint8)
    worker = TierWorker({(0, "store"): Slow(region.ctypes.data, BYTES)}, CpuMover(), seed=1, capacities={0: ROWS})
    block: Pieces = [(kv.ctypes.data, BYTES)]
    for number in (1, 2):
        worker.submit(job(number), [block] * ROWS)
    assert begun.wait(60.0)
    worker.wait([2])  # its lane is held by another job: nothing of it was begun
    waiter = threading.Thread(target=worker.wait, args=([1],))
    waiter.start()
    wait_for(lambda: worker._open[1].cut_short, "the patience to end")
    assert waiter.is_alive(), "a row under way is waited for: its source must stay"
    go_on.set()
    waiter.join(60.0)
    found = {finished.number: finished for finished in worker.poll()}
    assert stored == [0]
    assert set(found[1].failed) == set(range(1, ROWS))
    assert set(found[2].failed) == set(range(ROWS))
    worker.close()
