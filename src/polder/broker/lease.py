"""Leases: every page that changes hands does so under a numbered promise with a deadline and an acknowledgement.

A grant is open from the moment its pages are booked to the engine until the engine says Grown (or gives them back unmapped).
A recall, of units or of segments of weights ("take"), is open until the engine has unmapped the pages and says so; until then
they are the engine's, whatever the deadline says: reusing a page before its last writer is known to be done would break law 4.
A deadline passed is therefore counted and shown (`overdue`), and the owner is served from the reserve meanwhile.

Numbers rise for ever within one broker (the epoch): a late answer to a closed lease is recognised and ignored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

__all__ = ["ASKED", "Lease", "LeaseBook", "LeaseStatistics"]

Kind = Literal["grant", "recall", "give", "take"]
"""Units of KV cache granted and recalled; segments of weights given and taken."""
ASKED: tuple[Kind, ...] = ("recall", "take")
"""Those by which an engine is asked to give something back."""


@dataclass(kw_only=True)
class Lease:
    number: int
    kind: Kind
    engine: str
    units: int
    """Units or segments."""
    opened_at: float
    deadline_at: float
    overdue: bool = False


@dataclass(frozen=True, kw_only=True)
class LeaseStatistics:
    grants: int
    recalls: int
    open: int
    overdue: int
    """Recalls, of units or segments, that ever passed their deadline."""


@dataclass(kw_only=True)
class LeaseBook:
    """All open leases. Times are seconds of the caller's clock."""

    _open: dict[int, Lease] = field(default_factory=dict)
    _next: int = 1
    _counts: dict[Kind, int] = field(default_factory=lambda: dict.fromkeys(get_args(Kind), 0))
    _overdue: int = 0

    def open(self, kind: Kind, engine: str, units: int, *, now: float, deadline_s: float) -> Lease:
        lease = Lease(
            number=self._next, kind=kind, engine=engine, units=units, opened_at=now, deadline_at=now + deadline_s
        )
        self._next += 1
        self._counts[kind] += 1
        self._open[lease.number] = lease
        return lease

    def acknowledge(self, number: int, engine: str) -> Lease | None:
        """Closes the lease. None when it is not open or not that engine's (a late or foreign answer)."""
        lease = self._open.get(number)
        if lease is None or lease.engine != engine:
            return None
        return self._open.pop(number)

    def drop(self, engine: str) -> None:
        """Forgets the engine's leases: it died, or it reconnected and reported what it really holds."""
        self._open = {number: lease for number, lease in self._open.items() if lease.engine != engine}

    def of(self, engine: str, kind: Kind) -> Iterator[Lease]:
        return (lease for lease in self._open.values() if lease.engine == engine and lease.kind == kind)

    def units(self, engine: str, kind: Kind) -> int:
        return sum(lease.units for lease in self.of(engine, kind))

    def mark_overdue(self, now: float) -> list[Lease]:
        """Recalls, of units or segments, whose deadline passed since the last call."""
        late = [
            lease
            for lease in self._open.values()
            if lease.kind in ASKED and not lease.overdue and now > lease.deadline_at
        ]
        for lease in late:
            lease.overdue = True
        self._overdue += len(late)
        return late

    def statistics(self) -> LeaseStatistics:
        return LeaseStatistics(
            grants=self._counts["grant"],
            recalls=self._counts["recall"],
            open=len(self._open),
            overdue=self._overdue,
        )
