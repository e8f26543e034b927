"""The page that the demo leaves behind (report.html), and the same for a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import jinja2
import rich.table
from rich.console import Console

from polder.bench.harness.driver import RequestRecord
from polder.bench.report.result import BenchResult
from polder.demo.figures import tiles
from polder.demo.load import CHAT, DOCS, Chat
from polder.units import format_bytes

__all__ = ["page", "print_summary"]

ROWS = {
    "docs: median wait for the first token": f"{DOCS}.ttft_p50_ms",
    "docs: longest 1 % of these waits": f"{DOCS}.ttft_p99_ms",
    "docs: median time between tokens": f"{DOCS}.tbt_p50_ms",
    "docs: prompt tokens found in the cache": f"{DOCS}.hit_ratio",
    "chat: median wait for the first token": f"{CHAT}.ttft_p50_ms",
    "chat: longest 1 % of these waits": f"{CHAT}.ttft_p99_ms",
    "chat: median time between tokens": f"{CHAT}.tbt_p50_ms",
    "times that chat got memory of its share back": "all.givebacks",
    "the longest of them": "all.giveback_max_ms",
    "time until the last answer": "all.wall_s",
    "failed requests": f"{DOCS}.failed_requests",
}
FLEET = """# fleet.toml
[memory]
kv_budget = "48GiB"                # KV memory of all models together, on one device

[[model]]
name = "docs"
path = "meta-llama/Llama-3.1-8B-Instruct"
max_model_len = 32768

[[model]]
name = "chat"
path = "Qwen/Qwen3-8B"
max_model_len = 16384"""


def page(result: BenchResult, picture: str, records: Iterable[RequestRecord], chat: Chat) -> str:
    """`records`: of the requests whose answers are shown."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.PackageLoader("polder.demo", "")
    )
    machine = result.conditions["machine"]
    return environment.get_template("report.html").render(
        model=result.conditions["model"].partition(":")[0],
        budget=format_bytes(result.conditions["budget_bytes"]),
        machine=f"{machine['cores']} cores of {machine['cpu']}",
        tiles=tiles(result),
        picture=picture,
        rows=list(_rows(result)),
        answers=[(record.key, chat.answer(record)) for record in records],
        fleet=FLEET,
    )


def print_summary(console: Console, result: BenchResult) -> None:
    table = rich.table.Table("", "stock vLLM, fixed halves", "Polder, same bytes", box=None, header_style="bold")
    for row in _rows(result):
        table.add_row(*row)
    console.print(table)
    for value, text in tiles(result):
        console.print(f"{value}: {text}", highlight=False)


def _rows(result: BenchResult) -> Iterator[tuple[str, str, str]]:
    for heading, figure in ROWS.items():
        stock, polder = (_text(figure, result.figure(f"{arm}:{figure}")) for arm in ("stock", "polder"))
        if polder:
            yield heading, stock, polder


def _text(figure: str, value: float | None) -> str:
    if value is None:
        return ""
    if figure.endswith("_ms"):
        return f"{value / 1e3:.2f} s" if value >= 1000 else f"{value:.0f} ms"
    if figure.endswith("_s"):
        return f"{value:.0f} s"
    return f"{value:.0%}" if figure.endswith("_ratio") else f"{value:.0f}"
