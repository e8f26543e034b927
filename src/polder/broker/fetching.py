"""Which process may have handles of which pages, and whose table. The server sends what is allowed here."""

from __future__ import annotations

from polder.broker.ledger import Owner
from polder.broker.roster import HOST, Roster
from polder.broker.wire import Fetch, FetchTable, Refused
from polder.errors import ProtocolError

__all__ = ["check_fetch", "check_table", "fetchable"]


def check_fetch(roster: Roster, pid: int, message: Fetch) -> Refused | None:
    """Checks a worker's request and notes the worker as a process of the engine. Raises ProtocolError if it may never ask that."""
    engine = roster.engines.get(message.engine)
    if engine is None or not 0 <= message.rank < len(engine.hello.devices):
        raise ProtocolError(f"fetch for an unknown engine or rank: {message.engine!r} {message.rank}")
    if not message.lender and message.device not in (engine.hello.devices[message.rank], HOST):
        raise ProtocolError(f"rank {message.rank} of {message.engine} is not on {message.device}")
    engine.processes.add(pid)
    if fetchable(roster, message):
        return None
    if not message.lender:
        raise ProtocolError(f"{message.engine} fetches pages that it does not hold")
    # No fault of its own: the lender gave these pages back, or ended, while the message was on its way.
    return Refused(reason=f"{message.lender!r} does not lend these pages any more")


def fetchable(roster: Roster, message: Fetch) -> bool:
    """Whether the pages belong to whom the message says, so that their handles may be given out."""
    if message.device not in roster.ledger.devices:
        return False
    if message.lender:
        lender = roster.engines.get(message.lender)
        if lender is None or not lender.hello.table_bytes:
            return False
        owners = [lender.owner]
    elif message.device == HOST:
        owners = [Owner(message.engine, "lent")]
    else:
        owners = [Owner(message.engine, "kv"), Owner(message.engine, "weights")]
    theirs = [roster.ledger.pages_of(message.device, owner).tolist() for owner in owners]
    return set[int]().union(*theirs).issuperset(message.pages)


def check_table(roster: Roster, message: FetchTable) -> Refused | None:
    """Raises ProtocolError if an unknown engine asks."""
    lender = roster.engines.get(message.lender)
    if message.engine not in roster.engines:
        raise ProtocolError(f"table asked for by an unknown engine {message.engine!r}")
    if lender is None or not lender.hello.table_bytes or lender.core_ended_at is not None:
        return Refused(reason=f"{message.lender!r} lends nothing here")
    return None
