"""`polder plan`: what context, concurrency, TTFT and TBT to expect with and without Polder, before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polder.cli.options import check_output
from polder.errors import BudgetError, ConfigError
from polder.units import format_bytes, parse_bytes, parse_goal

if TYPE_CHECKING:
    from rich.table import Table

    from polder.planner.context_plan import Outlook, Setup, Source
    from polder.planner.devices import Device
    from polder.planner.model_shape import ModelShape

__all__ = ["parse_tokens", "plan"]

_TOKENS = re.compile(r"\s*([0-9]+)\s*([kKM]?)\s*")
_LEGEND = (
    "fit: sequences of that length at once, which is room, not advice; window: part of a sequence's blocks that is windowed; "
    "hidden: part of the copies' time that is under computing; TBT, all: with as many sequences as fit. No prompt is cached. "
    "Lower bounds from rooflines: launches, scheduling and sampling are not in them."
)


def plan(
    models: Annotated[
        list[str],
        typer.Argument(
            help="A folder with a config.json, or Qwen3-8B, Llama-3.1-8B, gpt-oss-20b, ...; several, or a fleet file: what "
            "they win by sharing a device."
        ),
    ],
    device: Annotated[
        str,
        typer.Option(
            help="H100, H200, A100, L4, ..., or memory=80GiB,bandwidth=3.35TB/s,flops=600T, or here: measured."
        ),
    ],
    host: Annotated[str | None, typer.Option(help="Host memory for windowed KV, e.g. 512GiB.")] = None,
    neighbours: Annotated[
        str | None,
        typer.Option(help="Idle neighbours by NVLink: DEVICE:MODEL or DEVICE:SIZE, e.g. H200:Qwen3-8B,H200:40GiB."),
    ] = None,
    link: Annotated[
        str | None, typer.Option(help="Speed of your links: 55GB/s (host), or host=55GB/s,peer=380GB/s.")
    ] = None,
    context: Annotated[str | None, typer.Option(help="A context that must fit, in tokens: 256k is 262144.")] = None,
    window: Annotated[int, typer.Option(help="Layers whose KV is local in a windowed block.")] = 2,
    chunk: Annotated[str, typer.Option(help="Prompt tokens in a step (vLLM's max_num_batched_tokens).")] = "8k",
    tbt_goal: Annotated[str | None, typer.Option(help="Time between tokens to stay within, e.g. 100ms.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option(help="Devices that one model is split over.", min=1)] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the tables here as HTML.")] = None,
) -> None:
    """What context, concurrency, TTFT and TBT to expect with and without Polder. Starts nothing, needs no GPU."""
    from polder.planner.context_plan import Setup
    from polder.planner.devices import over_ranks, parse_links

    check_output(json_file, html_file)
    shapes = list(_shapes(models, tensor_parallel_size))
    measured = over_ranks(parse_links(link, _device(device)), tensor_parallel_size)
    if len(shapes) > 1:
        from polder.cli.pooling import show_pooling

        given = {"--host": host, "--neighbours": neighbours, "--context": context, "--tbt-goal": tbt_goal}
        unused = ", ".join(name for name, value in given.items() if value is not None)
        if unused:
            typer.echo(f"polder: {unused}: for one model alone; not in the tables of several", err=True)
        show_pooling(shapes, measured, json_file, html_file)
        return
    setup = Setup(
        shape=shapes[0], device=measured, window_layers=window, chunk_tokens=parse_tokens(chunk, what="chunk")
    )
    goal_s = parse_goal(tbt_goal, what="tbt-goal") if tbt_goal else None
    asked = parse_tokens(context, what="context") if context else None
    sources = list(_sources(setup, host, neighbours))
    for source in sources:
        setup.check(source)
    longest = {source.name: setup.longest_tokens(source) for source in sources}
    if asked is not None and asked > max(longest.values()):
        possible = "; ".join(f"{tokens:,} with {name}" for name, tokens in longest.items())
        raise BudgetError(
            f"context: {asked:,} tokens do not fit. The longest context possible is {possible}. "
            "More --host, more --neighbours or a smaller --window make longer ones possible"
        )
    outlooks = {source.name: setup.outlooks(source, asked) for source in sources}
    figures = _figures(setup, sources, outlooks, goal_s)
    _show(setup, sources, outlooks, figures, html_file)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")


def _shapes(models: Sequence[str], ranks: int) -> Iterator[ModelShape]:
    """The shape of each model, or of those in a fleet file. With more ranks than KV heads some ranks hold the same
    KV."""
    from polder.planner.model_shape import model_shape

    for text in models:
        if text.endswith(".toml"):
            from polder.serve.needs import shapes_in_file

            yield from shapes_in_file(Path(text))
            continue
        shape = model_shape(text)
        heads = 1 if shape.kv.latent_dim else shape.kv.kv_heads
        yield replace(shape, kv=shape.kv._replace(copies=max(1, ranks // heads)))


def parse_tokens(text: str, *, what: str) -> int:
    """`"256k"` -> 262144, `"1M"` -> 1048576. Raises ConfigError naming `what`."""
    match = _TOKENS.fullmatch(text)
    tokens = int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match[2].upper()] if match else 0
    if tokens < 1:
        raise ConfigError(f"{what}: cannot read {text!r}; write a number of tokens above 0, e.g. 262144, 256k or 1M")
    return tokens


def _device(text: str) -> Device:
    from polder.planner.devices import parse_device

    if text == "here":
        from polder.cli.measure import measure_device

        return measure_device()
    return parse_device(text)


def _sources(setup: Setup, host: str | None, neighbours: str | None) -> Iterator[Source]:
    """Stock first, then what was given."""
    from polder.planner.context_plan import Source

    yield Source()
    if host is not None:
        yield Source(name="window, host", size_bytes=parse_bytes(host, what="host"), link=setup.device.link("host"))
    if neighbours is not None:
        offers = [_offer(text, setup) for text in neighbours.split(",")]
        # All of them come in through this device's own port; a slower neighbour's port would be the limit of its part
        # only.
        links = [device.link("peer") for device in (setup.device, *(lender for lender, _ in offers))]
        slowest = min(links, key=lambda link: link.bytes_per_s)
        yield Source(name="window, peers", size_bytes=sum(size for _, size in offers), link=slowest)


def _offer(text: str, setup: Setup) -> tuple[Device, int]:
    """A neighbour and what it lends, from "H200:40GiB", or from "H200:Qwen3-8B": all of that model's KV memory."""
    from polder.planner.context_plan import kv_bytes_left
    from polder.planner.devices import parse_device
    from polder.planner.model_shape import model_shape

    name, found, lends = (part.strip() for part in text.partition(":"))
    if not found or "=" in name:
        raise ConfigError(f"neighbours: cannot read {text!r}; write DEVICE:MODEL or DEVICE:SIZE, e.g. H200:40GiB")
    device = parse_device(name)
    if re.fullmatch(r"[0-9.]+\s*[A-Za-z]*B", lends):
        return device, parse_bytes(lends, what="neighbours")
    return device, kv_bytes_left(model_shape(lends), device, setup.chunk_tokens)


def _figures(
    setup: Setup, sources: Sequence[Source], outlooks: dict[str, list[Outlook]], goal_s: float | None
) -> dict[str, Any]:
    from polder.planner.context_plan import BLOCK_TOKENS, UTILIZATION

    shape = setup.shape
    sizes = asdict(shape) | shape.kv._asdict() | {"kv_bytes_per_token": shape.kv_bytes_per_token}
    return {
        "model": {key: value for key, value in sizes.items() if key != "kv"},
        "device": asdict(setup.device),
        "window_layers": setup.window_layers,
        "chunk_tokens": setup.chunk_tokens,
        "block_tokens": BLOCK_TOKENS,
        "utilization": UTILIZATION,
        "local_kv_bytes": setup.local_bytes,
        "tbt_goal_s": goal_s,
        "sources": [
            asdict(source)
            | {
                "longest_tokens": setup.longest_tokens(source),
                "within_goal_tokens": None if goal_s is None else setup.longest_within(source, goal_s),
            }
            for source in sources
        ],
        "outlooks": [asdict(outlook) for each in outlooks.values() for outlook in each],
    }


def _show(
    setup: Setup,
    sources: Sequence[Source],
    outlooks: dict[str, list[Outlook]],
    figures: dict[str, Any],
    html_file: Path | None,
) -> None:
    from rich.console import Console

    console = Console(record=html_file is not None)
    console.print(_overview(setup, figures))
    for source in sources:
        console.print(_contexts(setup, source, outlooks[source.name]))
    for line in _notes(setup, sources):
        console.print(line, highlight=False, soft_wrap=True)
    if html_file is not None:
        console.save_html(str(html_file), inline_styles=True)


def _table(title: str, *columns: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _overview(setup: Setup, figures: dict[str, Any]) -> Table:
    goal_s = figures["tbt_goal_s"]
    goal = [] if goal_s is None else [f"TBT in {_seconds(goal_s)}"]
    table = _table(f"{setup.shape.name} on {setup.device.name}", "KV there", "link", "memory for", "over stock", *goal)
    stock = figures["sources"][0]["longest_tokens"]
    for source in figures["sources"]:
        link, longest = source["link"], source["longest_tokens"]
        external = [format_bytes(source["size_bytes"]), _rate(link["bytes_per_s"])] if link else ["", ""]
        over = f"{longest / stock:.2f}" if stock else ""
        table.add_row(
            source["name"], *external, f"{longest:,}", over, *(f"{source['within_goal_tokens']:,}" for _ in goal)
        )
    return table


def _contexts(setup: Setup, source: Source, outlooks: Sequence[Outlook]) -> Table:
    layers = "all layers" if source.link is None else f"{setup.window_layers} of {setup.shape.layers} layers"
    columns = ("fit", "window", "TTFT", "hidden", "TBT, one", "hidden", "TBT, all")
    table = _table(f"{source.name}: {layers} of a block local", *columns)
    for outlook in outlooks:
        table.add_row(
            _tokens(outlook.context_tokens),
            f"{outlook.at_once:,}",
            _part(outlook.windowed_part or None),
            _seconds(outlook.ttft_s),
            _part(outlook.ttft_hidden_part),
            _seconds(outlook.tbt_s),
            _part(outlook.tbt_hidden_part),
            _seconds(outlook.tbt_all_s),
        )
    return table


def _notes(setup: Setup, sources: Sequence[Source]) -> Iterator[str]:
    """Where the figures come from, and what to beware of."""
    shape, device = setup.shape, setup.device
    yield (
        f"{shape.name}: {format_bytes(shape.weight_bytes)} of weights, {format_bytes(shape.kv_bytes_per_token)} of KV per token; "
        f"{format_bytes(setup.local_bytes)} for KV on {device.name}, prefill in chunks of {setup.chunk_tokens:,} tokens."
    )
    yield f"{device.name}: {device.source}."
    for source in sources:
        if source.link is not None:
            yield f"{source.name}: {source.link.name}, {_rate(source.link.bytes_per_s)}: {source.link.source}."
    if shape.trained_tokens is not None and max(map(setup.longest_tokens, sources)) > shape.trained_tokens:
        yield f"{shape.name} was made for {shape.trained_tokens:,} tokens: longer contexts need another rope_scaling."
    if len(sources) == 1:
        yield (
            "One model alone shares its memory with nobody. Name several models, or a fleet file, for what pooling wins; "
            "--host or --neighbours for contexts longer than the device holds."
        )
    yield _LEGEND


def _part(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def _tokens(count: int) -> str:
    """As people write contexts: 8k and 1M are powers of two."""
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if count % size == 0:
            return f"{count // size:,}{unit}"
    return f"{count:,}"


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    for size_s, unit in ((3600, "h"), (60, "min"), (1, "s")):
        if value >= size_s:
            return f"{value / size_s:.3g} {unit}"
    return f"{1000 * value:.3g} ms"


def _rate(bytes_per_s: float) -> str:
    return f"{bytes_per_s / 1e9:g} GB/s"
