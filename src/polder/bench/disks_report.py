"""The result of `polder bench disks` for people: tables on the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import msgspec
from rich.console import Console

from polder.bench.checks import Check
from polder.bench.disks_plan import ARMS, CO_ACTIVATED, DISKS, SETS, engine_of, wall_engine_of
from polder.bench.report.metrics import Metric
from polder.bench.report.result import BenchResult
from polder.bench.report.tables import Table, html_checks, html_table, print_checks, print_tables
from polder.bench.stages.layouts import PARTS
from polder.bench.stages.live import LIVE_ARMS, LIVE_DISKS, LIVE_SETS

__all__ = ["print_disks", "render_disks_html", "write_disks_html"]

MOST = "8"
"""Disks of which bytes and requests are shown, and of the plot."""


def print_disks(console: Console, result: BenchResult, checks: Sequence[Check]) -> None:
    print_tables(console, _tables(result))
    print_checks(console, checks)


def write_disks_html(path: Path, result: BenchResult, checks: Sequence[Check]) -> None:
    path.write_text(render_disks_html(result, checks))


def render_disks_html(result: BenchResult, checks: Sequence[Check]) -> str:
    template = Template((files("polder.bench") / "data" / "report.html").read_text())
    machine = result.conditions.get("machine", {})
    over = result.arms.get("polder", {}).get(engine_of(CO_ACTIVATED, MOST), {}).get("over_even")
    tile = (
        f"<div class='tile'><b>{over:.3f}</b><span>I/O time over the same requests evenly on 8 disks</span></div>"
        if isinstance(over, float)
        else ""
    )
    return template.substitute(
        title="KV on several disks",
        subtitle=escape(
            "Layouts of the same blocks on the same modelled disks, measured on steps that they were not made from."
        ),
        tiles=tile,
        sections="\n".join([html_checks(checks), _plot(result), *map(html_table, _tables(result))]),
        conditions_line=escape(f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores"),
        conditions=escape(msgspec.json.format(msgspec.json.encode(result.conditions), indent=2).decode()),
    )


def _tables(result: BenchResult) -> Iterator[Table]:
    for name in SETS:
        if any(_of(result, arm, name, disks) for arm in ARMS for disks in DISKS):
            yield _set_table(result, name)
    if any(_of(result, arm, name, MOST) for arm in ARMS for name in SETS):
        yield _bytes_table(result)
    shares = list(_share_rows(result))
    if shares:
        title = "Striped successive pages over polder: the gain in I/O time, each part's factor, its share of the gain"
        yield Table(title, ["gain", *PARTS], shares)
    live = list(_live_rows(result))
    if live:
        title = f"An entry store at work on {LIVE_DISKS} disks: I/O time of a step in us, shares of wanted entries in %"
        columns = [
            "first",
            "packed",
            "aged",
            "last",
            "all batches",
            "in memory",
            "ahead",
            "of ahead used",
            "packings",
            "pages moved",
        ]
        yield Table(title, columns, live)
    wall = list(_wall_rows(result))
    if wall:
        title = f"Really read from emulated disks: {CO_ACTIVATED}, wall time of a step over the modelled one"
        yield Table(title, ["wall, ms", "model, ms", "ratio", "late", "MiB"], wall)


def _set_table(result: BenchResult, name: str) -> Table:
    arms = [arm for arm in ARMS if any(_of(result, arm, name, disks) for disks in DISKS)]
    rows = [["I/O time, ms", *("" for _ in DISKS)]]
    for arm in arms:
        rows.append([arm, *(_text(_of(result, arm, name, disks).get("io_time_s"), 3, 1e3) for disks in DISKS)])
    if "polder" in arms and len(arms) > 1:
        rows.append(["times polder's", *("" for _ in DISKS)])
        for arm in arms[:-1]:
            ratios = [result.ratios.get(f"polder/{arm}:{engine_of(name, disks)}.io_time_s") for disks in DISKS]
            rows.append([arm, *("" if ratio is None else f"{1 / ratio:.2f}" for ratio in ratios)])
    rows.append(["over the bound", *("" for _ in DISKS)])
    for arm in arms:
        rows.append([arm, *(_text(_of(result, arm, name, disks).get("over_bound"), 3) for disks in DISKS)])
    return Table(f"{name}, a step by disks: {result.conditions['sets'][name]['what']}", list(DISKS), rows)


def _bytes_table(result: BenchResult) -> Table:
    names = [name for name in SETS if any(_of(result, arm, name, MOST) for arm in ARMS)]
    rows = []
    for title, metric, digits, scale in (
        ("read / wanted", "amplification", 2, 1.0),
        ("requests", "requests", 0, 1.0),
        ("stored, MiB", "stored_bytes", 0, 2**-20),
    ):
        rows.append([title, *("" for _ in names)])
        for arm in ARMS:
            if arm in result.arms:
                rows.append([arm, *(_text(_of(result, arm, n, MOST).get(metric), digits, scale) for n in names)])
    return Table(f"Bytes and requests of a step, on {MOST} disks", names, rows)


def _share_rows(result: BenchResult) -> Iterator[list[str]]:
    for name in SETS:
        for disks in DISKS:
            of = _of(result, "stage-parts", name, disks)
            if of:
                factors = [_text(of[f"{part}_factor"], 2) for part in PARTS]
                shares = [_text(of.get(f"{part}_share"), 0, 100) for part in PARTS]
                texts = [f"{f} {s}%" if s else f for f, s in zip(factors, shares, strict=True)]
                yield [f"{name} {disks}", _text(of["gain"], 2), *texts]


def _wall_rows(result: BenchResult) -> Iterator[list[str]]:
    prefix = wall_engine_of(CO_ACTIVATED, "")
    for arm, engines in result.arms.items():
        for engine, of in engines.items():
            if engine.startswith(prefix):
                yield [
                    f"{arm} {engine.removeprefix(prefix)}",
                    *(_text(of[key], 1, 1e3) for key in ("wall_s", "modelled_s")),
                    _text(of["wall_over_modelled"], 4),
                    f"{_text(of['late_steps'], 0)} of {_text(of['steps'], 0)}",
                    _text(of["read_bytes"], 0, 2**-20),
                ]


def _live_rows(result: BenchResult) -> Iterator[list[str]]:
    for arm in LIVE_ARMS:
        for name in LIVE_SETS:
            of = _of(result, arm, name, LIVE_DISKS)
            if of:
                times = [_text(of[f"io_time_{part}_s"], 1, 1e6) for part in ("first", "packed", "aged", "last")]
                times.append(_text(of["disk_time_s"], 1, 1e6))
                shares = [_text(of[f"{part}_share"], 1, 100) for part in ("resident", "ahead", "ahead_used")]
                yield [f"{arm} {name}", *times, *shares, _text(of["packed"], 0), _text(of["rewritten_pages"], 0)]


def _plot(result: BenchResult) -> str:
    """I/O time on 8 disks over polder's, bars for each arm, by set."""
    names = [name for name in SETS if _of(result, "polder", name, MOST)]
    arms = [arm for arm in ARMS if arm in result.arms]
    if not names:
        return ""
    import matplotlib
    from matplotlib.figure import Figure

    from polder.bench.report.plots import STYLE, svg

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        axis = figure.subplots()
        width = 0.8 / len(arms)
        for number, arm in enumerate(arms):
            times = [_number(_of(result, arm, name, MOST).get("io_time_s")) or 0.0 for name in names]
            ours = [_number(_of(result, "polder", name, MOST).get("io_time_s")) or 1.0 for name in names]
            at = [place + (number - (len(arms) - 1) / 2) * width for place in range(len(names))]
            axis.bar(at, [taken / our for taken, our in zip(times, ours, strict=True)], width, label=arm)
        axis.axhline(1.0, color="#9ca3af", lw=0.8)
        axis.set(ylabel="I/O time over polder's (log scale)", yscale="log")
        axis.set_xticks(range(len(names)), names)
        axis.legend(loc="upper left", ncols=4)
        return f"<section><h2>I/O time of a step on 8 disks</h2>{svg(figure)}</section>"


def _of(result: BenchResult, arm: str, access_set: str, disks: str) -> dict[str, Metric]:
    return result.arms.get(arm, {}).get(engine_of(access_set, disks), {})


def _number(metric: Metric | None) -> float | None:
    return None if isinstance(metric, dict) else metric


def _text(metric: Metric | None, digits: int, scale: float = 1.0) -> str:
    number = _number(metric)
    return "" if number is None else f"{scale * number:,.{digits}f}"
