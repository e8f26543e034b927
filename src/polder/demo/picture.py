"""Memory by owner over time, the two runs on one time axis, as an SVG file."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot would choose a display

import numpy as np
from matplotlib.figure import Figure

from polder.bench.harness.timeline import MemorySample
from polder.demo.arms import Seen
from polder.demo.load import BURSTS_S, CHAT, DOCS

__all__ = ["draw"]

COLOURS = {DOCS: "#0f766e", CHAT: "#d97706", "free": "#e5e7eb"}
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: small and sharp
    "svg.hashsalt": "polder",  # the same data give the same file
}
MIB = 1 << 20
STEP_S = 0.5


def draw(runs: Mapping[str, Seen]) -> str:
    """`runs`: title of a panel -> its run, from the top. Returns the <svg> element."""
    end_s = max(seen.wall_s for seen in runs.values())
    with matplotlib.rc_context(STYLE), io.StringIO() as file:
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        axes = np.ravel(figure.subplots(len(runs), 1, sharex=True, sharey=True))
        for axis, (title, seen) in zip(axes, runs.items(), strict=True):
            _panel(axis, title, seen)
        axes[-1].set(xlabel="seconds since the first request", xlim=(0, max(end_s, *BURSTS_S)))
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=4)
        figure.patch.set_facecolor("white")  # readable on a dark page, too
        figure.savefig(file, format="svg", metadata={"Date": None})
        svg = file.getvalue()
    return re.sub(r"\n\s*", "\n", svg[svg.index("<svg") :])


def _panel(axis: Any, title: str, seen: Seen) -> None:
    samples = _every(seen.memory, seen.wall_s)
    t = np.array([sample.t_s for sample in samples])
    held = {m: np.array([s.held_bytes.get(m, 0) for s in samples]) / MIB for m in (DOCS, CHAT)}
    busy = {m: np.array([s.busy_bytes.get(m, 0) for s in samples]) / MIB for m in (DOCS, CHAT)}
    free = np.array([sample.free_bytes for sample in samples]) / MIB
    total = held[DOCS] + free + held[CHAT]
    areas = {"held by docs": held[DOCS], "free": free, "held by chat": held[CHAT]}
    colours = [COLOURS[DOCS], COLOURS["free"], COLOURS[CHAT]]
    axis.stackplot(t, *areas.values(), labels=list(areas), colors=colours, step="post", alpha=0.85, lw=0)
    in_use = {"color": "#111827", "lw": 1.0, "drawstyle": "steps-post"}
    axis.plot(t, busy[DOCS], label="in use by requests", **in_use)
    axis.plot(t, total - busy[CHAT], **in_use)
    top = total.max(initial=1)
    axis.plot(BURSTS_S, [top * 1.04] * len(BURSTS_S), "v", color=COLOURS[CHAT], ms=6, clip_on=False)
    axis.axvline(seen.wall_s, color="#111827", lw=1, ls=":")
    axis.annotate("last answer", (seen.wall_s, top * 0.5), xytext=(-4, 0), textcoords="offset points", ha="right")
    axis.set(ylabel="KV memory, MiB", ylim=(0, top))
    axis.set_title(title, loc="left", fontsize=10, fontweight="bold")


def _every(samples: list[MemorySample], end_s: float) -> list[MemorySample]:
    """A sample for each step, which keeps the file small; the last one stands until the end."""
    kept: list[MemorySample] = []
    for sample in samples:
        if not kept or sample.t_s - kept[-1].t_s >= STEP_S:
            kept.append(sample)
    return [*kept, MemorySample(t_s=end_s, **_sizes(samples[-1]))] if samples else []


def _sizes(sample: MemorySample) -> dict[str, Any]:
    return {"free_bytes": sample.free_bytes, "held_bytes": sample.held_bytes, "busy_bytes": sample.busy_bytes}
