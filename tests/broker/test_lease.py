"""Leases: every promise is closed once, by whom it was made to; a deadline passed is counted once and takes nothing away."""

from __future__ import annotations

from pathlib import Path

from polder.broker.config import BrokerConfig
from polder.broker.core import BrokerCore
from polder.broker.lease import LeaseBook
from polder.broker.policy import PolicyConfig
from polder.broker.wire import Demand, Recall
from tests.broker.test_server import PAGE, hello


def test_an_answer_closes_its_lease_once_and_only_for_its_engine() -> None:
    book = LeaseBook()
    lease = book.open("recall", "a", 3, now=0.0, deadline_s=1.0)
    assert book.acknowledge(lease.number, "b") is None
    assert book.acknowledge(lease.number, "a") is lease
    assert book.acknowledge(lease.number, "a") is None, "a late answer is recognised"


def test_numbers_are_never_used_again() -> None:
    book = LeaseBook()
    numbers = []
    for _ in range(5):
        numbers.append(book.open("grant", "a", 1, now=0.0, deadline_s=1.0).number)
        book.drop("a")
    assert numbers == sorted(set(numbers))
    assert book.units("a", "grant") == 0


def test_a_recall_is_overdue_once() -> None:
    book = LeaseBook()
    book.open("recall", "a", 1, now=0.0, deadline_s=0.2)
    book.open("grant", "a", 1, now=0.0, deadline_s=0.2)
    assert [len(book.mark_overdue(now)) for now in (0.1, 0.3, 0.4)] == [0, 1, 0]
    assert book.statistics().overdue == 1


def test_an_overdue_borrower_is_shown_and_keeps_its_pages_until_it_returns_them() -> None:
    config = BrokerConfig(
        socket=Path("unused"), devices={"cpu:0": 64 * PAGE}, page_bytes=PAGE, policy=PolicyConfig(deadline_s=0.2)
    )
    core = BrokerCore(config=config, generation=1, started_at=0.0)
    core.handle(1, 101, hello("a"), 0.0)
    core.handle(2, 102, hello("b"), 0.0)
    need = {"held_units": 3, "waiting_units": 0, "cached_units": 3, "curve": [], "urgent": True}
    core.handle(1, 101, Demand(busy_units=26, peak_units=26, **need), 0.1)  # type: ignore[arg-type]
    core.handle(2, 102, Demand(busy_units=16, peak_units=16, **need), 0.2)  # type: ignore[arg-type]
    assert any(isinstance(message, Recall) for _, message in core.outbox)
    core.plan(1.0)
    status = {engine.engine: engine for engine in core.status(1.0).engines}
    assert status["a"].state == "overdue"
    assert core.status(1.0).overdue == 1
    held = core.status(1.0).devices[0].pages_by_owner["a/kv"]
    core.plan(60.0)
    assert core.status(60.0).devices[0].pages_by_owner["a/kv"] == held, (
        "nobody else gets a page that may still be written"
    )
    core.check_integrity()
