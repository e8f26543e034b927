"""`polder plan`: what context, concurrency, TTFT and TBT to expect with and without Polder, before anything runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from polder.errors import BudgetError, ConfigError
from polder.units import format_bytes, parse_bytes, parse_goal

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from polder.planner.context_plan import Outlook, Setup, Source
    from polder.planner.devices import Device

__all__ = ["parse_tokens", "plan"]

_TOKENS = re.compile(r"\s*([0-9]+)\s*([kKM]?)\s*")
_COLUMNS = ("fit", "window", "TTFT", "hidden", "TBT, one", "hidden", "TBT, all")
_LEGEND = (
    "fit: sequences of that length at once; window: part of a sequence's blocks that is windowed; hidden: part of the copies' time "
    "that is under computing; TBT, all: with as many sequences as fit. No prompt is cached. Lower bounds from rooflines: launches, "
    "scheduling and sampling are not in them."
)
_PAPER_NOTE = (
    "lent: all the workers' KV memory, as in our ratios; implied: what would give the paper's ratio to chunks of 8K. "
    "See docs/plan.md."
)


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
    html_file: Annotated[Path | None, typer.Option("--html", help="Write the tables here as HTML.")] = None,
) -> None:
    """What context, concurrency, TTFT and TBT to expect with and without Polder. Starts nothing, needs no GPU."""
    if paper:
        if model or device:
            raise ConfigError("plan: --paper stands alone, or with --json and --html")
        table, figures = _paper()
        _show([table, _PAPER_NOTE], figures, json_file, html_file)
        return
    if model is None or device is None:
        raise ConfigError("plan: name a model and a --device, e.g. polder plan Qwen3-8B --device H200 --host 512GiB")
    from polder.planner.context_plan import Setup, contexts_to_show
    from polder.planner.devices import parse_links
    from polder.planner.model_shape import model_shape

    on = _device(device)
    setup = Setup(
        shape=model_shape(model),
        device=parse_links(link, on) if link else on,
        window_layers=window,
        chunk_tokens=parse_tokens(chunk, what="chunk"),
    )
    goal_s = parse_goal(tbt_goal, what="tbt-goal") if tbt_goal else None
    asked = parse_tokens(context, what="context") if context else None
    plans = [
        _Plan(
            source=source,
            longest=(longest := setup.capacity(source).longest_tokens),
            within_goal=None if goal_s is None else setup.longest_within(source, goal_s),
            outlooks=[setup.outlook(source, tokens) for tokens in contexts_to_show(longest, asked)],
        )
        for source in _sources(setup, host=host, neighbours=neighbours)
    ]
    if asked is not None and asked > max(plan.longest for plan in plans):
        possible = "; ".join(f"{plan.longest:,} with {plan.source.name}" for plan in plans)
        raise BudgetError(
            f"context: {asked:,} tokens do not fit. The longest context possible is {possible}. "
            "More --host, more --neighbours or a smaller --window make longer ones possible"
        )
    tables = [_overview(setup, plans, goal_s), *(_contexts(setup, plan) for plan in plans)]
    _show([*tables, *_notes(setup, plans)], _figures(setup, plans, goal_s), json_file, html_file)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What one source makes possible."""

    source: Source
    longest: int
    within_goal: int | None
    outlooks: Sequence[Outlook]


# ---------------------------------------------------------------- what is asked


def parse_tokens(text: str, *, what: str) -> int:
    """`"256k"` -> 262144, `"1M"` -> 1048576. Raises ConfigError naming `what`."""
    match = _TOKENS.fullmatch(text)
    tokens = int(match[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[match[2].upper()] if match else 0
    if tokens < 1:
        raise ConfigError(f"{what}: cannot read {text!r}; write a number of tokens above 0, e.g. 262144, 256k or 1M")
    return tokens


def _device(text: str) -> Device:
    if text == "here":
        from polder.cli.measure import measure_device

        return measure_device()
    from polder.planner.devices import parse_device

    return parse_device(text)


def _sources(setup: Setup, *, host: str | None, neighbours: str | None) -> Iterator[Source]:
    """Stock first, then what was given."""
    from polder.planner.context_plan import Source, link_of

    yield Source()
    if host is not None:
        size_bytes = parse_bytes(host, what="host")
        yield Source(name="window, host", size_bytes=size_bytes, link=link_of(setup.device, "host"))
    if neighbours is not None:
        offers = [_offer(text, setup) for text in neighbours.split(",")]
        # All of them come in through this device's own port; a slower neighbour's port would be the limit of its part
        # only.
        links = [link_of(device, "peer") for device in (setup.device, *(lender for lender, _ in offers))]
        slowest = min(links, key=lambda link: link.bytes_per_s)
        yield Source(name="window, peers", size_bytes=sum(size for _, size in offers), link=slowest)


def _offer(text: str, setup: Setup) -> tuple[Device, int]:
    """A neighbour and what it lends, from "H200:40GiB", or from "H200:Qwen3-8B": all of that model's KV memory."""
    from polder.planner.context_plan import kv_bytes_left
    from polder.planner.devices import parse_device
    from polder.planner.model_shape import model_shape

    name, found, lends = text.partition(":")
    if not found or "=" in name:
        raise ConfigError(f"neighbours: cannot read {text!r}; write DEVICE:MODEL or DEVICE:SIZE, e.g. H200:40GiB")
    device = parse_device(name.strip())
    if re.fullmatch(r"[0-9.]+\s*[A-Za-z]*B", lends.strip()):
        return device, parse_bytes(lends, what="neighbours")
    return device, kv_bytes_left(model_shape(lends.strip()), device.memory_bytes, setup.chunk_tokens)


# ---------------------------------------------------------------- what is shown


def _show(parts: Iterable[RenderableType], figures: object, json_file: Path | None, html_file: Path | None) -> None:
    from rich.console import Console

    console = Console(record=html_file is not None)
    for part in parts:
        console.print(part, highlight=False, soft_wrap=isinstance(part, str))
    for path in filter(None, (json_file, html_file)):
        path.parent.mkdir(parents=True, exist_ok=True)
    if json_file is not None:
        json_file.write_text(json.dumps(figures, indent=1) + "\n")
    if html_file is not None:
        console.save_html(str(html_file), inline_styles=True)


def _figures(setup: Setup, plans: Sequence[_Plan], goal_s: float | None) -> dict[str, Any]:
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
            asdict(plan.source) | {"longest_tokens": plan.longest, "within_goal_tokens": plan.within_goal}
            for plan in plans
        ],
        "outlooks": [asdict(outlook) for plan in plans for outlook in plan.outlooks],
    }


def _table(title: str, columns: Iterable[str]) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left", header_style="bold")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    return table


def _overview(setup: Setup, plans: Sequence[_Plan], goal_s: float | None) -> Table:
    goal = [] if goal_s is None else [f"TBT in {_seconds(goal_s)}"]
    table = _table(f"{setup.shape.name} on {setup.device.name}", ["KV there", "link", "longest", "over stock", *goal])
    stock = plans[0].longest
    for plan in plans:
        link = plan.source.link
        table.add_row(
            plan.source.name,
            format_bytes(plan.source.size_bytes) if link else "",
            _rate(link.bytes_per_s) if link else "",
            f"{plan.longest:,}",
            f"{plan.longest / stock:.2f}" if stock else "",
            *([] if plan.within_goal is None else [f"{plan.within_goal:,}"]),
        )
    return table


def _contexts(setup: Setup, plan: _Plan) -> Table:
    layers = "all layers" if plan.source.link is None else f"{setup.window_layers} of {setup.shape.layers} layers"
    table = _table(f"{plan.source.name}: {layers} of a block local", _COLUMNS)
    for outlook in plan.outlooks:
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


def _notes(setup: Setup, plans: Sequence[_Plan]) -> Iterator[str]:
    """Where the figures come from, and what to beware of."""
    shape, device = setup.shape, setup.device
    yield (
        f"{shape.name}: {format_bytes(shape.weight_bytes)} of weights, {format_bytes(shape.kv_bytes_per_token)} of KV per token; "
        f"{format_bytes(setup.local_bytes)} for KV on {device.name}, prefill in chunks of {setup.chunk_tokens:,} tokens."
    )
    yield f"{device.name}: {device.source}."
    for source in (plan.source for plan in plans):
        if source.link is not None:
            yield f"{source.name}: {source.link.name}, {_rate(source.link.bytes_per_s)}: {source.link.source}."
    if shape.trained_tokens is not None and max(plan.longest for plan in plans) > shape.trained_tokens:
        yield f"{shape.name} was made for {shape.trained_tokens:,} tokens: longer contexts need another rope_scaling."
    yield _LEGEND


def _paper() -> tuple[Table, list[dict[str, Any]]]:
    """SwiftCache's ratios and ours, side by side."""
    from polder.planner.paper_contexts import compare_with_paper

    compared = list(compare_with_paper())
    table = _table(
        "Longest context over that of all layers local, paper / ours",
        ("no chunks", "8K chunks", "32K chunks", "lent", "implied"),
    )
    for row in compared:
        ratios = (f"{theirs:.2f}/{ours:.2f}" for theirs, ours in zip(row.paper, row.ours, strict=True))
        name = f"{row.memory_gib} GB, {row.master.removeprefix('Qwen3-').removesuffix('-1M')}"
        table.add_row(name, *ratios, format_bytes(row.lent_bytes), format_bytes(row.implied_lent_bytes))
    return table, [asdict(row) | {"paper": row.paper._asdict(), "ours": row.ours._asdict()} for row in compared]


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
