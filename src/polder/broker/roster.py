"""The engines a broker knows, and how much each holds and may hold. No decisions here, and no messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from polder.broker.lease import LeaseBook
from polder.broker.ledger import Ledger, Owner
from polder.broker.policy import EngineView, Target
from polder.broker.wire import Demand, Hello
from polder.errors import ProtocolError

__all__ = ["HOST", "Engine", "Roster", "WeightState", "least_pages"]

HOST = "host:0"
"""The device whose pages make the host tier."""


@dataclass(kw_only=True)
class WeightState:
    """What was decided about an engine's weights. How many segments it holds is the ledger's."""

    waking_since: float | None = None
    """It waits for all of its layers: a request came, or an operator said so."""
    pinned: int | None = None
    """Segments that an operator lets it have: 0, it sleeps; some, it streams the others. None: no word of an operator."""
    sleep_due: bool = False
    """An operator's sleep was not carried out yet: it had requests, or was to wake for some. Until it was, no request ends it."""
    roused: bool = False
    """It waits for its layers because an operator said so, not only for requests that may be aborted."""
    returning: int = 0
    """Segments that it shall have back as soon as their pages are free."""
    streamable: int = 0
    """Layers in all that it could stream when it last served."""
    changed_at: float = float("-inf")
    quiet_until: float = float("-inf")
    """It gave back fewer than asked for: no question before that time."""
    reason: str = ""


@dataclass(kw_only=True)
class Engine:
    hello: Hello
    owner: Owner
    pid: int
    connection: int | None
    processes: set[int]
    demand: Demand | None = None
    demand_at: float = float("-inf")
    weights: WeightState = field(default_factory=WeightState)
    pinned: int = 0
    target: Target = field(default_factory=lambda: Target(0, "new"))
    grew_at: float = float("-inf")
    shrank_at: float = float("-inf")
    quiet_until: float = float("-inf")
    recalled_total: int = 0
    need_since: float | None = None
    need_units: int = 0
    core_ended_at: float | None = None
    giveback_ms: deque[float] = field(default_factory=lambda: deque(maxlen=512))

    @property
    def name(self) -> str:
        return self.hello.engine

    @property
    def weights_owner(self) -> Owner:
        return Owner(self.hello.engine, "weights")

    def ranks_on(self, device: str) -> list[int]:
        return [rank for rank, name in enumerate(self.hello.devices) if name == device]

    def pages_per_unit(self, device: str) -> int:
        return self.hello.pages_per_unit * len(self.ranks_on(device))

    def layer_pages(self, device: str) -> int:
        """Pages of a segment on one device, all ranks together."""
        return self.hello.layer_pages * len(self.ranks_on(device))


@dataclass(kw_only=True)
class Roster:
    """All engines that hold pages. Sizes are in units of the engine concerned."""

    ledger: Ledger
    leases: LeaseBook
    engines: dict[str, Engine] = field(default_factory=dict)

    def of_connection(self, connection: int) -> Engine:
        for engine in self.engines.values():
            if engine.connection == connection:
                return engine
        raise ProtocolError("say Hello first")

    def held(self, engine: Engine, device: str) -> int:
        """Units booked to it on one device."""
        per_unit = engine.pages_per_unit(device)
        return self.ledger.held(device, engine.owner) // per_unit if per_unit else 0

    def held_units(self, engine: Engine) -> int:
        """Units booked to it, grants in flight included."""
        return min(self.held(engine, device) for device in engine.hello.devices)

    def grown_units(self, engine: Engine) -> int:
        """Units that are mapped: granted and acknowledged, and not asked back."""
        open_ = self.leases.units(engine.name, "grant") + self.leases.units(engine.name, "recall")
        return self.held_units(engine) - open_

    def segments(self, engine: Engine) -> int:
        """Segments of weights booked to it, those in flight included."""
        if not engine.hello.layers:
            return 0
        owner = engine.weights_owner
        return min(self.ledger.held(device, owner) // engine.layer_pages(device) for device in engine.hello.devices)

    def asleep(self, engine: Engine) -> bool:
        return engine.hello.layers > 0 and self.segments(engine) == 0

    def floor(self, engine: Engine) -> int:
        """The least that it must keep: while it sleeps, and knows it, one unit."""
        agreed = engine.demand is None or engine.demand.asleep
        return 1 if self.asleep(engine) and agreed else engine.hello.floor_units

    def shareable_pages(self, device: str) -> int:
        """Pages of the device that are not for weights: neither booked for them nor claimed by an engine that wakes."""
        here = [e for e in self.engines.values() if e.hello.layers]
        waking = [e for e in here if e.weights.waking_since is not None]
        claimed = sum((e.hello.layers - self.segments(e)) * e.layer_pages(device) for e in waking)
        return self.ledger.total(device) - sum(self.ledger.held(device, e.weights_owner) for e in here) - claimed

    def ceiling(self, engine: Engine) -> int:
        """The most it can ever hold: what it asked for, less what the others must be left, and a segment of its own weights."""
        most = engine.hello.ceiling_units
        for device in set(engine.hello.devices):
            others = sum(least_pages(e.hello, device) for e in self.others(engine))
            spare = self.ledger.total(device) - others - engine.layer_pages(device)
            most = min(most, spare // engine.pages_per_unit(device))
        return most

    def share(self, engine: Engine) -> int:
        """Its own on demand: what it asked for, else an equal part of what none of those awake asked for."""
        if engine.hello.share_units:
            return max(engine.hello.floor_units, min(engine.hello.share_units, self.ceiling(engine)))
        units = engine.hello.ceiling_units
        for device in set(engine.hello.devices):
            others = [e for e in self.others(engine) if not self.asleep(e) or e.weights.waking_since is not None]
            here = [e for e in (engine, *others) if device in e.hello.devices]
            booked = sum(e.hello.share_units * e.pages_per_unit(device) for e in here)
            equal = (self.shareable_pages(device) - booked) // sum(1 for e in here if not e.hello.share_units)
            units = min(units, equal // engine.pages_per_unit(device))
        return max(engine.hello.floor_units, min(units, self.ceiling(engine)))

    def others(self, engine: Engine) -> Iterator[Engine]:
        return (other for other in self.engines.values() if other.name != engine.name)

    def views(self, device: str, now: float) -> list[EngineView]:
        """What the policy is to know of every engine on the device."""
        return [self._view(e, device, now) for e in self.engines.values() if device in e.hello.devices]

    def _view(self, engine: Engine, device: str, now: float) -> EngineView:
        held, floor = self.held(engine, device), self.floor(engine)
        asleep = self.asleep(engine)
        # Requests of an engine that sleeps wait for its weights: it keeps what it has cached, and gets nothing more.
        demand = engine.demand
        working = None if asleep else demand
        return EngineView(
            name=engine.name,
            pages_per_unit=engine.pages_per_unit(device),
            floor=floor,
            share=self.share(engine),
            ceiling=max(floor, held) if asleep else self.ceiling(engine),
            held=held,
            recalled=min(held, self.leases.units(engine.name, "recall")),
            pinned=0 if asleep else engine.pinned,
            busy=working.busy_units if working else 0,
            waiting=working.waiting_units if working else 0,
            peak=working.peak_units if working else 0,
            cached=demand.cached_units if demand else 0,
            curve=demand.curve if demand else (),
            since_grow_s=now - engine.grew_at,
            since_shrink_s=now - engine.shrank_at,
        )


def least_pages(hello: Hello, device: str) -> int:
    """What an engine cannot do without: its floor, or one unit if it can sleep."""
    units = 1 if hello.layers else hello.floor_units
    return units * hello.pages_per_unit * hello.devices.count(device)
