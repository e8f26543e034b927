"""`polder bench`: measure Polder against stock vLLM on this machine."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["app"]

app = typer.Typer(help="Measure Polder against stock vLLM on this machine.", no_args_is_help=True, add_completion=False)


@app.callback()
def bench() -> None:
    """Every bench writes JSON of one shape: bench, conditions, arms, ratios, checks."""


class Order(StrEnum):
    """Order of the runs: A is stock, B is Polder."""

    ABBA = "ABBA"
    AB = "AB"


@app.command()
def elastic(
    json_file: Annotated[Path, typer.Option("--json", help="Write the result here.")],
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report with plots here.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="256 requests of the agents instead of 512.")] = False,
    demo: Annotated[bool, typer.Option("--demo", help="As --quick, one run of each arm, no tax stage.")] = False,
    order: Annotated[Order | None, typer.Option(help="Order of runs: A is stock, B is Polder.")] = None,
    workdir: Annotated[Path, typer.Option(help="Models (kept) and logs go here.")] = Path("out/bench"),
) -> None:
    """Two models under one KV budget: fixed halves (stock vLLM) against memory that follows demand (Polder)."""
    from polder.bench.elastic import ElasticBench
    from polder.bench.plan import DEMO, FULL, QUICK

    plan = DEMO if demo else QUICK if quick else FULL
    ElasticBench(plan.ordered(order.value) if order else plan, workdir=workdir).run(json_file, html_file)
