"""Orders to engines through their broker, and what engines count: sizes, sleep, wakes, segments of weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from polder.broker import client
from polder.broker.wire import EngineStatus, Resize, Sleep, Stream, Wake
from polder.errors import EnvironmentFault

__all__ = [
    *("REPORT_S", "WEIGHT_COUNTERS", "WeightCounts", "counts", "engine_status", "hold", "moved", "put_to_sleep"),
    *("resize", "wake"),
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


def engine_status(broker: Path, engine: str, *, after_s: float = 0.0) -> EngineStatus:
    """The engine's status in `after_s` seconds."""
    time.sleep(after_s)
    return next(one for one in client.status(broker).engines if one.engine == engine)


def resize(broker: Path, engine: str, units: int) -> None:
    """Pins the engine to `units` and returns when it holds them. Raises EnvironmentFault when it never does.

    The broker's books show returned memory at once. They show granted memory before it is mapped, so a growing engine
    is awaited until it reports the growth, within 50 ms of it.
    """
    before = engine_status(broker, engine)
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
    """Returns when the engine holds all its layers' weights. Raises EnvironmentFault when it does not get them."""
    client.request(broker, Wake(engine=engine))
    _wait(broker, engine, lambda status: status.segments == status.layers, "does not get its weights back")


def counts(broker: Path | None, counters: Mapping[str, str] = WEIGHT_COUNTERS) -> WeightCounts:
    """Counts (metric -> engine's counter) after all engines have reported; nothing without a broker."""
    if broker is None:
        return {}
    time.sleep(REPORT_S)
    engines = client.status(broker).engines
    return {e.engine: {metric: e.stats.get(name, 0.0) for metric, name in counters.items()} for e in engines}


def moved(before: WeightCounts, after: WeightCounts) -> WeightCounts:
    """What was counted in between."""
    return {e: {m: count - before[e][m] for m, count in of.items()} for e, of in after.items()}


def _wait(broker: Path, engine: str, there: Callable[[EngineStatus], bool], complaint: str) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not there(status := engine_status(broker, engine)):
        if time.monotonic() > deadline:
            reason = status.reason or status.weights_reason
            raise EnvironmentFault(f"{engine} {complaint}: it holds {status.held_units} units ({reason})")
        time.sleep(POLL_S)
