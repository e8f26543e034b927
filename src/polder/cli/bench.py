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
    """Every bench writes JSON of the same shape: bench, conditions, arms, ratios, checks."""


class Order(StrEnum):
    """Order of the runs: A is stock, B is Polder."""

    ABBA = "ABBA"
    AB = "AB"


class LinkEmulation(StrEnum):
    """Whether copies to and from a tier take as long as its link would."""

    EMULATED = "emulated"
    NONE = "none"


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


@app.command()
def turns(
    json_file: Annotated[Path, typer.Option("--json", help="Write the result here.")],
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the tables as HTML here.")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="256 requests of the agents instead of 512, fewer arms and stages.")
    ] = False,
    stages: Annotated[str, typer.Option(help="Only these: agents,chat,noreuse,lender,restart,equality.")] = "",
    arms: Annotated[
        str,
        typer.Option(
            help="Only these: stock,native,polder-host,polder-peer,polder; of restart stock,native-fs,polder-disk."
        ),
    ] = "",
    links: Annotated[
        LinkEmulation, typer.Option(help="Emulated: peer 3.2 GB/s, host 400 MB/s. None: memcpy's speed.")
    ] = LinkEmulation.EMULATED,
    workdir: Annotated[Path, typer.Option(help="Models (kept) and logs go here.")] = Path("out/bench"),
) -> None:
    """Agents of many turns on a pool that is too small: plain vLLM, vLLM's CPU offloading, and Polder's tiers."""
    from dataclasses import replace

    from polder.bench.turns import TurnsBench
    from polder.bench.turns_plan import ARMS, FULL_TURNS, QUICK_TURNS, RESTART_ARMS, STAGES, parse_names

    known = tuple(dict.fromkeys((*ARMS, *RESTART_ARMS)))
    plan = (QUICK_TURNS if quick else FULL_TURNS).only(
        stages=parse_names(stages, STAGES, what="stage"), arms=parse_names(arms, known, what="arm")
    )
    TurnsBench(replace(plan, links=links.value), workdir=workdir).run(json_file, html_file)


@app.command()
def tenants(
    json_file: Annotated[Path, typer.Option("--json", help="Write the result here.")],
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the tables and the plot as HTML here.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two rates instead of four, stock and polder alone, no spatial stage.")
    ] = False,
    stages: Annotated[str, typer.Option(help="Only these: temporal,spatial,comeback,streaming,equality.")] = "",
    arms: Annotated[str, typer.Option(help="Only these: stock,kv-only,polder.")] = "",
    workdir: Annotated[Path, typer.Option(help="Models (kept) and logs go here.")] = Path("out/bench"),
) -> None:
    """Three models under one budget for weights and KV: fixed parts, elastic KV alone, and weights that make room
    too."""
    from polder.bench.tenants import TenantsBench
    from polder.bench.tenants_plan import ARMS, FULL_TENANTS, QUICK_TENANTS, STAGES
    from polder.bench.turns_plan import parse_names

    plan = (QUICK_TENANTS if quick else FULL_TENANTS).only(
        stages=parse_names(stages, STAGES, what="stage"), arms=parse_names(arms, ARMS, what="arm")
    )
    TenantsBench(plan, workdir=workdir).run(json_file, html_file)


@app.command()
def context(
    json_file: Annotated[Path, typer.Option("--json", help="Write the result here.")],
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the tables and the plot as HTML here.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less local memory, fewer arms and lengths.")] = False,
    arms: Annotated[
        str, typer.Option(help="Only these: stock,window,window-1,window-3,window-4,window-link,window-4-link.")
    ] = "",
    workdir: Annotated[Path, typer.Option(help="Models (kept) and logs go here.")] = Path("out/bench"),
) -> None:
    """How long a context can be with the same KV bytes on the device: stock, and windows of some layers."""
    from polder.bench.context import ContextBench
    from polder.bench.context_plan import ARMS, FULL_CONTEXT, QUICK_CONTEXT
    from polder.bench.turns_plan import parse_names

    plan = (QUICK_CONTEXT if quick else FULL_CONTEXT).only(parse_names(arms, ARMS, what="arm"))
    ContextBench(plan, workdir=workdir).run(json_file, html_file)


@app.command()
def disks(
    json_file: Annotated[Path, typer.Option("--json", help="Write the result here.")],
    html_file: Annotated[
        Path | None, typer.Option("--html", help="Write the tables and the plot as HTML here.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="One seed, fewer sets and steps.")] = False,
    stages: Annotated[str, typer.Option(help="Only these: model,shares,wall,live.")] = "",
    arms: Annotated[
        str,
        typer.Option(
            help="Only these: sequential,hash,raid0,cluster-per-disk,no-cluster,fixed-blocks,swarm,polder-pages,polder."
        ),
    ] = "",
    workdir: Annotated[
        Path, typer.Option(help="The stages wall and live need up to 220 MiB here, for a while.")
    ] = Path("out/bench"),
) -> None:
    """Pages of KV on several disks: plain stores, the layouts of Swarm, and Polder's. Needs no engine."""
    from polder.bench.disks import DisksBench
    from polder.bench.disks_plan import ARMS, FULL_DISKS, QUICK_DISKS, STAGES
    from polder.bench.turns_plan import parse_names

    plan = (QUICK_DISKS if quick else FULL_DISKS).only(
        stages=parse_names(stages, STAGES, what="stage"), arms=parse_names(arms, ARMS, what="arm")
    )
    DisksBench(plan, workdir=workdir).run(json_file, html_file)
