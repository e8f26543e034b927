"""Leases: every promise is closed once, by the engine that it was made to; a passed deadline is counted once and frees
nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from polder.broker.config import BrokerConfig
from polder.broker.core import BrokerCore
from polder.broker.lease import LeaseBook
from polder.broker.ledger import Ledger
from polder.broker.policy import PolicyConfig
from polder.broker.wire import USES, Demand, Recall, Returned, Use
from tests.broker.test_server import PAGE, hello

A = hello("a", layers=4, layer_pages=3)


def empty_book() -> LeaseBook:
    return LeaseBook(ledger=Ledger({"cpu:0": 64}), deadline_s=0.2)


@pytest.mark.parametrize("use", USES)
def test_an_answer_closes_its_lease_once_and_only_for_its_engine(use: Use) -> None:
    book = empty_book()
    grant = book.grant(A, use, 3)
    assert book.close(grant.lease, "b") is None
    lease = book.close(grant.lease, "a")
    assert lease is not None
    assert (lease.kind, lease.use, lease.units) == ("grant", use, 3)
    assert book.close(grant.lease, "a") is None, "a late answer is recognised"


@pytest.mark.parametrize("use", USES)
def test_only_pages_of_the_recalled_use_answer_a_recall(use: Use) -> None:
    book = empty_book()
    pages = {each: book.grant(A, each, 2).pages for each in USES}
    recall = book.recall("a", use, 2, preempt=False, now=0.0)
    other: Use = "weights" if use == "kv" else "kv"
    assert book.returned(A, Returned(lease=recall.lease, use=other, pages=pages[other])) == (None, 2)
    assert book.units("a", "recall", use) == 2
    lease, units = book.returned(A, Returned(lease=recall.lease, use=use, pages=pages[use]))
    assert lease is not None
    assert units == 2
    assert book.ledger.free("cpu:0") == 64


def test_numbers_are_never_used_again() -> None:
    book, numbers = empty_book(), []
    for _ in range(5):
        numbers.append(book.grant(A, "kv", 1).lease)
        book.drop("a")
    assert numbers == sorted(set(numbers))
    assert book.units("a", "grant", "kv") == 0


def test_a_recall_is_overdue_once_and_a_grant_never() -> None:
    book = empty_book()
    book.grant(A, "kv", 1)
    book.recall("a", "weights", 1, preempt=False, now=0.0)
    for now, overdue in ((0.1, 0), (0.3, 1), (0.4, 1)):
        book.mark_overdue(now)
        assert (book.overdue, book.is_overdue("a")) == (overdue, bool(overdue))


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
