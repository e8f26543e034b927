"""Tables of figures, for the terminal and for HTML."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import rich.table
from rich.console import Console

from polder.bench.report.result import BenchResult

__all__ = ["SHOWN", "Table", "arm_tables", "figures", "print_tables", "same"]

SHOWN = {
    "TTFT p50, ms": "ttft_p50_ms",
    "TTFT p90, ms": "ttft_p90_ms",
    "TTFT p99, ms": "ttft_p99_ms",
    "TBT p50, ms": "tbt_p50_ms",
    "TBT p99, ms": "tbt_p99_ms",
    "TBT, slowest tenth, ms": "tbt_worst10_ms",
    "prompt tokens found, part": "hit_ratio",
    "first turns' prompt tokens found, part": "first_turn_hit_ratio",
    "found in a tier, part": "tier_hit_ratio",
    "prompt tokens computed per s": "computed_prompt_tokens_per_s",
    "output tokens per s": "output_tokens_per_s",
    "output tokens per busy s": "busy_output_tokens_per_s",
    "requests per s": "requests_per_s",
    "requests per s within 500 / 100 ms": "goodput_requests_per_s",
    "time to the last reply, s": "makespan_s",
    "preemptions": "preemptions",
    "time in which contexts exceed stock's pool, part": "kv_exhausted_part",
    "models woken": "wakes",
    "layers copied in": "layers_loaded",
    "failed requests": "failed_requests",
}
"""Headings of the metrics of requests."""

R = TypeVar("R")
C = TypeVar("C")


class Table(NamedTuple):
    title: str
    columns: Sequence[str]
    """Headings of all columns but the first, which has none."""
    rows: Sequence[Sequence[str]]


def figures(
    result: BenchResult,
    title: str,
    rows: Mapping[str, R],
    columns: Mapping[str, C],
    at: Callable[[R, C], str],
    *,
    baseline: str = "",
    scale: float = 1.0,
) -> Iterator[Table]:
    """One table, or none when nothing of it was measured. Mappings are heading -> what `at` gets, which names the cell's
    figure, "ARM:ENGINE.METRIC". Its ratio to the arm `baseline` stands behind it. Empty rows and columns go."""
    texts = {row: [_text(result, at(r, c), baseline, scale) for c in columns.values()] for row, r in rows.items()}
    kept = [number for number in range(len(columns)) if any(of[number] for of in texts.values())]
    if kept:
        heads = list(columns)
        body = [[row, *(of[number] for number in kept)] for row, of in texts.items() if any(of)]
        yield Table(title, [heads[number] for number in kept], body)


def arm_tables(result: BenchResult, title: str, key: str, known: Iterable[str]) -> Iterator[Table]:
    """Metrics of one engine, a column for each arm. `key`: "ARM ARM ...:ENGINE" for these arms and all metrics that they
    have, or "SUFFIX:ENGINE" for those of `known` with this suffix. Where they served requests, the metrics are those of
    SHOWN, with ratios to stock."""
    names, _, engine = key.partition(":")
    arms = {arm: arm + names for arm in known} if names[:1] in ("", "-") else {arm: arm for arm in names.split()}
    metrics = dict.fromkeys(metric for arm in arms.values() for metric in result.arms.get(arm, {}).get(engine, {}))
    served = "ttft_p50_ms" in metrics
    shown = SHOWN if served else {metric.replace("_", " "): metric for metric in metrics}
    baseline = f"stock{names}" if served else ""
    yield from figures(result, title, shown, arms, lambda m, arm: f"{arm}:{engine}.{m}", baseline=baseline)


def _text(result: BenchResult, key: str, baseline: str, scale: float) -> str:
    value = result.figure(key)
    if value is None:
        return ""
    value *= scale
    digits = 0 if value == int(value) or abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    over = key.replace(":", f"/{baseline}:", 1)
    ratio, interval = result.ratios.get(over) if baseline else None, result.interval(over)
    ends = f", {interval[0]:.2f}-{interval[1]:.2f}" if interval else ""
    return f"{value:,.{digits}f}" + (f" (x{ratio:.2f}{ends})" if ratio is not None else "")


def same(names: Iterable[str]) -> dict[str, str]:
    """Headings that are the names themselves."""
    return {name: name for name in names}


def print_tables(console: Console, tables: Iterable[Table]) -> None:
    for title, columns, rows in tables:
        table = rich.table.Table("", title=title, title_justify="left", header_style="bold")
        for column in columns:
            table.add_column(column, justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
