"""`polder bench`: measure Polder against stock vLLM on this machine."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

if TYPE_CHECKING:
    from polder.bench.suites.plan import Plan

__all__ = ["app"]

P = TypeVar("P", bound="Plan")

app = typer.Typer(help="Measure Polder against stock vLLM on this machine.", no_args_is_help=True, add_completion=False)

JsonFile = Annotated[Path, typer.Option("--json", help="Write the result here.")]
HtmlFile = Annotated[Path | None, typer.Option("--html", help="Write the tables and plots as HTML here.")]
Workdir = Annotated[Path, typer.Option(help="Models (kept) and logs go here.")]
WORKDIR = Path("out/bench")


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
    json_file: JsonFile,
    html_file: HtmlFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="256 requests of the agents instead of 512.")] = False,
    demo: Annotated[bool, typer.Option("--demo", help="As --quick, one run of each arm, no tax stage.")] = False,
    order: Annotated[Order | None, typer.Option(help="Order of runs: A is stock, B is Polder.")] = None,
    workdir: Workdir = WORKDIR,
) -> None:
    """Two models under one KV budget: fixed halves (stock vLLM) against memory that follows demand (Polder)."""
    from polder.bench.suites.elastic import ElasticSuite

    plan = ElasticSuite.demo if demo else ElasticSuite.quick if quick else ElasticSuite.full
    ElasticSuite(plan.ordered(order.value) if order else plan, workdir=workdir).run(json_file, html_file)


@app.command()
def turns(
    json_file: JsonFile,
    html_file: HtmlFile = None,
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
    workdir: Workdir = WORKDIR,
) -> None:
    """Agents of many turns on a pool that is too small: plain vLLM, vLLM's CPU offloading, and Polder's tiers."""
    from polder.bench.suites.turns import TurnsSuite

    plan = _chosen(TurnsSuite.quick if quick else TurnsSuite.full, stages, arms)
    TurnsSuite(replace(plan, links=links.value), workdir=workdir).run(json_file, html_file)


@app.command()
def tenants(
    json_file: JsonFile,
    html_file: HtmlFile = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Two rates instead of four, stock and polder alone, no spatial stage.")
    ] = False,
    stages: Annotated[str, typer.Option(help="Only these: temporal,spatial,comeback,streaming,equality.")] = "",
    arms: Annotated[str, typer.Option(help="Only these: stock,stock-short,kv-only,polder.")] = "",
    workdir: Workdir = WORKDIR,
) -> None:
    """Three models under one budget for weights and KV: fixed parts, elastic KV alone, and elastic weights too."""
    from polder.bench.suites.tenants import TenantsSuite

    plan = _chosen(TenantsSuite.quick if quick else TenantsSuite.full, stages, arms)
    TenantsSuite(plan, workdir=workdir).run(json_file, html_file)


@app.command()
def context(
    json_file: JsonFile,
    html_file: HtmlFile = None,
    quick: Annotated[bool, typer.Option("--quick", help="Less local memory, fewer arms and lengths.")] = False,
    arms: Annotated[
        str, typer.Option(help="Only these: stock,window,window-1,window-3,window-4,window-link,window-4-link.")
    ] = "",
    workdir: Workdir = WORKDIR,
) -> None:
    """How long a context can be with the same KV bytes on the device: stock, and windows of some layers."""
    from polder.bench.suites.context import ContextSuite

    plan = _chosen(ContextSuite.quick if quick else ContextSuite.full, "", arms)
    ContextSuite(plan, workdir=workdir).run(json_file, html_file)


@app.command()
def disks(
    json_file: JsonFile,
    html_file: HtmlFile = None,
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
    ] = WORKDIR,
) -> None:
    """Pages of KV on several disks: plain stores, the layouts of Swarm, and Polder's. Needs no engine."""
    from polder.bench.suites.disks import DisksSuite

    plan = _chosen(DisksSuite.quick if quick else DisksSuite.full, stages, arms)
    DisksSuite(plan, workdir=workdir).run(json_file, html_file)


def _chosen(plan: P, stages: str, arms: str) -> P:
    """The plan with the named stages and arms. Raises ConfigError for one that it does not know or cannot run."""
    from polder.bench.suites.plan import parse_names

    known = dict.fromkeys(arm for of in plan.choices.values() for arm in of.known)
    named = parse_names(arms, known, what="arm")
    return plan.only(stages=parse_names(stages, plan.choices, what="stage"), arms=named)
