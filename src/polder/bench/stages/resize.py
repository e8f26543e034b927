"""How long does a resize of 100 pages take under load, and how much does it hold a step up?

A few long decodes run on engine A while the bench pins it down and up by as many units as hold 100 pages. Three times
of each resize: from the request to the broker until it is seen to be done (`shrink_*`, `grow_*`; a growth is seen up to
50 ms late, when the engine reports it), the engine's own time for it (`*_engine_*`), and the longest gap between two
tokens of a running request around it, less the ordinary gap (`*_step_delay_*`).
"""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np

from polder.bench.harness.arms import Arm
from polder.bench.harness.control import engine_status, obeyed
from polder.bench.harness.driver import ClosedLoop, Played, RequestRecord, Tally, greedy
from polder.bench.harness.progress import Update
from polder.bench.harness.runs import play_on
from polder.bench.report.metrics import Metrics, percentile, without_nan
from polder.bench.workloads.agents import questions
from polder.broker import client
from polder.broker.wire import Resize

__all__ = ["Resized", "resize_metrics", "resize_under_load"]

PAGES = 100
STREAMS = 4
PROMPT_TOKENS = 1500
SMALL_UNITS = 5
"""Above the floor, and enough for the streams: nothing has to be preempted."""
PAUSE_S = 0.4
MOVED = ("evicted_blocks", "migrated_blocks", "preemptions")
SEEN_AFTER_S = 0.1
"""A gap counts to a resize if it touches the time from its start to so long after its end."""


class Resized(NamedTuple):
    """One resize. Times on the clock of perf_counter()."""

    grew: bool
    started: float
    ended: float
    engine_ms: float
    """Time that the engine core spent on it, between two steps."""


def resize_under_load(arm: Arm, *, stream_tokens: int, update: Update) -> Metrics:
    """Shrinks and grows engine A in turn until its streams have ended."""
    broker = arm.broker
    assert broker is not None, "only an elastic arm can be resized"
    pages_per_unit = engine_status(broker, "A").pages_per_unit
    units = math.ceil(PAGES / pages_per_unit)
    sizes = itertools.cycle((SMALL_UNITS, SMALL_UNITS + units))
    before = obeyed(broker, Resize(engine="A", units=SMALL_UNITS + units))
    asked = questions("A", count=STREAMS, longest=PROMPT_TOKENS, seed=7)
    streams = ClosedLoop(users=[[greedy("A", key, prompt, stream_tokens)] for key, prompt in asked.items()])
    tally, resized = Tally(), list[Resized]()

    async def shrink_and_grow() -> None:
        while not tally.ended and not tally.over:
            await asyncio.sleep(0.02)
            if tally.output_tokens >= 5 * STREAMS:
                resized.append(await asyncio.to_thread(_resize, broker, next(sizes)))
                update(tally.output_tokens, STREAMS * stream_tokens)

    async def both() -> Played:
        return (await asyncio.gather(play_on(arm, {"A": streams}, tally), shrink_and_grow()))[0]

    played = asyncio.run(both())
    client.request(broker, Resize(engine="A", units=0))
    after = engine_status(broker, "A")
    return {
        **resize_metrics(resized, played.records["A"], started_at=played.started_at),
        "pages": float(units * pages_per_unit),
        **{of: after.stats[f"{of}_total"] - before.stats[f"{of}_total"] for of in MOVED},
    }


def _resize(broker: Path, units: int) -> Resized:
    before = engine_status(broker, "A")
    started = perf_counter()
    obeyed(broker, Resize(engine="A", units=units))
    ended = perf_counter()
    after = engine_status(broker, "A", after_s=PAUSE_S)  # the engine reports its counters every 50 ms
    grew = units > before.held_units
    counter = "grow_seconds_total" if grew else "shrink_seconds_total"
    engine_ms = (after.stats[counter] - before.stats[counter]) * 1e3
    return Resized(grew=grew, started=started, ended=ended, engine_ms=engine_ms)


def resize_metrics(resized: Sequence[Resized], records: Sequence[RequestRecord], *, started_at: float) -> Metrics:
    """`started_at`: perf_counter() at second 0 of the records."""
    gaps = np.concatenate(
        [np.column_stack([record.token_s[:-1], record.token_s[1:]]) for record in records if len(record.token_s) > 1]
    )
    gaps += started_at
    widths_ms = (gaps[:, 1] - gaps[:, 0]) * 1e3
    usual_ms = percentile(widths_ms, 50)

    def longest_ms(one: Resized) -> float:
        touching = (gaps[:, 1] >= one.started) & (gaps[:, 0] <= one.ended + SEEN_AFTER_S)
        return float(widths_ms[touching].max(initial=0.0))

    found: Metrics = {
        "resizes": float(len(resized)),
        "tbt_p50_ms": usual_ms,
        "failed_requests": float(sum(bool(record.error) for record in records)),
    }
    for name, ones in (("shrink", [r for r in resized if not r.grew]), ("grow", [r for r in resized if r.grew])):
        times_ms = [(one.ended - one.started) * 1e3 for one in ones]
        delays_ms = [max(0.0, longest_ms(one) - usual_ms) for one in ones]
        engine_ms = [one.engine_ms for one in ones]
        for metric, values in (("", times_ms), ("_engine", engine_ms), ("_step_delay", delays_ms)):
            found[f"{name}{metric}_p50_ms"] = percentile(values, 50)
            found[f"{name}{metric}_max_ms"] = max(values, default=math.nan)
    return without_nan(found)
