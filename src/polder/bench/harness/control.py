"""Orders to engines through their broker: sizes, sleep, wakes, segments of weights."""

from __future__ import annotations

import time
from pathlib import Path

from polder.broker import client
from polder.broker.wire import EngineStatus, Resize, Sleep, Stream, Wake
from polder.errors import EnvironmentFault

__all__ = ["Order", "engine_status", "obeyed"]

Order = Resize | Sleep | Stream | Wake
SETTLE_TIMEOUT_S = 30.0
POLL_S = 0.004


def engine_status(broker: Path, engine: str, *, after_s: float = 0.0) -> EngineStatus:
    """The engine's status in `after_s` seconds."""
    time.sleep(after_s)
    return next(one for one in client.status(broker).engines if one.engine == engine)


def obeyed(broker: Path, order: Order) -> EngineStatus:
    """Gives the order and returns when the engine has carried it out. Raises EnvironmentFault when it never does."""
    before, deadline = engine_status(broker, order.engine), time.monotonic() + SETTLE_TIMEOUT_S
    client.request(broker, order)
    while not _carried_out(order, before, now := engine_status(broker, order.engine)):
        if time.monotonic() > deadline:
            reason = now.reason or now.weights_reason
            holds = f"{now.held_units} units and {now.segments} layers"
            raise EnvironmentFault(f"{order.engine} does not carry out {order}: it holds {holds} ({reason})")
        time.sleep(POLL_S)
    return now


def _carried_out(order: Order, before: EngineStatus, now: EngineStatus) -> bool:
    match order:
        case Resize(units=units):
            # The broker's books show returned memory at once. They show granted memory before it is mapped, so a growing
            # engine is awaited until it reports the growth, within 50 ms of it.
            grown = now.stats["grows_total"] > before.stats["grows_total"] or units <= before.held_units
            return now.held_units == units and grown
        case Stream(segments=segments):
            return now.segments == segments
        case Sleep():
            return now.asleep
        case Wake():
            return now.segments == now.layers
