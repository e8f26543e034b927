"""Leases: pages change hands under a numbered promise, the same for KV units and for segments of weights.

A grant is open from the moment its pages are booked to an engine until the engine says Grown, or returns them unmapped.
A recall is open until the engine has unmapped the pages and returned them. Until then the pages are the engine's, even
after the deadline: a page must not be reused before its last writer is known to be done (law 4). A deadline that passed
is counted and shown.

Numbers only rise within one broker, so a late answer to a closed lease is recognised and ignored.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal

from polder.broker.ledger import Ledger, Owner
from polder.broker.wire import Grant, Hello, Pages, Recall, Returned, Use
from polder.errors import ProtocolError

__all__ = ["Lease", "LeaseBook", "book", "pages_by_device", "units_in"]

Kind = Literal["grant", "recall"]


@dataclass(kw_only=True)
class Lease:
    number: int
    kind: Kind
    engine: str
    use: Use
    units: int
    deadline_at: float
    overdue: bool = False


@dataclass(kw_only=True)
class LeaseBook:
    """All open leases, and the pages that move under them. Times are seconds of the caller's clock."""

    ledger: Ledger
    deadline_s: float
    """Time that an engine has to return what is recalled."""
    overdue: int = 0
    """Recalls that ever passed their deadline."""
    _open: dict[int, Lease] = field(default_factory=dict)
    _next: int = 1
    _counts: Counter[tuple[Kind, Use]] = field(default_factory=Counter)

    def grant(self, hello: Hello, use: Use, units: int) -> Grant:
        """Books pages to an engine. Raises OutOfPages when too few are free."""
        pages = book(self.ledger, hello, use, units)
        return Grant(lease=self._add("grant", hello.engine, use, units), use=use, units=units, pages=pages)

    def recall(self, engine: str, use: Use, units: int, *, preempt: bool, now: float) -> Recall:
        number = self._add("recall", engine, use, units, deadline_at=now + self.deadline_s)
        return Recall(lease=number, use=use, units=units, deadline_s=self.deadline_s, preempt=preempt)

    def returned(self, hello: Hello, message: Returned) -> tuple[Lease | None, int]:
        """Frees what an engine returned. Gives the lease that this closes, if it was open, and the number of units.

        Raises ProtocolError, having changed nothing, unless all pages are the engine's, of that use, and make whole
        units.
        """
        units = units_in(hello, message.use, message.pages)
        self.ledger.give_all_back(Owner(hello.engine, message.use), pages_by_device(hello, message.pages))
        lease = self._open.get(message.lease)
        matches = lease is not None and lease.use == message.use
        return (self.close(message.lease, hello.engine) if matches else None), units

    def close(self, number: int, engine: str) -> Lease | None:
        """None when the lease is not open or not that engine's: a late or wrong answer."""
        lease = self._open.get(number)
        if lease is None or lease.engine != engine:
            return None
        return self._open.pop(number)

    def drop(self, engine: str) -> None:
        """Forgets an engine's leases: it died, or it reconnected and reported what it really holds."""
        self._open = {number: lease for number, lease in self._open.items() if lease.engine != engine}

    def units(self, engine: str, kind: Kind, use: Use) -> int:
        """Units of its open leases."""
        leases = self._open.values()
        return sum(lease.units for lease in leases if (lease.engine, lease.kind, lease.use) == (engine, kind, use))

    def is_overdue(self, engine: str) -> bool:
        return any(lease.overdue for lease in self._open.values() if lease.engine == engine)

    def mark_overdue(self, now: float) -> None:
        for lease in self._open.values():
            if not lease.overdue and now > lease.deadline_at:
                lease.overdue = True
                self.overdue += 1

    def count(self, kind: Kind, use: Use) -> int:
        """Leases ever opened."""
        return self._counts[kind, use]

    def _add(self, kind: Kind, engine: str, use: Use, units: int, deadline_at: float = float("inf")) -> int:
        number, self._next = self._next, self._next + 1
        self._counts[kind, use] += 1
        self._open[number] = Lease(
            number=number, kind=kind, engine=engine, use=use, units=units, deadline_at=deadline_at
        )
        return number


def book(ledger: Ledger, hello: Hello, use: Use, units: int) -> Pages:
    """Takes free pages of `units` units on every rank. Raises OutOfPages."""
    owner, size = Owner(hello.engine, use), units * hello.unit_pages(use)
    return [ledger.take(device, owner, size).tolist() for device in hello.devices]


def units_in(hello: Hello, use: Use, pages: Pages) -> int:
    """How many units these pages are. Raises ProtocolError unless they are as many whole units on every rank of the
    engine."""
    size = hello.unit_pages(use)
    counts = {len(numbers) for numbers in pages}
    if not any(counts):
        return 0
    if len(pages) != len(hello.devices) or len(counts) > 1 or not size or min(counts) % size:
        raise ProtocolError(f"{hello.engine}: not whole units of {size} pages for {use} on each rank")
    return min(counts) // size


def pages_by_device(hello: Hello, pages: Pages) -> dict[str, list[int]]:
    """The page numbers of all ranks, by device."""
    by_device: dict[str, list[int]] = {}
    for device, numbers in zip(hello.devices, pages, strict=False):
        by_device.setdefault(device, []).extend(numbers)
    return by_device
