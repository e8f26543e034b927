"""The result of `polder bench tenants` for people: tables on the terminal, and one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template

import msgspec
from rich.console import Console

from polder.bench.checks import Check
from polder.bench.report.result import BenchResult
from polder.bench.report.tables import Table, cell, html_checks, html_table, print_checks, print_tables
from polder.bench.tenants_checks import exhausted_loads
from polder.bench.tenants_plan import ARMS

__all__ = ["print_tenants", "render_tenants_html", "write_tenants_html"]

SHOWN = {
    "output_tokens_per_s": "output tokens per s",
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "tbt_p50_ms": "TBT p50, ms",
    "tbt_p99_ms": "TBT p99, ms",
    "hit_ratio": "prompt tokens found, part",
    "kv_exhausted_part": "time in which contexts exceed stock's pool, part",
    "preemptions": "preemptions",
    "wakes": "models woken",
    "layers_loaded": "layers copied in",
    "failed_requests": "failed requests",
}
COMEBACK = (
    *("stock-resident", "polder-resident", "polder-streamed", "polder-whole"),
    *("polder-streamed-link", "polder-whole-link", "stock-anew"),
)
SUBTITLE = "Three models under one budget for weights and KV: fixed parts, elastic KV, and weights that make room too."


def print_tenants(console: Console, result: BenchResult, checks: Sequence[Check]) -> None:
    """One table a figure of the sweep, one each of the other stages, then the checks, passed and missed alike."""
    print_tables(console, _tables(result))
    print_checks(console, checks)


def write_tenants_html(path: Path, result: BenchResult, checks: Sequence[Check]) -> None:
    path.write_text(render_tenants_html(result, checks))


def render_tenants_html(result: BenchResult, checks: Sequence[Check]) -> str:
    template = Template((files("polder.bench") / "data" / "report.html").read_text())
    machine = result.conditions.get("machine", {})
    return template.substitute(
        title="Three models, one budget",
        subtitle=escape(SUBTITLE),
        tiles="".join(
            f"<div class='tile'><b>{ratio:.2f}</b><span>{escape(text)}</span></div>" for ratio, text in _tiles(result)
        ),
        sections="\n".join([html_checks(checks), *_plots(result), *map(html_table, _tables(result))]),
        conditions_line=escape(f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores"),
        conditions=escape(msgspec.json.format(msgspec.json.encode(result.conditions), indent=2).decode()),
    )


def _tiles(result: BenchResult) -> Iterator[tuple[float, str]]:
    for key, title in (
        ("polder/stock:all.output_tokens_per_s", "throughput over stock's where its KV is exhausted"),
        ("polder/stock:all.ttft_p99_ms", "p99 TTFT over stock's there"),
        ("polder/stock:all.tbt_p99_ms", "p99 TBT over stock's there"),
        ("polder/kv-only:all.output_tokens_per_s", "throughput over elastic KV's alone there"),
    ):
        if key in result.ratios:
            yield result.ratios[key], title


def _plots(result: BenchResult) -> Iterator[str]:
    from polder.bench.tenants_plots import sweep

    loads = _loads(result)
    if len(loads) > 1:
        text = "All models together. Shaded: rates at which the contexts asked for at once do not fit stock's pools."
        drawn = sweep(result.arms, loads, exhausted_loads(result.arms, loads))
        yield f"<section><h2>One model at a time</h2><p class='soft'>{text}</p>{drawn}</section>"


def _tables(result: BenchResult) -> Iterator[Table]:
    """Behind an arm's figure stands its ratio to stock's."""
    loads = _loads(result)
    for metric, title in SHOWN.items():
        rows = [[load, *_row(result, load, metric)] for load in loads]
        if any(text for _, *texts in rows for text in texts):
            yield Table(f"One model at a time, by rate: {title}", list(ARMS), rows)
    spatial = [[title, *_row(result, "spatial", metric)] for metric, title in SHOWN.items()]
    if any(text for _, *texts in spatial for text in texts):
        yield Table("Two models at a time", list(ARMS), spatial)
    yield from _comeback(result)
    yield from _streaming(result)
    if "polder-equality" in result.arms:
        found = result.arms["polder-equality"]["all"]
        rows = [[name.replace("_", " "), cell(value)] for name, value in found.items()]
        yield Table("The same tokens as stock (float32)", ["polder"], rows)


def _comeback(result: BenchResult) -> Iterator[Table]:
    found = {arm: metrics for arm in COMEBACK for metrics in result.arms.get(arm, {}).values()}
    if found:
        names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
        rows = [[name.replace("_", " "), *(cell(metrics.get(name)) for metrics in found.values())] for name in names]
        yield Table("The first token of a model that was asleep", list(found), rows)


def _streaming(result: BenchResult) -> Iterator[Table]:
    for found in result.arms.get("polder-streaming", {}).values():
        given_up = range(sum(name.startswith("step_") for name in found))
        names = {"step": "measured, ms", "formula": "formula, ms", "layer": "copy of a layer, ms"}
        rows = [[title, *(cell(found.get(f"{name}_{n}_ms")) for n in given_up)] for name, title in names.items()]
        yield Table("A step, by layers given up", [str(n) for n in given_up], rows)


def _row(result: BenchResult, load: str, metric: str) -> list[str]:
    return [
        cell(
            result.arms.get(f"{arm}-{load}", {}).get("all", {}).get(metric),
            result.ratios.get(f"{arm}-{load}/stock-{load}:all.{metric}"),
        )
        for arm in ARMS
    ]


def _loads(result: BenchResult) -> list[str]:
    """Of the temporal stage, rising."""
    return [f"x{rate:g}" for rate in sorted(result.conditions["plan"]["rates"]) if _ran(result, f"x{rate:g}")]


def _ran(result: BenchResult, load: str) -> bool:
    return any(f"{arm}-{load}" in result.arms for arm in ARMS)
