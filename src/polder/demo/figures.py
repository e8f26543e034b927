"""Two runs compared: figures by arm and model, and the few of them that the runs support."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from polder.bench.harness.machine import describe_machine, describe_versions, load_average
from polder.bench.report.metrics import engine_metrics, good, percentile, quantile_intervals, ttfts_ms, without_nan
from polder.bench.report.result import Arms, BenchResult, ratios_over
from polder.demo.arms import BUDGET_BYTES, LONGEST, MODEL, PAGE_BYTES, Seen
from polder.demo.load import CHAT, DOCS

__all__ = ["tiles", "to_result"]

COMPARED = "ttft_p50_ms"


def to_result(runs: Mapping[str, Seen], seconds: Mapping[str, float]) -> BenchResult:
    """The runs "stock" and "polder" as figures, ratios and intervals. `seconds`: how long each step took, for the
    conditions."""
    arms: Arms = {}
    for arm, seen in runs.items():
        arms[arm] = {model: without_nan(engine_metrics([records])) for model, records in seen.records.items()}
        times = [ms for of in seen.timeline.giveback_ms.values() for ms in of]
        arms[arm]["all"] = without_nan(
            {
                "wall_s": seen.wall_s,
                "recalls": float(seen.timeline.recalls),
                "overdue_recalls": float(seen.timeline.overdue),
                "givebacks": float(len(times)),
                "giveback_max_ms": percentile(times, 100),
                **_answers(runs["stock"], seen),
            }
        )
    stock, polder = ({m: ttfts_ms(good(of)) for m, of in runs[arm].records.items()} for arm in ("stock", "polder"))
    intervals = {
        f"polder/stock:{model}.{COMPARED}": list(quantile_intervals(polder[model], stock[model], [50])[0])
        for model in (DOCS, CHAT)
        if len(polder[model]) and len(stock[model])
    }
    conditions: dict[str, Any] = {
        "model": MODEL.describe(),
        "budget_bytes": BUDGET_BYTES,
        "page_bytes": PAGE_BYTES,
        "max_model_len": LONGEST,
        "cores": "each engine computes on a core of its own; client, gateway and broker run beside them",
        "order": list(runs),
        "intervals": intervals,
        "intervals_how": "95 %, bootstrap: requests resampled within each arm; one run of each",
        "machine": describe_machine(),
        "load_average": load_average(),
        "versions": describe_versions(),
        "seconds": {what: round(value, 1) for what, value in seconds.items()},
    }
    ratios = ratios_over(arms, arm="polder", baseline="stock")
    return BenchResult(bench="demo", conditions=conditions, arms=arms, ratios=ratios, checks={})


def tiles(result: BenchResult) -> list[tuple[str, str]]:
    """(figure, what it is). A time is shown where its whole interval lies on one side, whichever side that is."""
    found = []
    for model, what in ((DOCS, "the readers'"), (CHAT, "the visitors'")):
        interval = result.interval(f"polder/stock:{model}.{COMPARED}")
        if interval is not None and (interval[1] < 1 or interval[0] > 1):
            ours, theirs = (result.figure(f"{arm}:{model}.{COMPARED}") or 0.0 for arm in ("polder", "stock"))
            part = f"{interval[0]:.2f} to {interval[1]:.2f} of it (95 %)"
            found.append(
                (
                    f"{ours / 1e3:.2f} s",
                    f"median wait for {what} first token; fixed halves: {theirs / 1e3:.2f} s, {part}",
                )
            )
    different, compared = (int(result.figure(f"polder:all.answers_{what}") or 0) for what in ("different", "compared"))
    found.append((f"{different} of {compared}", "answers with other tokens than stock vLLM's"))
    return found


def _answers(stock: Seen, seen: Seen) -> dict[str, float]:
    """How many answers were compared with stock's, and how many have other tokens."""
    theirs, ours = ({r.key: r.output_ids for of in run.records.values() for r in good(of)} for run in (stock, seen))
    both = theirs.keys() & ours.keys()
    return {
        "answers_compared": float(len(both)),
        "answers_different": float(sum(theirs[key] != ours[key] for key in both)),
    }
