"""The engines that a broker knows, and how much each holds and may hold. It decides nothing and sends no messages."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from polder.broker.lease import LeaseBook
from polder.broker.ledger import Ledger, Owner
from polder.broker.policy import EngineView, Target
from polder.broker.wire import USES, Demand, Hello, Use
from polder.errors import IntegrityError, ProtocolError

__all__ = ["HOST", "Engine", "Roster", "WeightState", "least_pages"]

HOST = "host:0"
"""The device whose pages make the host tier."""


@dataclass(kw_only=True)
class WeightState:
    """What was decided about an engine's weights. How many segments it holds is in the ledger."""

    waking_since: float | None = None
    """When it began to wait for all of its layers, for a request or an operator. None: it does not wait."""
    pinned: int | None = None
    """Segments that an operator allows it: 0 to sleep, fewer than its layers to stream the others. None: no order."""
    sleep_due: bool = False
    """An operator's Sleep is not carried out yet, because the engine has requests or was to wake for some. Until it is,
    no request cancels it."""
    sleep_said_at: float = float("-inf")
    """When that order came, as long as a report may arrive that was sent before it; see Weights.demanded."""
    woken: bool = False
    """It waits for its layers because an operator said so. Aborted requests do not end that."""
    returning: int = 0
    """Segments that it shall get back as soon as their pages are free."""
    streamable: int = 0
    """Layers in all that it could stream when it last served."""
    changed_at: float = float("-inf")
    reason: str = ""


@dataclass(kw_only=True)
class Engine:
    hello: Hello
    pid: int
    connection: int | None
    processes: set[int]
    demand: Demand | None = None
    demand_at: float = float("-inf")
    weights: WeightState = field(default_factory=WeightState)
    pinned: int = 0
    """KV units that an operator gives it. 0: the policy decides."""
    target: Target = field(default_factory=lambda: Target(0, "new"))
    grew_at: float = float("-inf")
    shrank_at: float = float("-inf")
    quiet_until: dict[Use, float] = field(default_factory=dict)
    """It returned fewer units than were recalled: no recall before that time."""
    recalled_total: int = 0
    need_since: float | None = None
    """Since when it needs `need_units`, which are within its share, and does not have them."""
    need_units: int = 0
    core_ended_at: float | None = None
    giveback_ms: deque[float] = field(default_factory=lambda: deque(maxlen=512))

    @property
    def name(self) -> str:
        return self.hello.engine

    @property
    def alive(self) -> bool:
        return self.core_ended_at is None

    def is_quiet(self, use: Use, now: float) -> bool:
        """It cannot be asked for pages now."""
        return self.connection is None or now < self.quiet_until.get(use, now)


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

    def on(self, device: str) -> list[Engine]:
        """The engines with a rank on a device."""
        return [engine for engine in self.engines.values() if device in engine.hello.devices]

    def others(self, engine: Engine) -> Iterator[Engine]:
        return (other for other in self.engines.values() if other.name != engine.name)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless every engine holds whole units, and no more segments than it has layers."""
        for engine in self.engines.values():
            for device in set(engine.hello.devices):
                for use in USES:
                    pages, size = self.pages(engine, device, use), engine.hello.unit_pages_on(device, use)
                    if pages and (not size or pages % size):
                        raise IntegrityError(
                            f"{engine.name} holds {pages} pages of {device} for {use}, in units of {size}"
                        )
            if self.lacking(engine) < 0:
                raise IntegrityError(f"{engine.name} holds {-self.lacking(engine)} segments more than it has layers")

    # ------------------------------------------------------------------ what they hold

    def pages(self, engine: Engine, device: str, use: Use) -> int:
        return self.ledger.held(device, Owner(engine.name, use))

    def units(self, engine: Engine, use: Use) -> int:
        """Units booked to it, grants in flight included."""
        if not engine.hello.unit_pages(use):
            return 0
        return min(self.units_on(engine, device, use) for device in engine.hello.devices)

    def units_on(self, engine: Engine, device: str, use: Use) -> int:
        return self.pages(engine, device, use) // engine.hello.unit_pages_on(device, use)

    def recalled(self, engine: Engine, use: Use) -> int:
        """Units that it was asked for and has not returned yet."""
        return min(self.units(engine, use), self.leases.units(engine.name, "recall", use))

    def grown_units(self, engine: Engine) -> int:
        """KV units that it has mapped and may keep."""
        on_their_way = self.leases.units(engine.name, "grant", "kv") + self.leases.units(engine.name, "recall", "kv")
        return self.units(engine, "kv") - on_their_way

    def asleep(self, engine: Engine) -> bool:
        return engine.hello.layers > 0 and not self.units(engine, "weights")

    def lacking(self, engine: Engine) -> int:
        """Segments of its layers that it does not hold."""
        return engine.hello.layers - self.units(engine, "weights")

    # ------------------------------------------------------------------ what they may hold

    def floor(self, engine: Engine) -> int:
        """The KV units that it must keep: one while it sleeps, as soon as it has said that it does."""
        knows = engine.demand is None or engine.demand.asleep
        return 1 if self.asleep(engine) and knows else engine.hello.floor_units

    def ceiling(self, engine: Engine) -> int:
        """The KV units that it can hold at most: what it asked for, less what the others must have and one of its own
        segments."""
        most = engine.hello.ceiling_units
        for device in set(engine.hello.devices):
            others = sum(least_pages(other.hello, device) for other in self.others(engine))
            spare = self.ledger.total(device) - others - engine.hello.unit_pages_on(device, "weights")
            most = min(most, spare // engine.hello.unit_pages_on(device))
        return most

    def share(self, engine: Engine) -> int:
        """The KV units that it gets on demand: what it asked for, else an equal part of what no awake engine asked
        for."""
        if engine.hello.share_units:
            return max(engine.hello.floor_units, min(engine.hello.share_units, self.ceiling(engine)))
        units = engine.hello.ceiling_units
        for device in set(engine.hello.devices):
            awake = [e for e in self.on(device) if not self.asleep(e) or e.weights.waking_since is not None]
            here = [engine, *(e for e in awake if e.name != engine.name)]
            promised = sum(e.hello.share_units * e.hello.unit_pages_on(device) for e in here)
            sharing = sum(1 for e in here if not e.hello.share_units)
            equal = (self._pages_for_kv(device) - promised) // sharing
            units = min(units, equal // engine.hello.unit_pages_on(device))
        return max(engine.hello.floor_units, min(units, self.ceiling(engine)))

    def _pages_for_kv(self, device: str) -> int:
        """Pages of the device that are not for weights: neither booked for them nor needed by an engine that wakes."""
        pages = self.ledger.total(device)
        for engine in self.on(device):
            pages -= self.pages(engine, device, "weights")
            if engine.weights.waking_since is not None:
                pages -= self.lacking(engine) * engine.hello.unit_pages_on(device, "weights")
        return pages

    # ------------------------------------------------------------------ what the policy is told

    def views(self, device: str, now: float) -> list[EngineView]:
        return [self._view(engine, device, now) for engine in self.on(device)]

    def _view(self, engine: Engine, device: str, now: float) -> EngineView:
        held, floor, asleep = self.units_on(engine, device, "kv"), self.floor(engine), self.asleep(engine)
        # Requests of an engine that sleeps wait for its weights: it keeps what it has cached, and gets nothing more.
        demand = engine.demand
        working = None if asleep else demand
        return EngineView(
            name=engine.name,
            pages_per_unit=engine.hello.unit_pages_on(device),
            floor=floor,
            share=self.share(engine),
            ceiling=max(floor, held) if asleep else self.ceiling(engine),
            held=held,
            recalled=min(held, self.leases.units(engine.name, "recall", "kv")),
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
    """The KV pages that an engine cannot do without: its floor, or one unit if it can sleep."""
    units = 1 if hello.layers else hello.floor_units
    return units * hello.unit_pages_on(device)
