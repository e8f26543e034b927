"""What `polder bench context` is to show, each as a name and a computed truth. What was not run leaves its checks out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from polder.bench.checks import Check
from polder.bench.context_plan import ContextPlan, window_layers_of
from polder.bench.report.metrics import Metric
from polder.bench.report.result import Arms

__all__ = ["context_checks"]


def context_checks(arms: Arms, ratios: Mapping[str, float], plan: ContextPlan) -> list[Check]:
    return [
        *_contexts(ratios, plan),
        *_first_token(ratios),
        *_planned(arms),
        _equal(arms),
        _refused(arms),
    ]


def _contexts(ratios: Mapping[str, float], plan: ContextPlan) -> Iterator[Check]:
    ratio = ratios.get("window/stock:all.context_tokens")
    if ratio is None:
        return
    yield Check(
        name="context_at_least_3_98_times_stocks",
        passed=ratio >= 3.98,
        detail=f"{ratio:.2f} (limit 3.98, SwiftCache's best against chunked prefill)",
    )
    most = plan.recipe.layers / (window_layers_of("window") or 1)
    yield Check(
        name="context_at_least_nine_tenths_of_layers_over_window",
        passed=ratio >= 0.9 * most,
        detail=f"{ratio:.2f} of {most:g}: {ratio / most:.3f} (limit 0.9)",
    )


def _first_token(ratios: Mapping[str, float]) -> Iterator[Check]:
    ratio = ratios.get("window/stock:all.ttft_stocks_longest_ms")
    if ratio is not None:
        yield Check(
            name="first_token_at_stocks_longest_at_most_1_10",
            passed=ratio <= 1.10,
            detail=f"{ratio:.3f} (limit 1.10; medians, in turn)",
        )


def _planned(arms: Arms) -> Iterator[Check]:
    """Where there are copies to plan."""
    errors = {
        f"{arm} {length}": abs(_number(found[name]) / _number(found[f"tbt_{length}_ms"]) - 1)
        for arm, of in arms.items()
        for found in [of["all"]]
        for name in found
        if name.startswith("planned_tbt_")
        for length in [name.split("_")[2]]
        if _number(found[f"windowed_{length}_blocks"])
    }
    if errors:
        worst = max(errors, key=lambda key: errors[key])
        yield Check(
            name="decode_within_20_percent_of_the_plan",
            passed=errors[worst] <= 0.20,
            detail=f"worst error {errors[worst]:.3f} of the step, at {worst} tokens (limit 0.20, {len(errors)} lengths)",
        )


def _equal(arms: Arms) -> Check:
    compared, different = (
        sum(int(_number(of["all"][name])) for of in arms.values()) for name in ("answers_compared", "answers_different")
    )
    return Check(
        name="tokens_equal",
        passed=compared > 0 and not different,
        detail=f"{different} of {compared} answers differ from those of stock with memory for all",
    )


def _refused(arms: Arms) -> Check:
    served = [arm for arm, of in arms.items() if not _number(of["all"]["refused_beyond"])]
    return Check(
        name="longer_contexts_are_refused",
        passed=not served,
        detail="by every arm, and the next request is served" if not served else f"not by {', '.join(served)}",
    )


def _number(metric: Metric) -> float:
    assert not isinstance(metric, dict)
    return metric
