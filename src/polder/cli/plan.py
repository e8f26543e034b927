"""`polder plan`: what context, concurrency, TTFT and TBT to expect with and without Polder, before anything runs."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from polder.errors import ConfigError
from polder.units import parse_bytes, parse_goal

if TYPE_CHECKING:
    from polder.planner.context_plan import Setup, Source
    from polder.planner.devices import Device

__all__ = ["parse_tokens", "plan"]

_TOKENS = re.compile(r"\s*([0-9]+)\s*([kKM]?)\s*")


def plan(
    model: Annotated[
        str | None, typer.Argument(help="A folder with a config.json, or Qwen3-8B, Llama-3.1-8B, LWM-7B-1M, ...")
    ] = None,
    device: Annotated[
        str | None,
        typer.Option(help="H20, H100, H200, ..., or memory=80GiB,bandwidth=3.35TB/s,flops=600T, or here: measured."),
    ] = None,
    host: Annotated[str | None, typer.Option(help="Host memory for windowed KV, e.g. 512GiB.")] = None,
    neighbours: Annotated[
        str | None,
        typer.Option(help="Idle neighbours by NVLink: DEVICE:MODEL or DEVICE:SIZE, e.g. H200:Qwen3-8B,H200:40GiB."),
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="The link's own speed: 55GB/s (host), or host=55GB/s,peer=380GB/s.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="A context that must fit, in tokens: 256k is 262144.")] = None,
    window: Annotated[int, typer.Option(help="Layers whose KV is local in a windowed block.")] = 2,
    chunk: Annotated[str, typer.Option(help="Prompt tokens in a step (vLLM's max_num_batched_tokens).")] = "8k",
    tbt_goal: Annotated[str | None, typer.Option(help="Time between tokens to stay within, e.g. 100ms.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="SwiftCache's table of longest contexts beside ours.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write a report with a plot here.")] = None,
) -> None:
    """What context, concurrency, TTFT and TBT to expect with and without Polder. Starts nothing, needs no GPU."""
    from rich.console import Console

    from polder.bench.report.tables import print_tables
    from polder.cli.plan_report import Plan, plan_notes, plan_tables, write_html
    from polder.planner.context_plan import Setup, check_fits, contexts_to_show
    from polder.planner.devices import parse_device, parse_links
    from polder.planner.model_shape import model_shape

    if paper:
        if model or device or html_file:
            raise ConfigError("plan: --paper stands alone, or with --json")
        _show_paper(json_file)
        return
    if model is None or device is None:
        raise ConfigError("plan: name a model and a --device, e.g. polder plan Qwen3-8B --device H200 --host 512GiB")
    if html_file is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--html: the plot needs matplotlib: install polder[bench], or leave --html out")
    if device == "here":
        from polder.cli.measure import measure_device

        on = measure_device()
    else:
        on = parse_device(device)
    setup = Setup(
        shape=model_shape(model),
        device=parse_links(link, on) if link else on,
        window_layers=window,
        chunk_tokens=parse_tokens(chunk, what="chunk"),
    )
    goal_s = parse_goal(tbt_goal, what="tbt-goal") if tbt_goal else None
    asked = parse_tokens(context, what="context") if context else None
    sources = _sources(setup, host=host, neighbours=neighbours)
    if asked is not None:
        check_fits(setup, sources, asked)
    made = Plan(
        setup=setup,
        sources=sources,
        longest={source.name: setup.longest(source) for source in sources},
        outlooks=[
            setup.outlook(source, tokens)
            for source in sources
            for tokens in contexts_to_show(setup.longest(source), asked)
        ],
        goal_s=goal_s,
        within_goal={} if goal_s is None else {s.name: setup.longest_within(s, goal_s) for s in sources},
    )
    console = Console()
    print_tables(console, plan_tables(made))
    for note in plan_notes(made):
        console.print(note, highlight=False, soft_wrap=True)
    _write_json(json_file, made.as_dict())
    if html_file is not None:
        html_file.parent.mkdir(parents=True, exist_ok=True)
        write_html(html_file, made)


def parse_tokens(text: str, *, what: str) -> int:
    """`"256k"` -> 262144, `"1M"` -> 1048576. Raises ConfigError naming `what`."""
    match = _TOKENS.fullmatch(text)
    tokens = int(match.group(1)) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match.group(2).upper()] if match else 0
    if tokens < 1:
        raise ConfigError(f"{what}: cannot read {text!r}; write a number of tokens above 0, e.g. 262144, 256k or 1M")
    return tokens


def _sources(setup: Setup, *, host: str | None, neighbours: str | None) -> list[Source]:
    """Stock first, then what was given."""
    from polder.planner.context_plan import STOCK, Source, link_of

    sources = [STOCK]
    if host is not None:
        size_bytes = parse_bytes(host, what="host")
        sources.append(Source(name="window, host", size_bytes=size_bytes, link=link_of(setup.device, "host")))
    if neighbours is not None:
        offers = [_offer(text, setup) for text in neighbours.split(",")]
        # All of them come in through this device's own port; a slower neighbour's port would be the limit of its part only.
        slowest = min(
            [link_of(setup.device, "peer"), *(link_of(lender, "peer") for lender, _ in offers)],
            key=lambda link: link.bytes_per_s,
        )
        size_bytes = sum(size for _, size in offers)
        sources.append(Source(name="window, peers", size_bytes=size_bytes, link=slowest))
    return sources


def _offer(text: str, setup: Setup) -> tuple[Device, int]:
    """A neighbour and what it lends, from "H200:40GiB" or "H200:Qwen3-8B"."""
    from polder.planner.context_plan import lendable_bytes
    from polder.planner.devices import parse_device
    from polder.planner.model_shape import model_shape

    name, found, lends = text.partition(":")
    if not found or "=" in name:
        raise ConfigError(f"neighbours: cannot read {text!r}; write DEVICE:MODEL or DEVICE:SIZE, e.g. H200:40GiB")
    device = parse_device(name.strip())
    if re.fullmatch(r"[0-9.]+\s*[A-Za-z]*B", lends.strip()):
        return device, parse_bytes(lends, what="neighbours")
    return device, lendable_bytes(model_shape(lends.strip()), device, setup.chunk_tokens)


def _show_paper(json_file: Path | None) -> None:
    from rich.console import Console

    from polder.bench.report.tables import print_tables
    from polder.cli.plan_report import PAPER_NOTE, paper_table
    from polder.planner.paper_contexts import compare_with_paper

    compared = compare_with_paper()
    console = Console()
    print_tables(console, [paper_table(compared)])
    console.print(PAPER_NOTE, highlight=False, soft_wrap=True)
    named = [asdict(row) | {"paper": row.paper._asdict(), "ours": row.ours._asdict()} for row in compared]
    _write_json(json_file, named)


def _write_json(path: Path | None, figures: object) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=1) + "\n")
