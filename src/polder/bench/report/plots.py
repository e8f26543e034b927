"""The report's plots, as SVG text to be put into an HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot would choose a display

import numpy as np
from matplotlib.figure import Figure

from polder.bench.harness.runs import Run
from polder.bench.report.html import Plot
from polder.bench.report.metrics import good, ttfts_ms
from polder.bench.report.result import BenchResult

__all__ = ["curves", "hit_ratio_over_time", "memory_by_engine", "memory_over_time", "ttft_distribution"]

COLOURS = {
    "stock": "#8a94a6",
    "stock-short": "#475569",
    "kv-only": "#d97706",
    "polder": "#0f766e",
    "A": "#0f766e",
    "B": "#d97706",
    "free": "#e5e7eb",
}
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "grid.color": "#eef0f3",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small, sharp, searchable
    "svg.hashsalt": "polder",  # the same data give the same file
}
WINDOW_S = 10.0
MIB = 1 << 20


def _panels(rows: int, columns: int, height: float, **options: Any) -> tuple[Figure, list[Any]]:
    """A figure of the page's width and its axes, in our style."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, height), layout="constrained")
        return figure, list(np.ravel(figure.subplots(rows, columns, **options)))


def _plot(title: str, text: str, figure: Figure) -> Plot:
    """The <svg> element alone, scaling with the page."""
    with matplotlib.rc_context(STYLE), io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        svg = file.getvalue()
    return Plot(
        title, text, re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', svg[svg.index("<svg") :], count=1)
    )


def ttft_distribution(runs: Sequence[Run], engines: Sequence[str] = ("A", "B")) -> Plot:
    """Share of requests whose first token came within x, an axis for each engine, a line for each arm."""
    figure, axes = _panels(1, len(engines), 3.6, sharey=True)
    for axis, engine in zip(axes, engines, strict=True):
        for arm in ("stock", "polder"):
            records = [record for run in runs if run.arm == arm for record in run.records.get(engine, [])]
            values = np.sort(ttfts_ms(good(records)))
            if len(values):
                share = np.arange(1, len(values) + 1) / len(values)
                axis.plot(values, share, drawstyle="steps-post", color=COLOURS[arm], lw=2, label=arm)
                axis.plot([float(np.percentile(values, 99))], [0.99], "o", color=COLOURS[arm], ms=5)
        axis.set(xscale="log", xlabel="time to first token, ms (log scale)", title=engine, ylim=(0, 1.02))
        axis.axhline(0.99, color="#9ca3af", lw=0.8, ls=":")
        axis.legend(loc="lower right")
    axes[0].set_ylabel("share of requests")
    text = "From the moment a request was due. Dots mark the 99th percentile."
    return _plot("Time to first token", text, figure)


def memory_over_time(run: Run) -> Plot:
    """KV memory by owner during one run of the elastic arm, what of it is in use, and B's requests as they come."""
    samples = run.timeline.samples
    t = np.array([sample.t_s - run.started_at for sample in samples])
    held = {e: np.array([s.held_bytes.get(e, 0) for s in samples]) / MIB for e in ("A", "B")}
    busy = {e: np.array([s.busy_bytes.get(e, 0) for s in samples]) / MIB for e in ("A", "B")}
    free = np.array([sample.free_bytes for sample in samples]) / MIB
    total = held["A"] + free + held["B"]
    figure, (axis, arrivals) = _panels(2, 1, 4.2, sharex=True, height_ratios=(5, 1))
    colours, labels = [COLOURS[name] for name in ("A", "free", "B")], ["held by A", "free", "held by B"]
    areas = axis.stackplot(t, held["A"], free, held["B"], colors=colours, labels=labels, step="post", alpha=0.85)
    in_use = {"color": "#111827", "lw": 1.0, "drawstyle": "steps-post"}
    axis.plot(t, busy["A"], label="in use by running requests", **in_use)
    axis.plot(t, total - busy["B"], **in_use)
    axis.axhline(total.max(initial=0) / 2, color="white", lw=1, ls="--")
    axis.set(ylabel="KV memory, MiB", ylim=(0, total.max(initial=1)), xlim=(0, t.max(initial=1)))
    axis.legend(handles=[*areas, *axis.get_lines()[:1]], loc="upper center", ncols=4, bbox_to_anchor=(0.5, 1.12))
    due = [record.scheduled_s for record in run.records.get("B", [])]
    seconds = np.arange(0, max(t.max(initial=1), 1) + 1)
    arrivals.bar(seconds[:-1], np.histogram(due, seconds)[0], width=1.0, align="edge", color=COLOURS["B"])
    arrivals.set(xlabel="seconds", ylabel="B's req/s")
    return _plot(
        "Memory by owner", "First run of Polder. The dashed line is where stock cuts the budget in two.", figure
    )


def memory_by_engine(run: Run) -> Plot:
    """KV memory by owner during one run of an arm with a broker."""
    samples = run.timeline.samples
    t = [sample.t_s - run.started_at for sample in samples]
    engines = sorted({engine for sample in samples for engine in sample.held_bytes})
    held = [[sample.held_bytes.get(engine, 0) / MIB for sample in samples] for engine in engines]
    free = [sample.free_bytes / MIB for sample in samples]
    figure, (axis,) = _panels(1, 1, 3.6)
    colours = [*(f"C{number}" for number in range(len(engines))), COLOURS["free"]]
    axis.stackplot(t, *held, free, labels=[*engines, "free"], colors=colours, step="post", alpha=0.85)
    axis.set(ylabel="memory, MiB", xlabel="seconds", ylim=(0, None), xlim=(0, max(t, default=1)))
    axis.legend(loc="upper center", ncols=len(engines) + 1, bbox_to_anchor=(0.5, 1.14))
    return _plot("Memory by owner", "First leg of Polder.", figure)


def hit_ratio_over_time(runs: Sequence[Run]) -> Plot:
    """Prefix hit ratio of engine A's requests in windows, a line for each run."""
    figure, (axis,) = _panels(1, 1, 2.9)
    for run in runs:
        answered = good(run.records["A"])
        window = np.array([record.scheduled_s // WINDOW_S for record in answered], dtype=np.int64)
        prompt = np.bincount(window, weights=[record.prompt_tokens for record in answered])
        cached = np.bincount(window, weights=[record.cached_tokens for record in answered])
        there = prompt > 0
        middle = (np.arange(len(prompt)) + 0.5) * WINDOW_S
        label = run.arm if run.arm not in {line.get_label() for line in axis.get_lines()} else None
        axis.plot(middle[there], cached[there] / prompt[there], "o-", ms=3, color=COLOURS[run.arm], label=label)
    axis.set(xlabel=f"seconds (windows of {WINDOW_S:g} s)", ylabel="hit ratio of A", ylim=(0, 1))
    axis.legend(loc="center right")
    return _plot(
        "Hit ratio over time", "Engine A. What the cache loses when B bursts comes back when B is idle.", figure
    )


def curves(
    result: BenchResult,
    title: str,
    text: str,
    shown: Mapping[str, str],
    arms: Iterable[str],
    points: Mapping[Any, str],
    *,
    shaded: Iterable[float] = (),
    **axes_options: Any,
) -> Plot:
    """Figures against a number or a name, a line for each arm. `shown`: an axis' title -> its figures' key, with {arm}
    and {point}; `points`: rising numbers, or names -> their names in keys. An axis is logarithmic where its title says
    so."""
    figure, axes = _panels(1, len(shown), 3.5)
    for axis, (heading, key) in zip(axes, shown.items(), strict=True):
        for arm in arms:
            found = [(x, result.figure(key.format(arm=arm, point=point))) for x, point in points.items()]
            known = [(x, y) for x, y in found if y is not None]
            if known:
                axis.plot(*zip(*known, strict=True), "o-", ms=4, lw=2, color=COLOURS.get(arm), label=arm)
        for x in shaded:
            axis.axvspan(x - 0.1, x + 0.1, color="#f3f4f6", zorder=0)
        axis.set(title=heading, yscale="log" if "(log" in heading else "linear", **axes_options)
    axes[0].legend(loc="best")
    return _plot(title, text, figure)
