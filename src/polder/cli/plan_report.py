"""What `polder plan` shows: tables for the terminal, and one HTML file with a plot that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import msgspec

from polder.bench.report.tables import Table, html_table
from polder.planner.context_plan import BLOCK_TOKENS, UTILIZATION, Outlook, Setup, Source
from polder.planner.paper_contexts import PaperComparison
from polder.units import format_bytes

__all__ = ["PAPER_NOTE", "Plan", "paper_table", "plan_notes", "plan_tables", "write_html"]

COLOURS = ("#8a94a6", "#0f766e", "#d97706")
COLUMNS = ["fit", "window", "TTFT", "hidden", "TBT, one", "hidden", "TBT, all"]
PAPER_NOTE = (
    "lent: all the workers' KV memory, as in our ratios; implied: what would give the paper's ratio to chunks of 8K. "
    "See docs/plan.md."
)
LEGEND = (
    "fit: sequences of that length at once; window: part of a sequence's blocks that is windowed; hidden: part of the copies' time "
    "that lies under computing; TBT, all: with as many sequences as fit. No prompt is cached."
)
NO_COST = "Lower bounds from rooflines: what an engine costs for launches, scheduling and sampling is not in them."


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The figures of one run. Mappings have the sources' names."""

    setup: Setup
    sources: Sequence[Source]
    longest: Mapping[str, int]
    outlooks: Sequence[Outlook]
    goal_s: float | None
    within_goal: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        return {
            "model": asdict(self.setup.shape) | {"kv_bytes_per_token": self.setup.shape.kv_bytes_per_token},
            "device": asdict(self.setup.device),
            "window_layers": self.setup.window_layers,
            "chunk_tokens": self.setup.chunk_tokens,
            "block_tokens": BLOCK_TOKENS,
            "utilization": UTILIZATION,
            "local_kv_bytes": self.setup.local_bytes,
            "tbt_goal_s": self.goal_s,
            "sources": [
                asdict(source)
                | {"longest_tokens": self.longest[source.name], "within_goal_tokens": self.within_goal.get(source.name)}
                for source in self.sources
            ],
            "outlooks": [asdict(outlook) for outlook in self.outlooks],
        }


def plan_tables(plan: Plan) -> list[Table]:
    """One of the sources, then one a source with its contexts."""
    return [_overview(plan), *(_contexts(plan, source) for source in plan.sources)]


def plan_notes(plan: Plan) -> Iterator[str]:
    """Where the figures come from, and what to beware of."""
    shape, device = plan.setup.shape, plan.setup.device
    yield (
        f"{shape.name}: {format_bytes(shape.weight_bytes)} of weights, {format_bytes(shape.kv_bytes_per_token)} of KV per token; "
        f"{format_bytes(plan.setup.local_bytes)} for KV on {device.name}, prefill in chunks of {plan.setup.chunk_tokens:,} tokens."
    )
    yield f"{device.name}: {device.source}."
    for source in plan.sources:
        if source.link is not None:
            yield f"{source.name}: {source.link.name}, {_rate(source.link.bytes_per_s)}: {source.link.source}."
    if shape.trained_tokens is not None and max(plan.longest.values()) > shape.trained_tokens:
        yield f"{shape.name} was made for {shape.trained_tokens:,} tokens: longer contexts need another rope_scaling."
    yield LEGEND
    yield NO_COST


def paper_table(compared: Sequence[PaperComparison]) -> Table:
    """SwiftCache's ratios and ours, side by side."""
    rows = []
    for row in compared:
        ratios = [f"{theirs:.2f}/{ours:.2f}" for theirs, ours in zip(row.paper, row.ours, strict=True)]
        lent = format_bytes(row.lent_bytes), format_bytes(row.implied_lent_bytes)
        rows.append([f"{row.memory_gib} GB, {row.master.removeprefix('Qwen3-').removesuffix('-1M')}", *ratios, *lent])
    columns = ["no chunks", "8K chunks", "32K chunks", "lent", "implied"]
    return Table("Longest context over that of all layers local, paper / ours", columns, rows)


def write_html(path: Path, plan: Plan) -> None:
    """Needs matplotlib (polder[bench])."""
    shape, device = plan.setup.shape, plan.setup.device
    template = Template((files("polder.bench") / "data" / "report.html").read_text())
    tiles = "".join(
        f"<div class='tile'><b>{tokens:,}</b><span>{escape(name)}: longest context, tokens</span></div>"
        for name, tokens in plan.longest.items()
    )
    text = "One sequence alone on the device. A line ends where the memory does; where two lie on each other, nothing is streamed."
    plot = f"<section><h2>Time by context</h2><p class='soft'>{text}</p>{_plot(plan)}</section>"
    path.write_text(
        template.substitute(
            title=f"{escape(shape.name)} on {escape(device.name)}: what to expect",
            subtitle=f"Computed, not measured. {NO_COST}",
            tiles=tiles,
            sections="\n".join([plot, *map(html_table, plan_tables(plan))]),
            conditions_line=" ".join(escape(note) for note in plan_notes(plan)),
            conditions=escape(msgspec.json.format(msgspec.json.encode(plan.as_dict()), indent=2).decode()),
        )
    )


def _plot(plan: Plan) -> str:
    import matplotlib
    from matplotlib.figure import Figure

    from polder.bench.report.plots import STYLE, svg

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        axes = figure.subplots(1, 2)
        for source, colour in zip(plan.sources, COLOURS, strict=False):
            found = [o for o in plan.outlooks if o.source == source.name and o.fits]
            tokens = [o.context_tokens for o in found]
            for axis, seconds in zip(axes, ([o.ttft_s for o in found], [o.tbt_s for o in found]), strict=True):
                axis.plot(tokens, seconds, "o-", ms=4, lw=2, color=colour, label=source.name)
        for axis, title in zip(axes, ("TTFT, s (log scales)", "TBT, s (log scales)"), strict=True):
            axis.set(title=title, xlabel="context, tokens", yscale="log")
            axis.set_xscale("log", base=2)
        if plan.goal_s is not None:
            axes[1].axhline(plan.goal_s, color="#b91c1c", lw=1, ls="--")
        axes[0].legend(loc="upper left")
        return svg(figure)


def _overview(plan: Plan) -> Table:
    columns = ["KV there", "link", "longest", "over stock"]
    if plan.goal_s is not None:
        columns.append(f"TBT in {_seconds(plan.goal_s)}")
    stock = plan.longest[plan.sources[0].name]
    rows = []
    for source in plan.sources:
        longest = plan.longest[source.name]
        row = [
            source.name,
            format_bytes(source.size_bytes) if source.link else "",
            _rate(source.link.bytes_per_s) if source.link else "",
            f"{longest:,}",
            f"{longest / stock:.2f}" if stock else "",
        ]
        if plan.goal_s is not None:
            row.append(f"{plan.within_goal[source.name]:,}")
        rows.append(row)
    return Table(f"{plan.setup.shape.name} on {plan.setup.device.name}", columns, rows)


def _contexts(plan: Plan, source: Source) -> Table:
    layers = "all layers" if source.link is None else f"{plan.setup.window_layers} of {plan.setup.shape.layers} layers"
    title = f"{source.name}: {layers} of a block local"
    return Table(title, COLUMNS, [_row(o) for o in plan.outlooks if o.source == source.name])


def _row(outlook: Outlook) -> list[str]:
    if not outlook.fits:
        return [_tokens(outlook.context_tokens), "0", *[""] * (len(COLUMNS) - 1)]
    return [
        _tokens(outlook.context_tokens),
        f"{outlook.at_once:,}",
        _part(outlook.windowed_part or None),
        _seconds(outlook.ttft_s),
        _part(outlook.ttft_hidden_part),
        _seconds(outlook.tbt_s),
        _part(outlook.tbt_hidden_part),
        _seconds(outlook.tbt_all_s),
    ]


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
