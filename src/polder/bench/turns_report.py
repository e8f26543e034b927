"""The result of `polder bench turns` for people: tables on the terminal, and one HTML file that needs nothing else."""

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
from polder.bench.turns_plan import ARMS, RESTART_ARMS

__all__ = ["print_turns", "render_turns_html", "write_turns_html"]

SHOWN = {
    "ttft_p50_ms": "TTFT p50, ms",
    "ttft_p90_ms": "TTFT p90, ms",
    "ttft_p99_ms": "TTFT p99, ms",
    "tbt_p50_ms": "TBT p50, ms",
    "tbt_p99_ms": "TBT p99, ms",
    "hit_ratio": "prompt tokens found, part",
    "first_turn_hit_ratio": "of first turns' prompts, part",
    "tier_hit_ratio": "of these in a tier, part of all",
    "computed_prompt_tokens_per_s": "prompt tokens computed per s",
    "output_tokens_per_s": "output tokens per s",
    "busy_output_tokens_per_s": "output tokens per busy s",
    "goodput_requests_per_s": "requests per s within 500 / 100 ms",
    "makespan_s": "time to the last reply, s",
    "preemptions": "preemptions",
    "failed_requests": "failed requests",
}
GROUPS = (
    ("A: agents", "", "A"),
    ("B: bursts, beside the agents", "", "B"),
    ("A: chat", "-chat", "A"),
    ("B: bursts, measured alone", "-lender", "B"),
    ("A: agents over disks, alone", "-before", "A"),
    ("A: the same sessions after a restart", "-restart", "A"),
    ("A: nothing to reuse, one at a time", "-noreuse-1", "A"),
    ("A: nothing to reuse, four at a time", "-noreuse-4", "A"),
)
"""Title, suffix of the arms' names, engine."""


def print_turns(console: Console, result: BenchResult, checks: Sequence[Check]) -> None:
    """One table a stage with the arms side by side, then the checks, passed and missed alike."""
    print_tables(console, _tables(result))
    console.print(result.conditions["links"], highlight=False, soft_wrap=True)
    print_checks(console, checks)


def write_turns_html(path: Path, result: BenchResult, checks: Sequence[Check]) -> None:
    path.write_text(render_turns_html(result, checks))


def render_turns_html(result: BenchResult, checks: Sequence[Check]) -> str:
    template = Template((files("polder.bench") / "data" / "report.html").read_text())
    conditions = result.conditions
    machine = conditions.get("machine", {})
    return template.substitute(
        title="Many turns, one small pool",
        subtitle=escape(f"Plain vLLM, vLLM's CPU offloading, and Polder's tiers. {conditions['links']}."),
        tiles="".join(
            f"<div class='tile'><b>{ratio:.2f}</b><span>{escape(t)}</span></div>" for ratio, t in _tiles(result)
        ),
        sections="\n".join([html_checks(checks), *map(html_table, _tables(result))]),
        conditions_line=escape(f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores"),
        conditions=escape(msgspec.json.format(msgspec.json.encode(conditions), indent=2).decode()),
    )


def _tiles(result: BenchResult) -> Iterator[tuple[float, str]]:
    for key, title in (
        ("polder/stock:A.ttft_p99_ms", "A: p99 TTFT, Polder's over stock's"),
        ("polder/native:A.ttft_p99_ms", "A: p99 TTFT, Polder's over native offloading's"),
        ("polder/stock:B.ttft_p99_ms", "B, the lender: p99 TTFT, Polder's over stock's"),
    ):
        if key in result.ratios:
            yield result.ratios[key], title


def _tables(result: BenchResult) -> Iterator[Table]:
    """One of each stage that was run; behind an arm's figure stands its ratio to stock's."""
    for title, suffix, engine in GROUPS:
        arms = [arm for arm in dict.fromkeys((*ARMS, *RESTART_ARMS)) if engine in result.arms.get(arm + suffix, {})]
        if not arms:
            continue
        found = {arm: result.arms[arm + suffix][engine] for arm in arms}
        rows = []
        for metric, name in SHOWN.items():
            if any(metric in metrics for metrics in found.values()):
                ratios = {arm: result.ratios.get(f"{arm}{suffix}/stock{suffix}:{engine}.{metric}") for arm in arms}
                rows.append([name, *(cell(found[arm].get(metric), ratios[arm]) for arm in arms)])
        yield Table(title, arms, rows)
    equal = {arm: result.arms.get(f"{arm}-equality", {}).get("all") for arm in ARMS}
    asked = {arm: metrics for arm, metrics in equal.items() if metrics}
    if asked:
        names = list(dict.fromkeys(name for metrics in asked.values() for name in metrics))
        rows = [[name.replace("_", " "), *(cell(m.get(name)) for m in asked.values())] for name in names]
        yield Table("The same tokens as stock (float32)", list(asked), rows)
