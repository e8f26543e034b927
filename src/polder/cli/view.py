"""What `polder top` shows: a bar for each device, tables of memory, requests, weights and tiers, give-back times."""

from __future__ import annotations

import contextlib
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from polder.broker.wire import DeviceStatus, EngineStatus, Status
from polder.errors import EnvironmentFault
from polder.metrics import TIER_NAMES
from polder.serve.child import ChildStatus
from polder.serve.metrics import unit_bytes
from polder.serve.supervisor import FleetStatus
from polder.tiers.counters import verdict
from polder.units import format_bytes

__all__ = ["render", "watch"]

BAR = 60
NARROW = 110
"""Terminals with fewer columns show the sizes of `_FIRST` alone."""
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_MEMORY = ("held", "floor", "share", "ceiling", "busy", "waiting", "cached", "borrowed", "lent", "target")
_FIRST = ("held", "target", "share", "busy", "borrowed", "lent")


class Rates:
    """What engines' counters grew by in a second, between two looks; since the start when there was one look only."""

    def __init__(self, now: Status, before: Status | None) -> None:
        again = before is not None and before.generation == now.generation and now.uptime_s > before.uptime_s
        self._before = {e.engine: e for e in before.engines} if before is not None and again else {}
        self._seconds = max(1e-9, now.uptime_s - (before.uptime_s if before is not None and again else 0.0))

    def grown(self, engine: EngineStatus, name: str) -> float:
        earlier = self._before.get(engine.engine)
        started = earlier.stats.get(name, 0.0) if earlier is not None and earlier.pid == engine.pid else 0.0
        return engine.stats.get(name, 0.0) - started

    def a_second(self, engine: EngineStatus, name: str) -> float:
        return self.grown(engine, name) / self._seconds


def watch(first: FleetStatus, look: Callable[[], FleetStatus], interval_s: float) -> None:
    """Shows updates until it is interrupted or q is pressed. Says when the broker does not answer, and asks again."""
    before, console = first, Console()
    with (
        _single_keys(),
        Live(render(first, width=console.width), console=console, screen=True, auto_refresh=False) as live,
    ):
        while not _quit_within(interval_s):
            try:
                now = look()
            except EnvironmentFault as error:
                live.update(Text(f"{error}; asking again. q quits", style="red"), refresh=True)
                continue
            live.update(render(now, before, width=console.width), refresh=True)
            before = now


@contextlib.contextmanager
def _single_keys() -> Iterator[None]:
    """Keys arrive as they are pressed, without Enter, where there is a terminal."""
    if not sys.stdin.isatty():
        yield
        return
    kept = termios.tcgetattr(sys.stdin)
    tty.setcbreak(sys.stdin, termios.TCSANOW)  # keys that were pressed already count
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, kept)


def _quit_within(seconds: float) -> bool:
    """Waits; True as soon as q is pressed."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0:
        if not sys.stdin.isatty():
            time.sleep(left)
        elif select.select([sys.stdin], [], [], left)[0] and b"q" in os.read(sys.stdin.fileno(), 64).lower():
            return True
    return False


def render(fleet: FleetStatus, before: FleetStatus | None = None, *, width: int = 80) -> RenderableType:
    """`before`: an earlier look, for what happens in a second. `width`: columns of the terminal."""
    parts: list[RenderableType] = []
    status = fleet.broker
    if status is None:
        parts.append(Text("the broker does not answer; engines serve on with what they hold", style="red"))
    else:
        rates = Rates(status, before.broker if before is not None else None)
        colours = {e.engine: COLOURS[i % len(COLOURS)] for i, e in enumerate(status.engines)}
        parts += [_device(device, colours) for device in status.devices]
        if status.engines:
            parts += [
                Text(),
                _memory(status, colours, width),
                Text(),
                _requests(status.engines, colours, rates),
                Text(),
            ]
        else:
            parts.append(Text("no engine is connected"))
        parts += [*_weights(status, colours, rates), *_tiers(status.engines, colours, rates)]
        parts += [Text(f"{name} serves as stock vLLM: {reason}") for name, reason in status.stock.items()]
        parts.append(_broker(status))
    down = [child for child in fleet.children if child.state != "ready"]
    parts += [_not_ready(child) for child in down]
    return Group(*parts)


def _not_ready(child: ChildStatus) -> Text:
    if child.state == "starting" and not child.restarts:
        return Text(f"{child.name} is starting", style="yellow")
    return Text(f"{child.name} is {child.state}, restarts {child.restarts} {child.last_exit}", style="red")


def _device(device: DeviceStatus, colours: dict[str, str]) -> Text:
    size = device.page_bytes
    text = Text(f"{device.device}  {format_bytes(device.total_pages * size)}  ", style="bold")
    parts = [(colours.get(owner.rpartition("/")[0], "white"), n) for owner, n in device.pages_by_owner.items()]
    drawn = pages = 0
    for colour, count in [*parts, ("dim", device.total_pages - sum(n for _, n in parts))]:
        pages += count
        end = round(BAR * pages / max(1, device.total_pages))  # rounded as a sum, so that the bar has its full length
        text.append(("░" if colour == "dim" else "█") * (end - drawn), style=colour)
        drawn = end
    held = "  ".join(f"{owner} {format_bytes(n * size)}" for owner, n in device.pages_by_owner.items())
    text.append(f"\n    {held}  free {format_bytes(device.free_pages * size)}", style="default")
    return text


def _table(first: str, *columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold dim")
    table.add_column(first)
    for name in columns:
        table.add_column(name, justify="left" if name in ("state", "why") else "right")
    return table


def _memory(status: Status, colours: dict[str, str], width: int) -> Table:
    """Sizes that are 0 for all engines are left out, and others where there is no room for them."""
    shown = [
        name
        for name in (_MEMORY if width >= NARROW else _FIRST)
        if name == "held" or any(getattr(engine, f"{name}_units") for engine in status.engines)
    ]
    table = _table("memory of", "state", *shown)
    for engine in status.engines:
        size = unit_bytes(engine, status)
        table.add_row(
            Text(engine.engine, style=colours[engine.engine]),
            Text(engine.state, style="green" if engine.state == "serving" else "red"),
            *(_size(getattr(engine, f"{name}_units") * size) for name in shown),
        )
    return table


def _requests(engines: list[EngineStatus], colours: dict[str, str], rates: Rates) -> Table:
    table = _table("requests of", "running", "waiting", "KV used", "hits", "preempted/s", "why")
    for engine in engines:
        stats = engine.stats
        queries = rates.grown(engine, "prefix_queries_tokens_total")
        table.add_row(
            Text(engine.engine, style=colours[engine.engine]),
            f"{stats.get('running_requests', 0.0):.0f}",
            f"{stats.get('waiting_requests', 0.0):.0f}",
            f"{stats.get('kv_used_ratio', 0.0):.0%}",
            f"{rates.grown(engine, 'prefix_hits_tokens_total') / queries:.0%}" if queries > 0 else "-",
            f"{rates.a_second(engine, 'preemptions_total'):.2g}",
            engine.reason,
        )
    return table


DECISIONS = 3


def _weights(status: Status, colours: dict[str, str], rates: Rates) -> list[RenderableType]:
    """How much of each model's weights is on the device, and the last decisions. Empty where no weights can move."""
    engines = [engine for engine in status.engines if engine.layers]
    if not engines:
        return []
    sizes = {device.device: device.page_bytes for device in status.devices}
    table = _table("weights of", "layers", "held", "copied/s", "stalled", "why")
    for engine in engines:
        layer_bytes = engine.layer_pages * sum(sizes[device] for device in engine.devices)
        table.add_row(
            Text(engine.engine, style=colours[engine.engine]),
            "asleep" if engine.asleep else f"{engine.segments} of {engine.layers}",
            _size(engine.segments * layer_bytes),
            _size(rates.a_second(engine, "weights_loaded_bytes_total")),
            f"{rates.a_second(engine, 'weights_stall_seconds_total'):.0%}",
            engine.weights_reason,
        )
    last = [
        Text(f"{status.uptime_s - d.uptime_s:.0f} s ago: {d.engine}: {d.action} {d.segments}: {d.reason}", style="dim")
        for d in status.decisions[-DECISIONS:]
    ]
    return [table, *last, Text()]


def _size(size_bytes: float) -> str:
    """Without a space at which a table could break it."""
    return format_bytes(int(size_bytes)).replace(" ", "\u00a0")


def _tiers(engines: list[EngineStatus], colours: dict[str, str], rates: Rates) -> list[RenderableType]:
    """What each engine's tiers hold and do, what it lends, and whether that pays. Empty where there are none."""
    rows = [(e, tier) for e in engines for tier in TIER_NAMES if f"tier_{tier}_used_bytes" in e.stats]
    parts: list[RenderableType] = []
    if rows:
        table = _table("tiers of", "tier", "used", "size", "hit tokens/s", "loaded/s", "stored/s", "corrupt")
        for engine, tier in rows:
            table.add_row(
                Text(engine.engine, style=colours[engine.engine]),
                tier,
                *(_size(engine.stats.get(f"tier_{tier}_{name}_bytes", 0.0)) for name in ("used", "size")),
                f"{rates.a_second(engine, f'tier_{tier}_hit_tokens_total'):.0f}",
                *(_size(rates.a_second(engine, f"tier_{tier}_{name}_bytes_total")) for name in ("loaded", "stored")),
                f"{engine.stats.get(f'tier_{tier}_corrupt_blocks_total', 0.0):.0f}",
            )
        parts += [table, *(Text(f"{e.engine}: {verdict(e.stats)}") for e in engines if verdict(e.stats)), Text()]
    for engine in engines:
        if "lent_offered_bytes" in engine.stats:
            stats = engine.stats
            offered, borrowed = (format_bytes(int(stats[f"lent_{name}_bytes"])) for name in ("offered", "borrowed"))
            recalls, p99_s = rates.a_second(engine, "lent_borrowed_recalls_total"), stats["lent_recall_p99_seconds"]
            parts.append(
                Text(
                    f"{engine.engine} offers {offered}, {borrowed} of it are borrowed; "
                    f"{recalls:.2g} borrowed blocks taken back a second, p99 {p99_s * 1e3:.2f} ms"
                )
            )
    return parts


def _broker(status: Status) -> Text:
    line = f"up {status.uptime_s:.0f} s   {status.grants} grants   {status.recalls} recalls   {status.overdue} overdue"
    times = sorted(status.giveback_ms)
    if times:
        p50, p99 = (times[min(len(times) - 1, int(len(times) * part))] for part in (0.5, 0.99))
        line += f"   give-back p50 {p50:.0f} ms, p99 {p99:.0f} ms (last {len(times)})"
    if status.reclaimed_pages:
        line += f"   {status.reclaimed_pages} pages reclaimed from dead engines"
    return Text(line, style="dim")
