"""What elasticity costs when there is nothing to win: no reuse, and nobody else who wants memory.

Engine B alone, the burst trace played five times as fast, stock and elastic in turn, from empty prefix caches, straight to
the engines. Runs are paired with their neighbours in time, so that a slow minute of the machine falls on both; the interval
comes from resampling the pairs. An open loop ends when the trace ends, however fast the engine is, so throughput is output
tokens over the time in which the engine had work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from polder.bench.arms import Arm
from polder.bench.driver import Endpoint, OpenLoop, play
from polder.bench.metrics import (
    Metrics,
    RunRecords,
    bootstrap_interval,
    busy_seconds,
    engine_metrics,
    percentile,
    ttfts_ms,
)
from polder.bench.progress import Stage
from polder.bench.result import without_nan

__all__ = ["TIME_SCALE", "TaxRun", "play_alone", "tax_intervals", "tax_metrics", "tax_pairs"]

TIME_SCALE = 0.2


@dataclass(frozen=True, kw_only=True)
class TaxRun:
    """One run of engine B alone."""

    records: RunRecords

    @property
    def ttft_p50_ms(self) -> float:
        return percentile(ttfts_ms(self.records.good), 50)

    @property
    def busy_tokens_per_s(self) -> float:
        good = self.records.good
        return sum(len(record.token_s) for record in good) / busy_seconds(good)


async def play_alone(arm: Arm, bursts: OpenLoop) -> TaxRun:
    await asyncio.to_thread(arm.reset_prefix_caches)
    played = await play({"B": (Endpoint(base_url=arm.engine_url("B")), bursts)})
    return TaxRun(records=RunRecords(records=played.records["B"]))


async def tax_pairs(
    stock: Arm, polder: Arm, bursts: OpenLoop, *, pairs: int, stage: Stage
) -> tuple[list[TaxRun], list[TaxRun]]:
    """`pairs` runs of each arm, A B B A A B B A ..., after one of each that is not counted."""
    done: dict[str, list[TaxRun]] = {stock.name: [], polder.name: []}
    for number in range(pairs + 1):
        order = (stock, polder) if number % 2 else (polder, stock)
        for arm in order:
            done[arm.name].append(await play_alone(arm, bursts))
            stage.update(sum(map(len, done.values())), 2 * (pairs + 1))
    return done[stock.name][1:], done[polder.name][1:]


def tax_metrics(runs: Sequence[TaxRun]) -> Metrics:
    """Metrics of one arm; the two that the tax is about are geometric means over the runs, as the ratio's are."""
    found = engine_metrics([run.records for run in runs])
    found["ttft_p50_ms"] = bootstrap_interval([run.ttft_p50_ms for run in runs])[1]
    found["busy_output_tokens_per_s"] = bootstrap_interval([run.busy_tokens_per_s for run in runs])[1]
    return without_nan(found)


def tax_intervals(stock: Sequence[TaxRun], polder: Sequence[TaxRun]) -> dict[str, tuple[float, float]]:
    """95 % intervals of Polder over stock, paired."""
    pairs = list(zip(stock, polder, strict=True))
    ttft = bootstrap_interval([ours.ttft_p50_ms / theirs.ttft_p50_ms for theirs, ours in pairs])
    speed = bootstrap_interval([ours.busy_tokens_per_s / theirs.busy_tokens_per_s for theirs, ours in pairs])
    return {"ttft_p50_ms": (ttft[0], ttft[2]), "busy_output_tokens_per_s": (speed[0], speed[2])}
