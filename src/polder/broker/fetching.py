"""Which process may have handles of which pages, and which table. The server sends what these functions allow."""

from __future__ import annotations

from polder.broker.ledger import Owner
from polder.broker.roster import HOST, Roster
from polder.broker.wire import Fetch, FetchTable, Refused
from polder.errors import ProtocolError

__all__ = ["check_fetch", "check_table"]


def check_fetch(roster: Roster, pid: int, message: Fetch) -> Refused | None:
    """None: the handles may be sent. Notes the worker as a process of its engine.

    Raises ProtocolError for a request that is never allowed.
    """
    engine = roster.engines.get(message.engine)
    if engine is None or not 0 <= message.rank < len(engine.hello.devices):
        raise ProtocolError(f"fetch for an unknown engine or rank: {message.engine!r} {message.rank}")
    if not message.lender and message.device not in (engine.hello.devices[message.rank], HOST):
        raise ProtocolError(f"rank {message.rank} of {message.engine} is not on {message.device}")
    engine.processes.add(pid)
    if _all_owned(roster, message):
        return None
    if not message.lender:
        raise ProtocolError(f"{message.engine} fetches pages that it does not hold")
    # No mistake of the borrower: the lender gave these pages back, or ended, while the message was on its way.
    return Refused(reason=f"{message.lender!r} does not lend these pages any more")


def _all_owned(roster: Roster, message: Fetch) -> bool:
    """Whether all pages belong to the engine, or to the lender, that the message names."""
    if message.device not in roster.ledger.devices:
        return False
    if message.lender:
        lender = roster.engines.get(message.lender)
        if lender is None or not lender.hello.table_bytes:
            return False
        owners = [Owner(message.lender, "kv")]
    elif message.device == HOST:
        owners = [Owner(message.engine, "lent")]
    else:
        owners = [Owner(message.engine, "kv"), Owner(message.engine, "weights")]
    owned = [roster.ledger.pages_of(message.device, owner).tolist() for owner in owners]
    return set[int]().union(*owned).issuperset(message.pages)


def check_table(roster: Roster, message: FetchTable) -> Refused | None:
    """None: the table may be sent. Raises ProtocolError if an unknown engine asks."""
    lender = roster.engines.get(message.lender)
    if message.engine not in roster.engines:
        raise ProtocolError(f"table asked for by an unknown engine {message.engine!r}")
    if lender is None or not lender.hello.table_bytes or not lender.alive:
        return Refused(reason=f"{message.lender!r} lends nothing here")
    return None
