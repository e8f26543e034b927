"""`polder sim`: Polder's policies on recorded traces."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from polder.cli.options import check_output

__all__ = ["app"]

app = typer.Typer(help="Polder's policies on recorded traces.", no_args_is_help=True, add_completion=False)


@app.callback()
def sim() -> None:
    """Replays need no engine and no GPU. The traces come with the package."""


class Policy(StrEnum):
    """What is replayed beside LRU."""

    DENSITY = "density"
    NONE = "none"


@app.command()
def cache(
    trace: Annotated[
        list[str] | None,
        typer.Option(help="mooncake-conversation, weka-u32-clip300, ...; may be repeated. All if none is given."),
    ] = None,
    policy: Annotated[
        Policy, typer.Option(help="What to replay beside LRU; none: LRU and Belady alone.")
    ] = Policy.DENSITY,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
) -> None:
    """Hit ratio of a KV cache against its capacity: LRU, Polder's policy, and Belady's ceiling."""
    import json

    from rich.console import Console
    from rich.table import Table

    from polder.sim.curves import cache_curve
    from polder.sim.traces import load_trace, trace_names
    from polder.tiers.eviction.density import HitDensity

    check_output(json_file)
    traces = [load_trace(name) for name in trace or trace_names()]
    results = []
    for loaded in traces:
        table = Table(title=f"{loaded.name}: {loaded.requests:,} requests, blocks of {loaded.block_tokens} tokens")
        headings = ("capacity, tokens", "LRU", "LRU, reference", "Polder", "Belady", "Polder / ideal", "us per block")
        for heading in headings:
            table.add_column(heading, justify="right")
        for point in cache_curve(loaded, HitDensity if policy is Policy.DENSITY else None):
            results.append({"trace": loaded.name, **point.as_dict()})
            table.add_row(
                f"{point.capacity_tokens:,}",
                f"{point.lru:.3f}",
                f"{point.reference_lru:.3f}",
                "" if point.polder is None else f"{point.polder:.3f}",
                f"{point.belady:.3f}",
                "" if point.polder is None else f"{point.polder / point.ideal:.0%}",
                "" if point.us_per_block is None else f"{point.us_per_block:.1f}",
            )
        Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(results, indent=1) + "\n")
