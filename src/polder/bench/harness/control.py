"""Orders to engines through their broker, and what engines count: sizes, sleep, wakes, segments of weights."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from polder.broker import client
from polder.broker.wire import EngineStatus, Resize, Sleep, Status, Stream, Wake
from polder.errors import EnvironmentFault

__all__ = [
    *("REPORT_S", "WEIGHT_COUNTERS", "WeightCounts", "engine_status", "engine_status_soon", "hold", "moved"),
    *("put_to_sleep", "resize", "wake", "weight_counts"),
]

SETTLE_TIMEOUT_S = 30.0
POLL_S = 0.004
REPORT_S = 1.3
"""Engines ask their workers for figures once a second."""

WEIGHT_COUNTERS = {
    "wakes": "wakes_total",
    "sleeps": "sleeps_total",
    "wake_seconds": "wake_seconds_total",
    "layers_loaded": "weights_loads_total",
    "weights_loaded_bytes": "weights_loaded_bytes_total",
    "weights_stall_seconds": "weights_stall_seconds_total",
}
"""Metric -> engine's counter, in Prometheus under polder_engine_*. `wake_seconds`: from a request to mapped pages."""

WeightCounts = dict[str, dict[str, float]]
"""Engine -> metric -> count since its start."""


def engine_status(status: Status, engine: str) -> EngineStatus:
    return next(one for one in status.engines if one.engine == engine)


async def engine_status_soon(broker: Path, engine: str, *, after_s: float = 0.0) -> EngineStatus:
    """The engine's status in `after_s` seconds."""
    await asyncio.sleep(after_s)
    return engine_status(await asyncio.to_thread(client.status, broker), engine)


def resize(broker: Path, engine: str, units: int) -> None:
    """Pins the engine to `units` and returns when it holds them. Raises EnvironmentFault when it never does.

    The broker's books show returned memory at once. They show granted memory before it is mapped, so a growing engine
    is awaited until it reports the growth, within 50 ms of it.
    """
    before = engine_status(client.status(broker), engine)
    client.request(broker, Resize(engine=engine, units=units))

    def there(now: EngineStatus) -> bool:
        grown = now.stats["grows_total"] > before.stats["grows_total"] or units <= before.held_units
        return now.held_units == units and grown

    _wait(broker, engine, there, f"does not come to {units} units")


def put_to_sleep(broker: Path, engine: str) -> None:
    """Returns when the engine, which has no requests, holds no weights. Raises EnvironmentFault when it keeps them."""
    client.request(broker, Sleep(engine=engine))
    _wait(broker, engine, lambda status: status.asleep, "does not fall asleep")


def hold(broker: Path, engine: str, segments: int) -> None:
    """Returns when the engine, which is awake, holds so many segments. Raises EnvironmentFault when it never does."""
    client.request(broker, Stream(engine=engine, segments=segments))
    _wait(broker, engine, lambda status: status.segments == segments, f"does not come to hold {segments} layers")


def wake(broker: Path, engine: str) -> None:
    """Returns when the engine holds the weights of all its layers. Raises EnvironmentFault when it does not get
    them."""
    client.request(broker, Wake(engine=engine))
    _wait(broker, engine, lambda status: status.segments == status.layers, "does not get its weights back")


def weight_counts(broker: Path | None) -> WeightCounts:
    """Counts after all engines have reported. Without a broker there is nothing to count."""
    if broker is None:
        return {}
    time.sleep(REPORT_S)
    return {
        engine.engine: {metric: engine.stats.get(counter, 0.0) for metric, counter in WEIGHT_COUNTERS.items()}
        for engine in client.status(broker).engines
    }


def moved(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> WeightCounts:
    """What was counted in between."""
    return {e: {m: count - before[e][m] for m, count in counts.items()} for e, counts in after.items()}


def _wait(broker: Path, engine: str, there: Callable[[EngineStatus], bool], complaint: str) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not there(status := engine_status(client.status(broker), engine)):
        if time.monotonic() > deadline:
            reason = status.reason or status.weights_reason
            raise EnvironmentFault(f"{engine} {complaint}: it holds {status.held_units} units ({reason})")
        time.sleep(POLL_S)
