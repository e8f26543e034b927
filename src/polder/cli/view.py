"""What `polder top` shows: a bar for each device, tables of memory, requests, weights and tiers, give-back times."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from polder.broker.wire import DeviceStatus, EngineStatus, Status
from polder.errors import EnvironmentFault
from polder.metrics import TIER_NAMES
from polder.serve.metrics import unit_bytes
from polder.serve.supervisor import FleetStatus
from polder.tiers.counters import verdict
from polder.units import format_bytes

__all__ = ["render", "watch"]

BAR = 60
COLOURS = ("cyan", "magenta", "yellow", "green", "blue", "red")
_MEMORY = ("held", "floor", "share", "ceiling", "busy", "waiting", "cached", "borrowed", "lent", "recalled", "target")


def watch(first: FleetStatus, look: Callable[[], FleetStatus], interval_s: float) -> None:
    """Shows updates until it is interrupted. Says when the broker does not answer, and asks again."""
    with Live(render(first), screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            try:
                live.update(render(look()), refresh=True)
            except EnvironmentFault as error:
                live.update(Text(f"{error}; asking again", style="red"), refresh=True)


def render(fleet: FleetStatus) -> RenderableType:
    parts: list[RenderableType] = []
    status = fleet.broker
    if status is None:
        parts.append(Text("the broker does not answer; engines serve on with what they hold", style="red"))
    else:
        colours = {e.engine: COLOURS[i % len(COLOURS)] for i, e in enumerate(status.engines)}
        parts += [_device(device, colours) for device in status.devices]
        if status.engines:
            parts += [Text(), _memory(status, colours), Text(), _requests(status.engines, colours), Text()]
        else:
            parts.append(Text("no engine is connected"))
        parts += [*_weights(status, colours), *_tiers(status.engines, colours)]
        parts += [Text(f"{name} serves as stock vLLM: {reason}") for name, reason in status.stock.items()]
        parts.append(_broker(status))
    down = [child for child in fleet.children if child.state != "ready"]
    parts += [Text(f"{c.name} is {c.state}, restarts {c.restarts} {c.last_exit}", style="red") for c in down]
    return Group(*parts)


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


def _memory(status: Status, colours: dict[str, str]) -> Table:
    table = _table("memory of", "state", *_MEMORY)
    for engine in status.engines:
        size = unit_bytes(engine, status)
        table.add_row(
            Text(engine.engine, style=colours[engine.engine]),
            Text(engine.state, style="green" if engine.state == "serving" else "red"),
            *(_size(getattr(engine, f"{name}_units") * size) for name in _MEMORY),
        )
    return table


def _requests(engines: list[EngineStatus], colours: dict[str, str]) -> Table:
    table = _table("requests of", "running", "waiting", "KV used", "hit ratio", "preempted", "units", "target", "why")
    for engine in engines:
        stats = engine.stats
        queries = stats.get("prefix_queries_tokens_total", 0.0)
        table.add_row(
            Text(engine.engine, style=colours[engine.engine]),
            f"{stats.get('running_requests', 0.0):.0f}",
            f"{stats.get('waiting_requests', 0.0):.0f}",
            f"{stats.get('kv_used_ratio', 0.0):.0%}",
            f"{stats.get('prefix_hits_tokens_total', 0.0) / queries:.0%}" if queries else "-",
            f"{stats.get('preemptions_total', 0.0):.0f}",
            str(engine.held_units),
            str(engine.target_units),
            engine.reason,
        )
    return table


DECISIONS = 3


def _weights(status: Status, colours: dict[str, str]) -> list[RenderableType]:
    """How much of each model's weights is on the device, and the last decisions. Empty where no weights can move."""
    engines = [engine for engine in status.engines if engine.layers]
    if not engines:
        return []
    sizes = {device.device: device.page_bytes for device in status.devices}
    table = _table("weights of", "layers", "held", "slept", "woke", "paused", "waited", "copied", "stalled", "why")
    for engine in engines:
        stats = engine.stats
        layer_bytes = engine.layer_pages * sum(sizes[device] for device in engine.devices)
        table.add_row(
            Text(engine.engine, style=colours[engine.engine]),
            "asleep" if engine.asleep else f"{engine.segments} of {engine.layers}",
            _size(engine.segments * layer_bytes),
            *(f"{stats.get(f'{name}_total', 0.0):.0f}" for name in ("sleeps", "wakes", "pauses")),
            f"{stats.get('wake_seconds_total', 0.0):.2f}\u00a0s",
            _size(stats.get("weights_loaded_bytes_total", 0.0)),
            f"{stats.get('weights_stall_seconds_total', 0.0):.2f}\u00a0s",
            engine.weights_reason,
        )
    last = [
        Text(f"{status.uptime_s - d.uptime_s:.0f} s ago: {d.engine}: {d.action} {d.segments}: {d.reason}", style="dim")
        for d in status.decisions[-DECISIONS:]
    ]
    return [table, *last, Text()]


def _of_tier(tier: str) -> tuple[str, ...]:
    return (
        *(f"tier_{tier}_used_bytes", f"tier_{tier}_size_bytes"),
        *(f"tier_{tier}_loaded_bytes_total", f"tier_{tier}_stored_bytes_total"),
        *(f"tier_{tier}_hit_tokens_total", f"tier_{tier}_corrupt_blocks_total", f"tier_{tier}_load_bytes_per_second"),
    )


def _size(size_bytes: float) -> str:
    """Without a space at which a table could break it."""
    return format_bytes(int(size_bytes)).replace(" ", "\u00a0")


def _tiers(engines: list[EngineStatus], colours: dict[str, str]) -> list[RenderableType]:
    """What each engine's tiers hold and did, what it lends, and whether that pays. Empty where there are none."""
    rows = [(e, tier) for e in engines for tier in TIER_NAMES if f"tier_{tier}_used_bytes" in e.stats]
    parts: list[RenderableType] = []
    if rows:
        table = _table(
            "tiers of", "tier", "used", "size", "hit tokens", "loaded", "stored", "corrupt", "GB/s", "late", "refused"
        )
        for engine, tier in rows:
            used, size, loaded, stored, hits, corrupt, rate = (engine.stats.get(name, 0.0) for name in _of_tier(tier))
            table.add_row(
                Text(engine.engine, style=colours[engine.engine]),
                tier,
                *(_size(number) for number in (used, size)),
                f"{hits:.0f}",
                *(_size(number) for number in (loaded, stored)),
                f"{corrupt:.0f}",
                f"{rate / 1e9:.2f}",
                f"{engine.stats.get('tier_late_loads_total', 0.0):.0f}",
                f"{engine.stats.get('tier_refused_loads_total', 0.0):.0f}",
            )
        parts += [table, *(Text(f"{e.engine}: {verdict(e.stats)}") for e in engines if verdict(e.stats)), Text()]
    for engine in engines:
        if "lent_offered_bytes" in engine.stats:
            stats = engine.stats
            offered, borrowed = (format_bytes(int(stats[f"lent_{name}_bytes"])) for name in ("offered", "borrowed"))
            recalls, p99_s = stats["lent_borrowed_recalls_total"], stats["lent_recall_p99_seconds"]
            parts.append(
                Text(
                    f"{engine.engine} offers {offered}, {borrowed} of it are borrowed; "
                    f"{recalls:.0f} borrowed blocks taken back, p99 {p99_s * 1e3:.2f} ms"
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
