"""`polder top`: who holds what memory, who borrows from whom, and why."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from polder.broker import client
from polder.broker.wire import DeviceStatus, EngineStatus, Status
from polder.cli.where import find_socket
from polder.errors import BrokerUnavailable
from polder.units import format_bytes

__all__ = ["render", "top"]

BAR = 60
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")


def top(
    socket: Annotated[
        Path | None, typer.Option(help="The broker's socket (default: $POLDER_BROKER, else found).")
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print once and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the broker's status as JSON, once.")] = False,
    interval: Annotated[float, typer.Option(help="Seconds between updates.", min=0.1)] = 1.0,
) -> None:
    """Live view of pages by owner, engines, borrowing and give-back times."""
    path = find_socket(socket)
    if as_json:
        print(msgspec.json.encode(client.status(path)).decode())
        return
    if once:
        Console().print(render(client.status(path)))
        return
    with Live(render(client.status(path)), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval)
            try:
                live.update(render(client.status(path)), refresh=True)
            except BrokerUnavailable as error:
                live.update(Text(f"{error}; waiting", style="red"), refresh=True)


def render(status: Status) -> RenderableType:
    """The whole view."""
    colours = {e.engine: COLOURS[i % len(COLOURS)] for i, e in enumerate(status.engines)}
    parts: list[RenderableType] = [_device(device, colours) for device in status.devices]
    parts += [Text(), _engines(status.engines, colours), Text(), _broker(status)]
    return Group(*parts)


def _device(device: DeviceStatus, colours: dict[str, str]) -> Text:
    page = device.page_bytes
    text = Text(f"{device.device}  {format_bytes(device.total_pages * page)}  ", style="bold")
    for owner, pages in device.pages_by_owner.items():
        text.append("█" * round(BAR * pages / device.total_pages), style=colours.get(owner.rpartition("/")[0], "white"))
    text.append("░" * round(BAR * device.free_pages / device.total_pages), style="dim")
    held = "  ".join(f"{owner} {format_bytes(n * page)}" for owner, n in device.pages_by_owner.items())
    text.append(f"\n        {held}  free {format_bytes(device.free_pages * page)}", style="default")
    return text


def _engines(engines: list[EngineStatus], colours: dict[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    for name in (
        "engine",
        "state",
        "held",
        "floor/share/ceiling",
        "busy",
        "wait",
        "cached",
        "borrowed",
        "lent",
        "recalled",
    ):
        table.add_column(name, justify="left" if name in ("engine", "state") else "right")
    for name in ("KV used", "hit", "run/queue", "preempt", "target: why"):
        table.add_column(name, justify="left" if name.startswith("target") else "right")
    for e in engines:
        queries = e.stats.get("prefix_queries_tokens_total", 0.0)
        hit = f"{e.stats.get('prefix_hits_tokens_total', 0.0) / queries:.0%}" if queries else "-"
        table.add_row(
            Text(e.engine, style=colours[e.engine]),
            Text(e.state, style="green" if e.state == "serving" else "red"),
            str(e.held_units),
            f"{e.floor_units}/{e.share_units}/{e.ceiling_units}",
            str(e.busy_units),
            str(e.waiting_units),
            str(e.cached_units),
            str(e.borrowed_units),
            str(e.lent_units),
            str(e.recalled_units),
            f"{e.stats.get('kv_used_ratio', 0.0):.0%}",
            hit,
            f"{e.stats.get('running', 0.0):.0f}/{e.stats.get('waiting', 0.0):.0f}",
            f"{e.stats.get('preemptions_total', 0.0):.0f}",
            f"{e.target_units}: {e.reason}",
        )
    return table


def _broker(status: Status) -> Text:
    times = sorted(status.giveback_ms)
    line = f"up {status.uptime_s:.0f} s   {status.grants} grants, {status.recalls} recalls, {status.overdue} overdue"
    if times:
        p50, p99 = times[len(times) // 2], times[min(len(times) - 1, int(len(times) * 0.99))]
        line += f"   give-back p50 {p50:.0f} ms, p99 {p99:.0f} ms"
    if status.reclaimed_pages:
        line += f"   {status.reclaimed_pages} pages reclaimed from dead engines"
    return Text(line, style="dim")
