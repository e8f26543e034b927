"""What the bench is to show, each as a name and a computed truth. A stage that was not run leaves its checks out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from polder.bench.report.metrics import Metric
from polder.bench.report.result import Arms
from polder.bench.stages.equality import MOVES

__all__ = ["Check", "elastic_checks"]

Intervals = Mapping[str, tuple[float, float]]
"""Ratio's key -> (low, high), 95 %."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    passed: bool
    detail: str
    """The figure and its limit."""


def elastic_checks(arms: Arms, ratios: Mapping[str, float], intervals: Intervals) -> list[Check]:
    return [
        *(_main(arms, ratios, intervals) if "polder" in arms else ()),
        *(_equality(arms["polder-equality"]["all"]) if "polder-equality" in arms else ()),
        *(_tax(intervals) if "polder-alone" in arms else ()),
        _no_failures(arms),
    ]


def _main(arms: Arms, ratios: Mapping[str, float], intervals: Intervals) -> Iterator[Check]:
    for engine, limit in (("A", 0.31), ("B", 1.10)):
        key = f"polder/stock:{engine}.ttft_p99_ms"
        low, high = intervals[key]
        yield Check(
            name=f"{engine.lower()}_ttft_p99_ratio_at_most_{limit:.2f}".replace(".", "_"),
            passed=ratios[key] <= limit,
            detail=f"{ratios[key]:.3f} (95 % interval {low:.2f} to {high:.2f}; limit {limit:.2f})",
        )
    ours, theirs = _number(arms["polder"]["A"]["hit_ratio"]), _number(arms["stock"]["A"]["hit_ratio"])
    yield Check(
        name="a_hit_ratio_gain_at_least_0_30",
        passed=ours - theirs >= 0.30,
        detail=f"{theirs:.3f} -> {ours:.3f}, {ours - theirs:+.3f} (limit +0.30)",
    )
    count = _number(arms["polder"]["B"]["givebacks"])
    p99_ms = arms["polder"]["B"].get("giveback_p99_ms")
    yield Check(
        name="giveback_p99_under_200_ms",
        passed=p99_ms is not None and _number(p99_ms) < 200,
        detail="none happened" if p99_ms is None else f"{_number(p99_ms):.0f} ms over {count:.0f} (limit 200 ms)",
    )


def _equality(found: Mapping[str, Metric]) -> Iterator[Check]:
    counts = {name: int(_number(found[name])) for name in ("answers_compared", "answers_different", *MOVES)}
    happened = ", ".join(f"{counts[name]} {name.replace('_', ' ')}" for name in MOVES)
    yield Check(
        name="tokens_equal",
        passed=counts["answers_compared"] > 0 and not counts["answers_different"] and all(counts[m] for m in MOVES),
        detail=f"{counts['answers_different']} of {counts['answers_compared']} answers differ, across {happened}",
    )


def _tax(intervals: Intervals) -> Iterator[Check]:
    ttft = intervals["polder-alone/stock-alone:B.ttft_p50_ms"]
    speed = intervals["polder-alone/stock-alone:B.busy_output_tokens_per_s"]
    yield Check(
        name="tax_within_1_percent",
        passed=ttft[1] <= 1.01 and speed[0] >= 0.99,
        detail=f"p50 TTFT {_percent(ttft)}, throughput {_percent(speed)} of stock's (95 % intervals)",
    )


def _no_failures(arms: Arms) -> Check:
    failed = sum(_number(metrics.get("failed_requests", 0.0)) for arm in arms.values() for metrics in arm.values())
    return Check(name="no_failed_requests", passed=not failed, detail=f"{failed:.0f} failed")


def _percent(interval: tuple[float, float]) -> str:
    return f"{100 * (interval[0] - 1):+.2f} to {100 * (interval[1] - 1):+.2f} %"


def _number(metric: Metric) -> float:
    assert not isinstance(metric, dict)
    return metric
