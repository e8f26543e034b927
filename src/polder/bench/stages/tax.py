"""What Polder costs when there is nothing to win: no reuse, and nobody else who wants memory.

One engine alone, requests one after the other, sent straight to the engine. The trace is cut into blocks of a second or
two, and every block is played on both arms in turn, A B B A, so that a slow second of the machine falls on both. One
block on both arms is a pair; intervals come from resampling the pairs. Requests do not queue, because the median TTFT
of a queue is waiting, which multiplies the machine's noise: 8 pairs of whole traces at five times their speed left an
interval of -18 to +21 %. Prefix caches are emptied before each round, so no request finds anything. Throughput is
output tokens over time with work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import ClosedLoop, Endpoint, play
from polder.bench.harness.progress import Stage
from polder.bench.report.metrics import (
    Interval,
    Metrics,
    RunRecords,
    bootstrap_interval,
    busy_seconds,
    engine_metrics,
    percentile,
    ttfts_ms,
)
from polder.bench.report.result import without_nan

__all__ = ["TaxRun", "play_alone", "tax_intervals", "tax_metrics", "tax_pairs"]


@dataclass(frozen=True, kw_only=True)
class TaxRun:
    """One block on one engine alone."""

    records: RunRecords

    @property
    def ttft_p50_ms(self) -> float:
        return percentile(ttfts_ms(self.records.good), 50)

    @property
    def busy_tokens_per_s(self) -> float:
        good = self.records.good
        return sum(len(record.token_s) for record in good) / busy_seconds(good)


async def play_alone(arm: Arm, block: ClosedLoop, engine: str) -> TaxRun:
    await asyncio.sleep(arm.quiet_s)
    played = await play({engine: (Endpoint(base_url=arm.engine_url(engine)), block)})
    return TaxRun(records=RunRecords(records=played.records[engine]))


async def tax_pairs(
    stock: Arm,
    polder: Arm,
    blocks: Sequence[ClosedLoop],
    *,
    engine: str,
    rounds: int,
    uncounted_rounds: int,
    stage: Stage,
) -> tuple[list[TaxRun], list[TaxRun]]:
    """Plays all `blocks` on one engine of both arms, `rounds` times over, after some rounds that are not counted."""
    done: dict[str, list[TaxRun]] = {stock.name: [], polder.name: []}
    total = (rounds + uncounted_rounds) * len(blocks)
    for _ in range(rounds + uncounted_rounds):
        for arm in (stock, polder):
            await asyncio.to_thread(arm.reset_prefix_caches)
        for number, block in enumerate(blocks):
            for arm in (stock, polder) if number % 2 else (polder, stock):
                done[arm.name].append(await play_alone(arm, block, engine))
            stage.update(len(done[stock.name]), total)
    uncounted = uncounted_rounds * len(blocks)
    return done[stock.name][uncounted:], done[polder.name][uncounted:]


def tax_metrics(runs: Sequence[TaxRun]) -> Metrics:
    """Metrics of one arm; the two that the tax is about are geometric means over the blocks, as the ratio's are."""
    found = engine_metrics([run.records for run in runs])
    found["ttft_p50_ms"] = bootstrap_interval([run.ttft_p50_ms for run in runs])[1]
    found["busy_output_tokens_per_s"] = bootstrap_interval([run.busy_tokens_per_s for run in runs])[1]
    return without_nan(found)


def tax_intervals(stock: Sequence[TaxRun], polder: Sequence[TaxRun]) -> dict[str, Interval]:
    """95 % intervals of Polder over stock, paired."""
    pairs = list(zip(stock, polder, strict=True))
    ttft = bootstrap_interval([ours.ttft_p50_ms / theirs.ttft_p50_ms for theirs, ours in pairs])
    speed = bootstrap_interval([ours.busy_tokens_per_s / theirs.busy_tokens_per_s for theirs, ours in pairs])
    return {"ttft_p50_ms": (ttft[0], ttft[2]), "busy_output_tokens_per_s": (speed[0], speed[2])}
