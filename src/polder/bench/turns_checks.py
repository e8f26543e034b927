"""What `polder bench turns` is to show, each as a name and a computed truth. What was not run leaves its checks out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from polder.bench.checks import Check
from polder.bench.report.metrics import Metric
from polder.bench.report.result import Arms

__all__ = ["NOREUSE_AT_A_TIME", "turns_checks"]

Intervals = Mapping[str, tuple[float, float]]
"""Ratio's key -> (low, high), 95 %."""
NOREUSE_AT_A_TIME = (1, 4)
_MAIN = (
    # name, arm / baseline, limit
    ("a_ttft_p99_ratio_to_stock_at_most_0_31", "polder/stock:A.ttft_p99_ms", 0.31),
    ("a_ttft_p99_ratio_to_native_at_most_1_00", "polder/native:A.ttft_p99_ms", 1.00),
)
_RESTART = (
    ("a_ttft_p99_after_a_restart_ratio_to_stock_at_most_0_31", "polder-disk-restart/stock-restart:A.ttft_p99_ms", 0.31),
    (
        "a_ttft_p99_after_a_restart_ratio_to_native_at_most_1_00",
        "polder-disk-restart/native-fs-restart:A.ttft_p99_ms",
        1.00,
    ),
)
_LENDER = (
    ("b_ttft_p99_ratio_at_most_1_05", "B.ttft_p99_ms", 1.05),
    ("b_tbt_p99_ratio_at_most_1_05", "B.tbt_p99_ms", 1.05),
)


def turns_checks(arms: Arms, ratios: Mapping[str, float], intervals: Intervals) -> list[Check]:
    return [
        *(_at_most(name, key, limit, ratios, intervals) for name, key, limit in _MAIN if key in ratios),
        *_lender(ratios, intervals),
        *(_at_most(name, key, limit, ratios, intervals) for name, key, limit in _RESTART if key in ratios),
        *_first_turns(arms),
        *(check for number in NOREUSE_AT_A_TIME for check in _tax(number, intervals)),
        *(_equality(arm, found["all"]) for arm, found in arms.items() if arm.endswith("-equality")),
        _no_failures(arms),
    ]


def _first_turns(arms: Arms) -> Iterator[Check]:
    found = arms.get("polder-disk-restart")
    if found is not None:
        hit = _number(found["A"]["first_turn_hit_ratio"])
        yield Check(
            name="first_turns_after_a_restart_hit",
            passed=hit >= 0.8,
            detail=f"{hit:.3f} of their prompt tokens were found (limit 0.8: the rest is new)",
        )


def _lender(ratios: Mapping[str, float], intervals: Intervals) -> Iterator[Check]:
    """From the lender stage where it was run, which measures B alone; else from the agents' runs."""
    for name, metric, limit in _LENDER:
        keys = [key for key in (f"polder-lender/stock-lender:{metric}", f"polder/stock:{metric}") if key in ratios]
        if keys:
            yield _at_most(name, keys[0], limit, ratios, intervals)


def _tax(at_a_time: int, intervals: Intervals) -> Iterator[Check]:
    prefix = f"polder-noreuse-{at_a_time}/stock-noreuse-{at_a_time}:A."
    if f"{prefix}ttft_p50_ms" not in intervals:
        return
    ttft, speed = intervals[f"{prefix}ttft_p50_ms"], intervals[f"{prefix}busy_output_tokens_per_s"]
    yield Check(
        name=f"noreuse_tax_within_1_percent_{at_a_time}_at_a_time",
        passed=ttft[1] <= 1.01 and speed[0] >= 0.99,
        detail=f"p50 TTFT {_percent(ttft)}, throughput {_percent(speed)} of stock's (95 % intervals)",
    )


def _equality(arm: str, found: Mapping[str, Metric]) -> Check:
    compared, different = int(_number(found["answers_compared"])), int(_number(found["answers_different"]))
    hits = int(_number(found["tier_hit_tokens"]))
    return Check(
        name=f"tokens_equal_{arm.removesuffix('-equality').replace('-', '_')}",
        # Equal answers say nothing of a tier that served none of them.
        passed=compared > 0 and not different and hits > 0,
        detail=f"{different} of {compared} answers differ; {hits} prompt tokens came from a tier",
    )


def _no_failures(arms: Arms) -> Check:
    failed = sum(_number(metrics.get("failed_requests", 0.0)) for arm in arms.values() for metrics in arm.values())
    return Check(name="no_failed_requests", passed=not failed, detail=f"{failed:.0f} failed")


def _at_most(name: str, key: str, limit: float, ratios: Mapping[str, float], intervals: Intervals) -> Check:
    interval = intervals.get(key)
    text = f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}; " if interval else ""
    return Check(name=name, passed=ratios[key] <= limit, detail=f"{ratios[key]:.3f} ({text}limit {limit:.2f}; {key})")


def _percent(interval: tuple[float, float]) -> str:
    return f"{100 * (interval[0] - 1):+.2f} to {100 * (interval[1] - 1):+.2f} %"


def _number(metric: Metric) -> float:
    assert not isinstance(metric, dict)
    return metric
