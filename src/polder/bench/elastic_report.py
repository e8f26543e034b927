"""A bench's result for people: a table on the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import msgspec
from rich.console import Console
from rich.table import Table

from polder.bench.checks import Check
from polder.bench.harness.runs import Run
from polder.bench.report.metrics import Metric
from polder.bench.report.result import BenchResult

__all__ = ["print_report", "render_html", "write_html"]

SHOWN = {
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p90_ms": "TTFT p90, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "tbt_p50_ms": "TBT p50, ms",
    "tbt_p99_ms": "TBT p99, ms",
    "tbt_worst10_ms": "TBT, slowest tenth, ms",
    "hit_ratio": "prefix hit ratio",
    "computed_prompt_tokens_per_s": "prompt tokens computed per s",
    "output_tokens_per_s": "output tokens per s",
    "requests_per_s": "requests per s",
    "goodput_requests_per_s": "requests per s within 500 / 100 ms",
    "makespan_s": "time to the last reply, s",
    "preemptions": "preemptions",
    "failed_requests": "failed requests",
}
ENGINES = {"A": "A: agents, closed loop", "B": "B: bursts, open loop", "all": "both"}
SIDE_STAGES = {
    "polder-resize": "Resize of 100 pages under load",
    "polder-equality": "Same tokens while memory moves",
    "stock-alone": "Engine B alone: stock",
    "polder-alone": "Engine B alone: elastic",
}


def print_report(console: Console, result: BenchResult, checks: Sequence[Check]) -> None:
    """Metrics of both arms with their ratios, then the checks, passed and missed alike."""
    table = Table(title=f"polder bench {result.bench}", title_justify="left", header_style="bold")
    for heading in ("", "stock", "polder", "polder / stock"):
        table.add_column(heading, justify="left" if not heading else "right")
    for engine, title in ENGINES.items():
        table.add_section()
        table.add_row(f"[bold]{title}[/]")
        for name, *values in _rows(result, engine):
            table.add_row(f"  {name}", *values)
    console.print(table)
    for check in checks:
        mark = "[green]ok    [/]" if check.passed else "[bold red]MISSED[/]"
        console.print(f"{mark} {check.name}: {check.detail}", highlight=False, soft_wrap=True)


def write_html(path: Path, result: BenchResult, checks: Sequence[Check], runs: Sequence[Run]) -> None:
    path.write_text(render_html(result, checks, runs))


def render_html(result: BenchResult, checks: Sequence[Check], runs: Sequence[Run]) -> str:
    """The page. `runs` are drawn; without any, the page has no plots."""
    template = Template((files("polder.bench") / "data" / "report.html").read_text())
    conditions = result.conditions
    machine = conditions.get("machine", {})
    loads = [max(run.load_before, run.load_after) for run in runs]
    line = (
        f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores; "
        f"highest load average around a run {max(loads, default=0):g}; order {', '.join(conditions.get('order', []))}"
    )
    return template.substitute(
        title="Two models, one KV budget",
        subtitle=escape(
            "Stock vLLM with the budget in fixed halves, against Polder, where memory follows demand. Same models, same requests, "
            f"same bytes. {conditions.get('started', '')}"
        ),
        tiles="".join(f"<div class='tile'><b>{escape(b)}</b><span>{escape(t)}</span></div>" for b, t in _tiles(result)),
        sections="\n".join(_sections(result, checks, runs)),
        conditions_line=escape(line),
        conditions=escape(msgspec.json.format(msgspec.json.encode(conditions), indent=2).decode()),
    )


def _tiles(result: BenchResult) -> Iterator[tuple[str, str]]:
    """The figures that matter, big."""
    ratio = result.ratios.get("polder/stock:A.ttft_p99_ms")
    if ratio:
        yield f"{1 / ratio:.1f}×", "A: p99 TTFT, stock's over Polder's"
    theirs, ours = (result.arms.get(arm, {}).get("A", {}).get("hit_ratio") for arm in ("stock", "polder"))
    if isinstance(theirs, float) and isinstance(ours, float):
        yield f"{100 * theirs:.0f} → {100 * ours:.0f} %", "A: prompt tokens found in the cache"
    ratio = result.ratios.get("polder/stock:B.ttft_p99_ms")
    if ratio:
        yield f"{ratio:.2f}", "B: p99 TTFT, Polder's over stock's"
    giveback = result.arms.get("polder", {}).get("B", {}).get("giveback_p99_ms")
    if isinstance(giveback, float):
        yield f"{giveback:.0f} ms", "give-back p99, need to mapped pages"


def _sections(result: BenchResult, checks: Sequence[Check], runs: Sequence[Run]) -> Iterator[str]:
    rows = "".join(
        f"<tr><td class='{'yes' if c.passed else 'no'}'>{'met' if c.passed else 'missed'}</td>"
        f"<td class='text'><code>{escape(c.name)}</code></td><td class='text'>{escape(c.detail)}</td></tr>"
        for c in checks
    )
    yield f"<section><h2>Checks</h2><div class='scroll'><table>{rows}</table></div></section>"
    if runs:
        yield from _plots(runs)
    yield f"<section><h2>Metrics</h2>{_metrics_table(result)}</section>"
    side = "".join(
        f"<tr class='group'><td colspan='2'>{title}</td></tr>"
        + "".join(f"<tr><td>{escape(m)}</td><td>{_number(v)}</td></tr>" for m, v in _flat(result.arms[arm]))
        for arm, title in SIDE_STAGES.items()
        if arm in result.arms
    )
    if side:
        yield f"<section><h2>Side stages</h2><div class='scroll'><table>{side}</table></div></section>"


def _plots(runs: Sequence[Run]) -> Iterator[str]:
    from polder.bench.report import plots

    yield _figure(
        "Time to first token",
        "From the moment a request was due. Dots mark the 99th percentile.",
        plots.ttft_distribution(runs),
    )
    elastic = [run for run in runs if run.timeline.samples]
    if elastic:
        yield _figure(
            "Memory by owner",
            "First run of Polder. The dashed line is where stock cuts the budget in two.",
            plots.memory_over_time(elastic[0]),
        )
    yield _figure(
        "Hit ratio over time",
        "Engine A. What the cache loses when B bursts comes back when B is idle.",
        plots.hit_ratio_over_time(runs),
    )


def _figure(title: str, text: str, svg: str) -> str:
    return f"<section><h2>{title}</h2><p class='soft'>{text}</p>{svg}</section>"


def _metrics_table(result: BenchResult) -> str:
    body = ""
    for engine, title in ENGINES.items():
        body += f"<tr class='group'><td colspan='4'>{title}</td></tr>"
        for row in _rows(result, engine):
            body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
    head = "<tr><th></th><th>stock</th><th>polder</th><th>polder / stock</th></tr>"
    return f"<div class='scroll'><table>{head}{body}</table></div>"


def _rows(result: BenchResult, engine: str) -> Iterator[tuple[str, str, str, str]]:
    stock, polder = (result.arms.get(arm, {}).get(engine, {}) for arm in ("stock", "polder"))
    for metric, title in SHOWN.items():
        if metric in stock or metric in polder:
            key = f"polder/stock:{engine}.{metric}"
            ratio = f"{result.ratios[key]:.3f}" if key in result.ratios else ""
            interval = result.conditions.get("intervals", {}).get(key)
            if interval and ratio:
                ratio += f" ({interval[0]:.2f}-{interval[1]:.2f})"
            yield title, _number(stock.get(metric)), _number(polder.get(metric)), ratio


def _flat(engines: Mapping[str, Mapping[str, Metric]]) -> Iterator[tuple[str, Metric]]:
    for metrics in engines.values():
        yield from ((name, value) for name, value in metrics.items() if not isinstance(value, dict))


def _number(value: Metric | None) -> str:
    if value is None or isinstance(value, dict):
        return ""
    digits = 0 if value == int(value) or abs(value) >= 1000 else 1 if abs(value) >= 10 else 3
    return f"{value:,.{digits}f}"
