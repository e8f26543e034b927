"""A lender's table comes by a thread: the engine waits for no broker, and no table is lost or taken for a later one."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import pytest

from polder.engines.vllm.core.own_table import OwnTable
from polder.errors import BrokerUnavailable, UsageError

pytestmark = pytest.mark.usefixtures("no_fd_leak")


class Broker:
    """Answers each question when the test says so."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.answers: list[Callable[[], int]] = []
        self.released = threading.Semaphore(0)
        self.given: list[int] = []
        self.woken = threading.Event()

    def fetch(self) -> int:
        self.asked.release()
        assert self.released.acquire(timeout=30)
        return self.answers.pop(0)()

    def answer(self, what: Callable[[], int]) -> None:
        self.answers.append(what)
        self.released.release()

    def table(self) -> int:
        self.given.append(os.memfd_create("table"))
        return self.given[-1]


def silence() -> int:
    raise BrokerUnavailable("no answer")


def refusal() -> int:
    raise UsageError("it lends nothing")


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "polder-own-table"]


def ended() -> None:
    for thread in threads():
        thread.join(30)


def test_the_engine_goes_on_while_the_broker_is_silent_and_gets_the_table_when_it_answers() -> None:
    broker = Broker()
    table = OwnTable(broker.fetch, broker.woken.set, retry_every_s=0.01)
    table.ask()
    assert broker.asked.acquire(timeout=30)
    assert table.take() is None, "the question is under way, and nobody waits for it"
    broker.answer(silence)
    assert broker.asked.acquire(timeout=30), "it is asked again"
    broker.answer(broker.table)
    assert broker.woken.wait(30)
    assert table.take() == broker.given[0]
    assert table.take() is None
    os.close(broker.given[0])
    ended()


def test_a_refusal_is_not_asked_again() -> None:
    broker = Broker()
    OwnTable(broker.fetch, broker.woken.set).ask()
    broker.answer(refusal)
    ended()
    assert not broker.woken.is_set()


@pytest.mark.parametrize("again", [True, False], ids=["asked again", "closed"])
def test_a_table_that_comes_too_late_is_closed(again: bool) -> None:
    broker = Broker()
    table = OwnTable(broker.fetch, broker.woken.set)
    table.ask()
    assert broker.asked.acquire(timeout=30)
    late = threads()
    if again:
        table.ask()
        assert broker.asked.acquire(timeout=30)
    else:
        table.close()
    broker.answer(broker.table)
    if again:
        broker.answer(broker.table)
        assert broker.woken.wait(30)
        ended()
        assert sum(map(is_open, set(broker.given))) == 1
        table.close()
    for thread in late:
        thread.join(30)
    ended()
    assert table.take() is None
    assert not any(is_open(fd) for fd in broker.given)
