"""The sweep of `polder bench tenants` as a plot: SVG text to be put into an HTML page."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
from matplotlib.figure import Figure

from polder.bench.report.plots import STYLE, svg
from polder.bench.report.result import Arms
from polder.bench.tenants_plan import ARMS

__all__ = ["sweep"]

COLOURS = {"stock": "#8a94a6", "stock-short": "#475569", "kv-only": "#d97706", "polder": "#0f766e"}
PANELS = (
    ("output_tokens_per_s", "output tokens per s", "linear"),
    ("ttft_p99_ms", "TTFT p99, ms (log scale)", "log"),
    ("tbt_p99_ms", "TBT p99, ms (log scale)", "log"),
)


def sweep(arms: Arms, loads: Sequence[str], exhausted: Sequence[str]) -> str:
    """All engines together against the rate, a line for each arm; shaded where stock's KV is exhausted."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.4), layout="constrained")
        for axis, (metric, title, scale) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
            for arm in ARMS:
                points = [
                    (_rate(load), arms[f"{arm}-{load}"]["all"][metric]) for load in loads if f"{arm}-{load}" in arms
                ]
                if points:
                    rates, values = zip(*sorted(points), strict=True)
                    axis.plot(rates, values, "o-", ms=4, lw=2, color=COLOURS[arm], label=arm)
            for load in exhausted:
                axis.axvspan(_rate(load) - 0.1, _rate(load) + 0.1, color="#f3f4f6", zorder=0)
            axis.set(xlabel="rate", title=title, yscale=scale)
            if scale == "linear":
                axis.set_ylim(bottom=0)
        figure.axes[0].legend(loc="lower right")
        return svg(figure)


def _rate(load: str) -> float:
    return float(load.removeprefix("x"))
