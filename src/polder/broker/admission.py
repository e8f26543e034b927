"""Who may join, and with what: the checks of a Hello, and the booking of what a reconnecting engine reports. No messages here."""

from __future__ import annotations

from dataclasses import dataclass

from polder.broker.ledger import Ledger, Owner
from polder.broker.roster import HOST, Engine, Roster, least_pages
from polder.broker.wire import PROTOCOL, Hello, Pages, Segments
from polder.errors import ProtocolError
from polder.units import format_bytes

__all__ = ["Held", "claim", "fits_awake", "host_pages", "pages_by_device", "refusal", "reported", "take_segments"]


@dataclass(frozen=True, kw_only=True)
class Held:
    """What an engine holds, or may use from now on."""

    pages: Pages
    segments: Segments


def refusal(roster: Roster, hello: Hello, pid: int, page_bytes: int) -> str | None:
    """Why this engine can never be served as things are, and what to change; None if it can."""
    known = roster.engines.get(hello.engine)
    if hello.protocol != PROTOCOL:
        return f"protocol {hello.protocol} spoken, {PROTOCOL} expected: install the same Polder on both sides"
    if known is not None and known.pid != pid and known.processes:
        return f"engine name {hello.engine!r} is in use by process {known.pid}: choose another POLDER_ENGINE"
    if not hello.devices or hello.pages_per_unit < 1 or not 1 <= hello.floor_units <= hello.ceiling_units:
        sizes = f"floor {hello.floor_units}, ceiling {hello.ceiling_units}"
        return f"impossible geometry: {hello.pages_per_unit} pages a unit, {sizes}"
    if min(hello.layers, hello.layer_pages) < 0 or (hello.layers > 0) != (hello.layer_pages > 0):
        return f"impossible geometry: {hello.layers} layers of {hello.layer_pages} pages"
    for device in set(hello.devices):
        if device not in roster.ledger.devices:
            return f"no device {device} here; this broker has {', '.join(roster.ledger.devices)}"
        why = _budget_refusal(roster, hello, device, page_bytes)
        if why is not None:
            return why
    return _host_refusal(roster.ledger, hello, page_bytes)


def _budget_refusal(roster: Roster, hello: Hello, device: str, page_bytes: int) -> str | None:
    """The floors must fit, and beside them the model that needs most to run: others may sleep meanwhile."""
    others = [engine.hello for engine in roster.engines.values() if engine.name != hello.engine]
    total, mine = roster.ledger.total(device), least_pages(hello, device)
    theirs = sum(least_pages(other, device) for other in others)
    largest = max((hello, *others), key=lambda h: _to_run(h, device))
    running = _to_run(largest, device)
    missing = mine + theirs + running - total
    if missing <= 0:
        return None

    def size(pages: int) -> str:
        return format_bytes(pages * page_bytes)

    awake = f", {largest.engine!r} {size(running)} more for its weights" if running else ""
    return (
        f"budget too small on {device}: {hello.engine!r} needs at least {size(mine)}, the others {size(theirs)}{awake}, and the "
        f"budget is {size(total)}. Raise kv_budget to {size(total + missing)} or more, or lower --max-model-len"
    )


def _to_run(hello: Hello, device: str) -> int:
    """Pages beyond the least that an engine can do with: its weights, and the rest of its floor."""
    awake = hello.floor_units * hello.pages_per_unit + hello.layers * hello.layer_pages
    return awake * hello.devices.count(device) - least_pages(hello, device)


def _host_refusal(ledger: Ledger, hello: Hello, page_bytes: int) -> str | None:
    pages = host_pages(hello)
    if not pages:
        return None
    if HOST not in ledger.devices:
        size = format_bytes(pages * page_bytes)
        return f"this broker has no host tier, and {hello.engine!r} wants {size} of it: start it with {HOST}=SIZE"
    free = ledger.free(HOST) + ledger.held(HOST, Owner(hello.engine, "lent"))
    if pages > free:
        return (
            f"{hello.engine!r} wants {format_bytes(pages * page_bytes)} of the host tier, and {format_bytes(free * page_bytes)} "
            f"of {format_bytes(ledger.total(HOST) * page_bytes)} are not taken by others: lower its quota, or enlarge the tier"
        )
    return None


def host_pages(hello: Hello) -> int:
    return hello.host_pages * len(hello.devices)


def fits_awake(roster: Roster, hello: Hello) -> bool:
    """Whether a newcomer's floor and all of its weights fit beside what the others hold and are still owed."""
    for device in set(hello.devices):
        room = roster.ledger.free(device)
        for use in ("kv", "weights"):
            room += roster.ledger.held(device, Owner(hello.engine, use))
        for other in roster.engines.values():
            if other.name == hello.engine or device not in other.hello.devices:
                continue
            waking = other.weights.waking_since is not None
            floor = other.hello.floor_units if waking else roster.floor(other)
            room -= max(0, floor - roster.held(other, device)) * other.pages_per_unit(device)
            room -= (other.hello.layers - roster.segments(other)) * other.layer_pages(device) if waking else 0
        if room < least_pages(hello, device) + _to_run(hello, device):
            return False
    return True


def reported(hello: Hello) -> Held:
    """What a reconnecting engine says it holds, in rising order of units. Raises ProtocolError when it is malformed."""
    pages = list[list[int]]([] for _ in hello.devices)
    for unit, ranks in sorted(hello.held.items()):
        if len(ranks) != len(hello.devices) or any(len(p) != hello.pages_per_unit for p in ranks):
            raise ProtocolError(f"{hello.engine} reports unit {unit} with a wrong number of pages")
        for rank, numbers in enumerate(ranks):
            pages[rank] += numbers
    if len(hello.held_segments) > hello.layers:
        raise ProtocolError(f"{hello.engine} reports {len(hello.held_segments)} segments of {hello.layers}")
    pages_by_device(hello, hello.held_segments)
    return Held(pages=pages, segments=hello.held_segments)


def claim(ledger: Ledger, engine: Engine, held: Held) -> Held | None:
    """Books what a reconnecting engine holds and says under which numbers; None, having booked nothing, if there is no room.

    An engine that reports after the recovery time may find its numbers granted to others. Its memory is another (pages of
    the former broker's segment, destroyed when given back), so any free numbers will do to keep the budget.
    """
    hello = engine.hello
    try:
        for device, numbers in zip(hello.devices, held.pages, strict=True):
            ledger.claim(device, engine.owner, numbers)
        for device, numbers in pages_by_device(hello, held.segments).items():
            ledger.claim(device, engine.weights_owner, numbers)
    except ProtocolError:
        ledger.forget(engine.owner)
        ledger.forget(engine.weights_owner)
    else:
        return held
    pages_each, segments = len(held.pages[0]), len(held.segments)
    for device in set(hello.devices):
        wanted = (pages_each + segments * hello.layer_pages) * hello.devices.count(device)
        if ledger.free(device) < wanted:
            return None
    pages = [ledger.take(device, engine.owner, pages_each).tolist() for device in hello.devices]
    return Held(pages=pages, segments=take_segments(ledger, engine, segments))


def take_segments(ledger: Ledger, engine: Engine, count: int) -> Segments:
    """Books `count` segments' pages, which must be free on all devices."""
    size = engine.hello.layer_pages
    ranks = [
        ledger.take(device, engine.weights_owner, count * size).reshape(count, size) for device in engine.hello.devices
    ]
    return [[pages[number].tolist() for pages in ranks] for number in range(count)]


def pages_by_device(hello: Hello, segments: Segments) -> dict[str, list[int]]:
    """All page numbers of some segments, by device. Raises ProtocolError when they are not whole segments of this engine."""
    pages: dict[str, list[int]] = {}
    for ranks in segments:
        if len(ranks) != len(hello.devices) or any(len(numbers) != hello.layer_pages for numbers in ranks):
            raise ProtocolError(f"{hello.engine}: not a segment of {hello.layer_pages} pages on each rank")
        for device, numbers in zip(hello.devices, ranks, strict=True):
            pages.setdefault(device, []).extend(numbers)
    return pages
