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

__all__ = ["Engine", "Roster"]


@dataclass(kw_only=True)
class Engine:
    hello: Hello
    owner: Owner
    pid: int
    connection: int | None
    processes: set[int]
    demand: Demand | None = None
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

    def ranks_on(self, device: str) -> list[int]:
        return [rank for rank, name in enumerate(self.hello.devices) if name == device]

    def pages_per_unit(self, device: str) -> int:
        return self.hello.pages_per_unit * len(self.ranks_on(device))


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

    def ceiling(self, engine: Engine) -> int:
        """The most it can ever hold: what it asked for, less what the others' floors leave."""
        most = engine.hello.ceiling_units
        for device in set(engine.hello.devices):
            others = sum(e.hello.floor_units * e.pages_per_unit(device) for e in self.others(engine))
            most = min(most, (self.ledger.total(device) - others) // engine.pages_per_unit(device))
        return most

    def share(self, engine: Engine) -> int:
        """Its own on demand: what it asked for, else an equal part of what nobody asked for."""
        if engine.hello.share_units:
            return max(engine.hello.floor_units, min(engine.hello.share_units, self.ceiling(engine)))
        units = engine.hello.ceiling_units
        for device in set(engine.hello.devices):
            here = [e for e in (engine, *self.others(engine)) if device in e.hello.devices]
            booked = sum(e.hello.share_units * e.pages_per_unit(device) for e in here)
            equal = (self.ledger.total(device) - booked) // sum(1 for e in here if not e.hello.share_units)
            units = min(units, equal // engine.pages_per_unit(device))
        return max(engine.hello.floor_units, min(units, self.ceiling(engine)))

    def others(self, engine: Engine) -> Iterator[Engine]:
        return (other for other in self.engines.values() if other.name != engine.name)

    def views(self, device: str, now: float) -> list[EngineView]:
        """What the policy is to know of every engine on the device."""
        views = []
        for engine in self.engines.values():
            if device not in engine.hello.devices:
                continue
            demand, held = engine.demand, self.held(engine, device)
            views.append(
                EngineView(
                    name=engine.name,
                    pages_per_unit=engine.pages_per_unit(device),
                    floor=engine.hello.floor_units,
                    share=self.share(engine),
                    ceiling=self.ceiling(engine),
                    held=held,
                    recalled=min(held, self.leases.units(engine.name, "recall")),
                    pinned=engine.pinned,
                    busy=demand.busy_units if demand else 0,
                    waiting=demand.waiting_units if demand else 0,
                    peak=demand.peak_units if demand else 0,
                    cached=demand.cached_units if demand else 0,
                    curve=demand.curve if demand else (),
                    since_grow_s=now - engine.grew_at,
                    since_shrink_s=now - engine.shrank_at,
                )
            )
        return views
