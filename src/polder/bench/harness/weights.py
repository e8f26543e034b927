"""Weights by hand and by numbers: puts a model to sleep, wakes it, and counts what moved, all through the broker."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path

from polder.bench.harness.pinning import engine_status
from polder.broker import client
from polder.broker.wire import EngineStatus, Rouse, Sleep, Stream
from polder.errors import EnvironmentFault

__all__ = ["COUNTERS", "WeightCounts", "hold", "moved", "put_to_sleep", "rouse", "weight_counts"]

SETTLE_TIMEOUT_S = 30.0
POLL_S = 0.01
REPORT_S = 1.3
"""Engines ask their workers for figures once a second."""

COUNTERS = {
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


def weight_counts(broker: Path | None) -> WeightCounts:
    """Waits until engines have reported what was done so far. Without a broker there is nothing to count."""
    if broker is None:
        return {}
    time.sleep(REPORT_S)
    return {
        engine.engine: {metric: engine.stats.get(counter, 0.0) for metric, counter in COUNTERS.items()}
        for engine in client.status(broker).engines
    }


def moved(before: Mapping[str, Mapping[str, float]], after: Mapping[str, Mapping[str, float]]) -> WeightCounts:
    """What was counted between two looks."""
    return {
        engine: {metric: count - before[engine][metric] for metric, count in counts.items()}
        for engine, counts in after.items()
    }


def put_to_sleep(broker: Path, engine: str) -> None:
    """Returns when the engine, which has no requests, holds no weights. Raises EnvironmentFault when it keeps them."""
    client.request(broker, Sleep(engine=engine))
    _wait(broker, engine, lambda status: status.asleep, "does not fall asleep")


def hold(broker: Path, engine: str, segments: int) -> None:
    """Returns when the engine, which is awake, holds so many segments. Raises EnvironmentFault when it does not get there."""
    client.request(broker, Stream(engine=engine, segments=segments))
    _wait(broker, engine, lambda status: status.segments == segments, f"does not come to hold {segments} layers")


def rouse(broker: Path, engine: str) -> None:
    """Returns when the engine holds the weights of all its layers. Raises EnvironmentFault when it does not get them."""
    client.request(broker, Rouse(engine=engine))
    _wait(broker, engine, lambda status: status.segments == status.layers, "does not get its weights back")


def _wait(broker: Path, engine: str, there: Callable[[EngineStatus], bool], complaint: str) -> None:
    deadline = time.monotonic() + SETTLE_TIMEOUT_S
    while not there(status := engine_status(client.status(broker), engine)):
        if time.monotonic() > deadline:
            raise EnvironmentFault(f"{engine} {complaint}: {status.weights_reason}")
        time.sleep(POLL_S)
