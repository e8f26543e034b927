"""The report's plots, as SVG text to be put into an HTML page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot would choose a display

import numpy as np
from matplotlib.figure import Figure

from polder.bench.harness.runs import Run
from polder.bench.report.metrics import RunRecords, ttfts_ms

__all__ = ["STYLE", "hit_ratio_over_time", "memory_over_time", "svg", "ttft_distribution"]

COLOURS = {"stock": "#8a94a6", "polder": "#0f766e", "A": "#0f766e", "B": "#d97706", "free": "#e5e7eb"}
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


def ttft_distribution(runs: Sequence[Run]) -> str:
    """Share of requests whose first token came within x, an axis for each engine, a line for each arm."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        for axis, engine in zip(figure.subplots(1, 2, sharey=True), ("A", "B"), strict=True):
            for arm in ("stock", "polder"):
                values = np.sort(np.concatenate([_ttfts(run, engine) for run in runs if run.arm == arm] or [[]]))
                if not len(values):
                    continue
                share = np.arange(1, len(values) + 1) / len(values)
                axis.plot(values, share, drawstyle="steps-post", color=COLOURS[arm], lw=2, label=arm)
                p99 = float(np.percentile(values, 99))
                axis.plot([p99], [0.99], "o", color=COLOURS[arm], ms=5)
            axis.set(
                xscale="log", xlabel="time to first token, ms (log scale)", title=f"Engine {engine}", ylim=(0, 1.02)
            )
            axis.axhline(0.99, color="#9ca3af", lw=0.8, ls=":")
            axis.legend(loc="lower right")
        figure.axes[0].set_ylabel("share of requests")
        figure.axes[0].annotate(
            "p99",
            (1, 0.99),
            xycoords=("axes fraction", "data"),
            xytext=(-24, -11),
            textcoords="offset points",
            color="#6b7280",
        )
        return svg(figure)


def memory_over_time(run: Run) -> str:
    """KV memory by owner during one run of the elastic arm, what of it is in use, and B's requests as they come."""
    samples = run.timeline.samples
    t = np.array([sample.t_s - run.started_at for sample in samples])
    held = {e: np.array([s.held_bytes.get(e, 0) for s in samples]) / MIB for e in ("A", "B")}
    busy = {e: np.array([s.busy_bytes.get(e, 0) for s in samples]) / MIB for e in ("A", "B")}
    free = np.array([sample.free_bytes for sample in samples]) / MIB
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        axis, arrivals = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
        areas = axis.stackplot(
            t,
            *(held["A"], free, held["B"]),
            colors=[COLOURS["A"], COLOURS["free"], COLOURS["B"]],
            labels=["held by A", "free", "held by B"],
            step="post",
            alpha=0.85,
        )
        total = held["A"] + free + held["B"]
        in_use = {"color": "#111827", "lw": 1.0, "drawstyle": "steps-post"}
        axis.plot(t, busy["A"], label="in use by running requests", **in_use)
        axis.plot(t, total - busy["B"], **in_use)
        axis.axhline(total.max(initial=0) / 2, color="white", lw=1, ls="--")
        axis.set(ylabel="KV memory, MiB", ylim=(0, total.max(initial=1)), xlim=(0, t.max(initial=1)))
        lines = axis.get_lines()[:1]
        axis.legend(handles=[*areas, *lines], loc="upper center", ncols=4, bbox_to_anchor=(0.5, 1.12))
        due = [record.scheduled_s for record in run.records.get("B", [])]
        seconds = np.arange(0, max(t.max(initial=1), 1) + 1)
        arrivals.bar(seconds[:-1], np.histogram(due, seconds)[0], width=1.0, align="edge", color=COLOURS["B"])
        arrivals.set(xlabel="seconds", ylabel="B's req/s")
        return svg(figure)


def hit_ratio_over_time(runs: Sequence[Run]) -> str:
    """Prefix hit ratio of engine A's requests in windows, a line for each run."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 2.9), layout="constrained")
        axis = figure.subplots()
        seen: set[str] = set()
        for run in runs:
            good = RunRecords(records=run.records["A"]).good
            if not good:
                continue
            window = np.array([record.scheduled_s // WINDOW_S for record in good], dtype=np.int64)
            prompt = np.bincount(window, weights=[record.prompt_tokens for record in good])
            cached = np.bincount(window, weights=[record.cached_tokens for record in good])
            there = prompt > 0
            middle = (np.arange(len(prompt)) + 0.5) * WINDOW_S
            label = None if run.arm in seen else run.arm
            seen.add(run.arm)
            axis.plot(
                middle[there], cached[there] / prompt[there], "o-", ms=3, lw=1.8, color=COLOURS[run.arm], label=label
            )
        axis.set(xlabel=f"seconds (windows of {WINDOW_S:g} s)", ylabel="hit ratio of A", ylim=(0, 1))
        axis.legend(loc="center right")
        return svg(figure)


def _ttfts(run: Run, engine: str) -> Any:
    return ttfts_ms(RunRecords(records=run.records.get(engine, [])).good)


def svg(figure: Figure) -> str:
    """The <svg> element alone, scaling with the page."""
    with io.StringIO() as file:
        figure.savefig(file, format="svg", metadata={"Date": None})
        text = file.getvalue()
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', 'width="100%"', text[text.index("<svg") :], count=1)
