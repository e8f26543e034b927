"""Who held the memory, and when: the broker's status, taken a few times a second while a run goes on."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from time import perf_counter

import msgspec

from polder.broker import client
from polder.broker.wire import Status
from polder.errors import BrokerUnavailable
from polder.serve.metrics import unit_bytes

__all__ = ["MemorySample", "Timeline", "new_givebacks", "sampling"]

SAMPLE_EVERY_S = 0.2


class MemorySample(msgspec.Struct, frozen=True, kw_only=True):
    """One look at the device. Sizes in bytes, summed over devices."""

    t_s: float
    """perf_counter() seconds."""
    free_bytes: int
    held_bytes: dict[str, int]
    """Engine -> bytes of its KV cache."""
    busy_bytes: dict[str, int]
    """Engine -> bytes that its running requests need."""


class Timeline(msgspec.Struct, kw_only=True):
    """Samples of one run, and the give-backs that fell into it."""

    samples: list[MemorySample] = []
    giveback_ms: dict[str, list[float]] = {}
    """Engine -> times from its need of what is within its share to mapped pages."""
    recalls: int = 0
    overdue: int = 0
    """Recalls that passed their deadline."""
    dropped: int = 0
    """Looks that got no answer."""


@asynccontextmanager
async def sampling(broker: Path | None) -> AsyncIterator[Timeline]:
    """Fills the timeline until the block ends. Without a broker it stays empty."""
    timeline = Timeline()
    if broker is None:
        yield timeline
        return
    first = await asyncio.to_thread(client.status, broker)
    task = asyncio.create_task(_sample(broker, first, timeline))
    try:
        yield timeline
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def _sample(broker: Path, first: Status, timeline: Timeline) -> None:
    status = first
    while True:
        timeline.samples.append(_look(status))
        await asyncio.sleep(SAMPLE_EVERY_S)
        before = {engine.engine: engine.giveback_ms for engine in status.engines}
        try:
            status = await asyncio.to_thread(client.status, broker)
        except BrokerUnavailable:
            timeline.dropped += 1  # a starved machine: a gap in a plot is better than a lost run
            continue
        for engine in status.engines:
            new = new_givebacks(before.get(engine.engine, []), engine.giveback_ms)
            timeline.giveback_ms.setdefault(engine.engine, []).extend(new)
        timeline.recalls = status.recalls - first.recalls
        timeline.overdue = status.overdue - first.overdue


def new_givebacks(before: Sequence[float], now: Sequence[float]) -> list[float]:
    """What was appended since `before`. The broker keeps the last 512, so old entries may have left at the front."""
    kept = next(n for n in range(len(before), -1, -1) if list(before[len(before) - n :]) == list(now[:n]))
    return list(now[kept:])


def _look(status: Status) -> MemorySample:
    return MemorySample(
        t_s=perf_counter(),
        free_bytes=sum(device.free_pages * device.page_bytes for device in status.devices),
        held_bytes={engine.engine: engine.held_units * unit_bytes(engine, status) for engine in status.engines},
        busy_bytes={engine.engine: engine.busy_units * unit_bytes(engine, status) for engine in status.engines},
    )
