"""What `polder bench tenants` is to show, each as a name and a computed truth. What was not run leaves its checks out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from polder.bench.checks import Check
from polder.bench.report.metrics import Metric
from polder.bench.report.result import Arms
from polder.bench.tenants_metrics import EXHAUSTED_PART
from polder.bench.tenants_plan import ARMS, COMEBACK_ENGINE, COMEBACK_PROMPT

__all__ = ["exhausted_loads", "tenants_checks"]

Intervals = Mapping[str, tuple[float, float]]
"""Ratio's key -> (low, high), 95 %."""

NO_WORSE = 1.02
_BELOW = ("ttft_p50_ms", "ttft_p99_ms", "tbt_p50_ms", "tbt_p99_ms")


def exhausted_loads(arms: Arms, loads: Sequence[str]) -> list[str]:
    """Of `loads` ("x2", ...), those at which stock had more contexts to serve than its pools hold, or had to preempt."""
    stock = {load: arms[f"stock-{load}"]["all"] for load in loads if f"stock-{load}" in arms}
    return [
        load
        for load, found in stock.items()
        if _number(found["kv_exhausted_part"]) > EXHAUSTED_PART or _number(found["preemptions"]) > 0
    ]


def tenants_checks(arms: Arms, ratios: Mapping[str, float], intervals: Intervals, loads: Sequence[str]) -> list[Check]:
    """`loads`: of the temporal stage."""
    return [
        *_temporal(arms, ratios, intervals, loads),
        *_comeback(arms, ratios),
        *(_streaming(of) for arm, found in arms.items() if arm == "polder-streaming" for of in found.values()),
        *(_equality(found["all"]) for arm, found in arms.items() if arm == "polder-equality"),
        _no_failures(arms),
    ]


def _temporal(arms: Arms, ratios: Mapping[str, float], intervals: Intervals, loads: Sequence[str]) -> Iterator[Check]:
    compared = [load for load in loads if f"polder-{load}/stock-{load}:all.ttft_p99_ms" in ratios]
    if not compared:
        return
    exhausted = exhausted_loads(arms, compared)
    at = ", ".join(exhausted) or "none"
    yield Check(
        name="stock_exhausts_its_kv_at_some_rates_not_at_all",
        passed=0 < len(exhausted) < len(compared),
        detail=f"{at} of {', '.join(compared)}",
    )
    if exhausted:
        prefix, where = "polder/stock:all.", f"where stock's KV is exhausted: {at}"
        throughput = ratios[f"{prefix}output_tokens_per_s"]
        yield Check(
            name="temporal_throughput_at_least_1_40",
            passed=throughput >= 1.40,
            detail=f"{throughput:.3f} (limit 1.40; {where})",
        )
        for metric, limit in (("ttft_p99", 0.25), ("tbt_p99", 0.55)):
            key = f"{prefix}{metric}_ms"
            yield Check(
                name=f"temporal_{metric}_at_most_{limit:.2f}".replace(".", "_"),
                passed=ratios[key] <= limit,
                detail=f"{ratios[key]:.3f} ({_interval(key, intervals)}limit {limit:.2f}; {where})",
            )
    yield from _below(ratios, intervals, [load for load in compared if load not in exhausted])


def _below(ratios: Mapping[str, float], intervals: Intervals, loads: Sequence[str]) -> Iterator[Check]:
    """Every rate that stock serves with ease is a check of its own: no gain at one makes good a loss at another."""
    for load in loads:
        found = {metric: f"polder-{load}/stock-{load}:all.{metric}" for metric in _BELOW}
        worst = max(found.values(), key=lambda key: ratios[key])
        yield Check(
            name=f"below_saturation_no_worse_by_2_percent_{load}".replace(".", "_"),
            passed=ratios[worst] <= NO_WORSE,
            detail=f"worst of p50 and p99: {ratios[worst]:.3f} ({_interval(worst, intervals)}limit {NO_WORSE}; {worst})",
        )


def _comeback(arms: Arms, ratios: Mapping[str, float]) -> Iterator[Check]:
    sooner, by_cores = (
        {key.removeprefix(prefix): ratio for key, ratio in ratios.items() if key.startswith(prefix)}
        for prefix in (f"polder-whole{link}/polder-streamed{link}:{COMEBACK_ENGINE}.ttft_" for link in ("-link", ""))
    )
    if sooner:
        judged = sooner[f"{COMEBACK_PROMPT}_p50_ms"]
        yield Check(
            name="streamed_at_least_1_30_sooner_than_whole",
            passed=judged >= 1.30,
            detail=f"{judged:.2f} with a prompt of {COMEBACK_PROMPT} tokens over the emulated link (limit 1.30; all: "
            + ", ".join(f"{key.partition('_')[0]} tokens {ratio:.2f}" for key, ratio in sooner.items())
            + "; at memcpy's speed, by the cores that compute: "
            + ", ".join(f"{key.partition('_')[0]} tokens {ratio:.2f}" for key, ratio in by_cores.items())
            + ")",
        )
    if "polder-streamed" in arms:
        found = arms["polder-streamed"][COMEBACK_ENGINE]
        wakes, layers = _number(found["wakes"]), _number(found["layers_loaded_a_wake"])
        yield Check(
            name="reclaimed_model_had_lost_all_its_layers",
            passed=wakes > 0 and layers >= 1,
            detail=f"{wakes:.0f} wakes, {layers:.1f} layers and "
            f"{_number(found['bytes_loaded_a_wake']) / (1 << 20):.0f} MiB copied for each",
        )


def _streaming(found: Mapping[str, Metric]) -> Check:
    worst = _number(found["worst_error"])
    return Check(
        name="streaming_step_within_15_percent_of_the_formula",
        passed=worst <= 0.15,
        detail=f"worst error {worst:.3f} of the step (limit 0.15), over {sum(n.startswith('formula_') for n in found)} "
        "numbers of layers",
    )


def _equality(found: Mapping[str, Metric]) -> Check:
    counts = {name: int(_number(found[name])) for name in ("answers_compared", "answers_different", "sleeps", "wakes")}
    return Check(
        name="tokens_equal",
        # Equal answers say nothing of weights that never moved.
        passed=bool(counts["answers_compared"] and counts["sleeps"] and counts["wakes"])
        and not counts["answers_different"],
        detail=f"{counts['answers_different']} of {counts['answers_compared']} answers differ, across "
        f"{counts['sleeps']} sleeps, {counts['wakes']} wakes, {int(_number(found['layers_loaded']))} layers loaded",
    )


def _no_failures(arms: Arms) -> Check:
    engines = [
        metrics
        for arm, found in arms.items()
        if arm not in ARMS  # these are other arms' runs together
        for metrics in ([found["all"]] if "all" in found else found.values())
    ]
    failed = sum(_number(metrics.get("failed_requests", 0.0)) for metrics in engines)
    return Check(name="no_failed_requests", passed=not failed, detail=f"{failed:.0f} failed")


def _interval(key: str, intervals: Intervals) -> str:
    interval = intervals.get(key)
    return f"95 % interval {interval[0]:.2f} to {interval[1]:.2f}; " if interval else ""


def _number(metric: Metric) -> float:
    assert not isinstance(metric, dict)
    return metric
