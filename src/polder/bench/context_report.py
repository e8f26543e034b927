"""The result of `polder bench context` for people: tables on the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import matplotlib
import msgspec
from matplotlib.figure import Figure
from rich.console import Console

from polder.bench.checks import Check
from polder.bench.report.plots import STYLE, svg
from polder.bench.report.result import BenchResult
from polder.bench.report.tables import Table, cell, html_checks, html_table, print_checks, print_tables

__all__ = ["print_context", "render_context_html", "write_context_html"]

SHOWN = {
    "ttft": "TTFT, ms",
    "planned_ttft": "TTFT planned, ms",
    "tbt": "TBT p50, ms",
    "planned_tbt": "TBT planned, ms",
}


def print_context(console: Console, result: BenchResult, checks: Sequence[Check]) -> None:
    print_tables(console, _tables(result))
    print_checks(console, checks)


def write_context_html(path: Path, result: BenchResult, checks: Sequence[Check]) -> None:
    path.write_text(render_context_html(result, checks))


def render_context_html(result: BenchResult, checks: Sequence[Check]) -> str:
    template = Template((files("polder.bench") / "data" / "report.html").read_text())
    machine = result.conditions.get("machine", {})
    ratio = result.ratios.get("window/stock:all.context_tokens")
    tile = f"<div class='tile'><b>{ratio:.2f}</b><span>longest context over stock's</span></div>" if ratio else ""
    return template.substitute(
        title="Contexts longer than the device's KV memory",
        subtitle=escape("The same KV bytes on the device: stock, and windows of w layers over a store in host memory."),
        tiles=tile,
        sections="\n".join([html_checks(checks), _plot(result), *map(html_table, _tables(result))]),
        conditions_line=escape(f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores"),
        conditions=escape(msgspec.json.format(msgspec.json.encode(result.conditions), indent=2).decode()),
    )


def _tables(result: BenchResult) -> Iterator[Table]:
    arms = list(result.arms)
    longest = ["longest context, tokens", *(cell(result.arms[arm]["all"].get("context_tokens")) for arm in arms)]
    yield Table("The same KV bytes on the device", arms, [longest])
    for metric, title in SHOWN.items():
        rows = [
            [str(length), *(cell(result.arms[arm]["all"].get(f"{metric}_{length}_ms")) for arm in arms)]
            for length in _lengths(result)
        ]
        if any(any(texts) for _, *texts in rows):
            yield Table(f"{title}, by context", arms, rows)


def _lengths(result: BenchResult) -> list[int]:
    names = {name for of in result.arms.values() for name in of["all"]}
    return sorted(int(name.split("_")[1]) for name in names if name.startswith("tbt_"))


def _plot(result: BenchResult) -> str:
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        for axis, metric in zip(figure.subplots(1, 2), ("ttft", "tbt"), strict=True):
            for arm, of in result.arms.items():
                points = [
                    (n, of["all"][f"{metric}_{n}_ms"]) for n in _lengths(result) if f"{metric}_{n}_ms" in of["all"]
                ]
                axis.plot([n for n, _ in points], [value for _, value in points], "o-", ms=3, label=arm)
            axis.set(xlabel="context, tokens", title=SHOWN[metric] + " (log scales)", xscale="log", yscale="log")
        figure.axes[0].legend(loc="upper left")
        return f"<section><h2>What a longer context costs</h2>{svg(figure)}</section>"
