"""Who may join, and with what: the checks of a Hello, and the booking of what an engine reports after a
reconnection."""

from __future__ import annotations

from polder.broker.lease import book, pages_by_device, units_in
from polder.broker.ledger import Ledger, Owner
from polder.broker.roster import HOST, Roster, least_pages
from polder.broker.wire import PROTOCOL, USES, Held, Hello, Pages
from polder.errors import ProtocolError
from polder.units import format_bytes

__all__ = ["book_host", "book_reported", "check_reported", "fits_awake", "pages_held", "refusal"]


def refusal(roster: Roster, hello: Hello, pid: int, page_bytes: int) -> str | None:
    """Why this engine cannot be served, and what to change. None: it can."""
    known = roster.engines.get(hello.engine)
    if hello.protocol != PROTOCOL:
        return f"protocol {hello.protocol} spoken, {PROTOCOL} expected: install the same Polder on both sides"
    if known is not None and known.pid != pid and known.processes:
        return f"engine name {hello.engine!r} is in use by process {known.pid}: choose another POLDER_ENGINE"
    if hello.page_bytes not in (0, page_bytes):
        sizes = f"{format_bytes(page_bytes)} here, {format_bytes(hello.page_bytes)} in {hello.engine!r}"
        return f"pages have {sizes}: start the broker and the engine with the same page size"
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
    """The floors of all must fit, and beside them the largest model awake, while the others sleep."""
    others = [engine.hello for engine in roster.engines.values() if engine.name != hello.engine]
    total, mine = roster.ledger.total(device), least_pages(hello, device)
    theirs = sum(least_pages(other, device) for other in others)
    largest = max((hello, *others), key=lambda h: _pages_to_run(h, device))
    running = _pages_to_run(largest, device)
    missing = mine + theirs + running - total
    if missing <= 0:
        return None

    def size(pages: int) -> str:
        return format_bytes(pages * page_bytes)

    awake = f", {largest.engine!r} {size(running)} more for its weights" if running else ""
    return (
        f"budget too small on {device}: {hello.engine!r} needs at least {size(mine)}, the others {size(theirs)}{awake}, and the "
        f"budget is {size(total)}. Raise the budget to {size(total + missing)} or more, or lower --max-model-len"
    )


def _pages_to_run(hello: Hello, device: str) -> int:
    """Pages beyond `least_pages` that an engine needs to run: its weights, and the rest of its floor."""
    awake = hello.floor_units * hello.unit_pages_on(device) + hello.layers * hello.unit_pages_on(device, "weights")
    return awake - least_pages(hello, device)


def _host_refusal(ledger: Ledger, hello: Hello, page_bytes: int) -> str | None:
    pages = _host_pages(hello)
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


def _host_pages(hello: Hello) -> int:
    return hello.host_pages * len(hello.devices)


def book_host(ledger: Ledger, hello: Hello) -> Pages:
    """Books the engine's pages of the host tier. An engine that comes back keeps those that it has."""
    if HOST not in ledger.devices:
        return []
    owner, wanted = Owner(hello.engine, "lent"), _host_pages(hello)
    if ledger.held(HOST, owner) != wanted:
        ledger.forget(owner)
        ledger.take(HOST, owner, wanted)
    pages = ledger.pages_of(HOST, owner).tolist()
    return [pages[rank :: len(hello.devices)] for rank in range(len(hello.devices))]


def fits_awake(roster: Roster, hello: Hello) -> bool:
    """Whether a newcomer's floor and all of its weights fit beside what the others hold and are still owed."""
    for device in set(hello.devices):
        room = roster.ledger.free(device) + sum(roster.ledger.held(device, Owner(hello.engine, use)) for use in USES)
        for other in roster.on(device):
            if other.name == hello.engine:
                continue
            waking = other.weights.waking_since is not None
            floor = other.hello.floor_units if waking else roster.floor(other)
            room -= max(0, floor - roster.units_on(other, device, "kv")) * other.hello.unit_pages_on(device)
            room -= roster.lacking(other) * other.hello.unit_pages_on(device, "weights") if waking else 0
        if room < least_pages(hello, device) + _pages_to_run(hello, device):
            return False
    return True


def check_reported(hello: Hello) -> None:
    """Checks what a reconnecting engine says it holds. Raises ProtocolError when it is malformed."""
    units_in(hello, "kv", hello.held.kv)
    segments = units_in(hello, "weights", hello.held.weights)
    if segments > hello.layers:
        raise ProtocolError(f"{hello.engine} reports {segments} segments of {hello.layers}")


def book_reported(ledger: Ledger, hello: Hello) -> Held | None:
    """Books what a reconnecting engine holds. Returns it with the numbers booked, or None, having booked nothing,
    without room.

    An engine that reports after the recovery time may find its page numbers granted to others. Its memory belongs to
    the former broker and is destroyed when given back, so any free numbers will do to keep the budget.
    """
    try:
        for use in USES:
            for device, numbers in pages_by_device(hello, hello.held.of(use)).items():
                ledger.claim(device, Owner(hello.engine, use), numbers)
    except ProtocolError:
        for use in USES:
            ledger.forget(Owner(hello.engine, use))
    else:
        return hello.held
    if any(ledger.free(device) < pages for device, pages in pages_held(hello).items()):
        return None
    kv, weights = (book(ledger, hello, use, units_in(hello, use, hello.held.of(use))) for use in USES)
    return Held(kv=kv, weights=weights)


def pages_held(hello: Hello) -> dict[str, int]:
    """Pages that a reconnecting engine reports, by device."""
    units = {use: units_in(hello, use, hello.held.of(use)) for use in USES}
    return {device: sum(units[use] * hello.unit_pages_on(device, use) for use in USES) for device in set(hello.devices)}
