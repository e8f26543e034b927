"""Sizes by hand: pins an engine through its broker, for stages that test what a resize does."""

from __future__ import annotations

import time
from pathlib import Path

from polder.broker import client
from polder.broker.wire import EngineStatus, Resize, Status
from polder.errors import EnvironmentFault

__all__ = ["engine_status", "settle"]

SETTLE_TIMEOUT_S = 30.0
POLL_S = 0.004


def engine_status(status: Status, engine: str) -> EngineStatus:
    return next(one for one in status.engines if one.engine == engine)


def settle(broker: Path, engine: str, units: int) -> None:
    """Pins the engine and returns when it has `units`. Raises EnvironmentFault when it never does.

    Memory given back shows in the broker's books at once. Memory granted is booked before it is mapped, so a growing engine is
    waited for until it reports the growth, which it does within 50 ms of it.
    """
    before = engine_status(client.status(broker), engine)
    client.request(broker, Resize(engine=engine, units=units))
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while True:
        now = engine_status(client.status(broker), engine)
        grown = now.stats["grows_total"] > before.stats["grows_total"] or units <= before.held_units
        if now.held_units == units and grown:
            return
        if time.monotonic() > deadline:
            raise EnvironmentFault(f"{engine} holds {now.held_units} units and does not come to {units} ({now.reason})")
        time.sleep(POLL_S)
