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
import time
from collections.abc import Sequence
from statistics import geometric_mean

from polder.bench.harness.arms import Arm
from polder.bench.harness.driver import ClosedLoop, RequestRecord, play
from polder.bench.harness.progress import Update
from polder.bench.report import metrics
from polder.bench.report.metrics import Interval, Metrics

__all__ = ["measure_tax", "tax_intervals", "tax_metrics"]

Block = list[RequestRecord]
"""One block on one engine alone."""


def measure_tax(
    arms: Sequence[Arm], blocks: Sequence[ClosedLoop], *, engine: str, rounds: int, uncounted: int, update: Update
) -> list[list[Block]]:
    """Plays all `blocks` on one engine of both arms, `rounds` times over, after `uncounted` rounds."""
    done: dict[str, list[Block]] = {arm.name: [] for arm in arms}
    for of_round in range(rounds + uncounted):
        for arm in arms:
            arm.reset_prefix_caches()
        for number, block in enumerate(blocks):
            for arm in arms if number % 2 else reversed(arms):
                time.sleep(arm.quiet_s)
                played = asyncio.run(play({engine: (arm.urls[engine], block)}))
                done[arm.name].append(played.records[engine])
            update(of_round * len(blocks) + number + 1, (rounds + uncounted) * len(blocks))
    return [found[uncounted * len(blocks) :] for found in done.values()]


def tax_metrics(blocks: Sequence[Block]) -> Metrics:
    """Metrics of one arm; the two that the tax is about are geometric means over the blocks, as the ratio's are."""
    means = {metric: geometric_mean(map(of, blocks)) for metric, of in _FIGURES.items()}
    return metrics.without_nan(metrics.engine_metrics(blocks) | means)


def tax_intervals(stock: Sequence[Block], polder: Sequence[Block]) -> dict[str, Interval]:
    """95 % intervals of Polder over stock, paired."""
    return {
        metric: metrics.paired_interval([of(ours) / of(theirs) for theirs, ours in zip(stock, polder, strict=True)])
        for metric, of in _FIGURES.items()
    }


def _ttft_p50_ms(block: Block) -> float:
    return metrics.percentile(metrics.ttfts_ms(metrics.good(block)), 50)


def _busy_tokens_per_s(block: Block) -> float:
    good = metrics.good(block)
    return sum(len(record.token_s) for record in good) / metrics.busy_seconds(good)


_FIGURES = {"ttft_p50_ms": _ttft_p50_ms, "busy_output_tokens_per_s": _busy_tokens_per_s}
