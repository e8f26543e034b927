"""The broker without its sockets: messages in, messages out, time as an argument.

Everything that the broker knows is here, so that tests drive it step by step with a clock of their own and check the
laws after each step. The server (server.py) only moves bytes, watches processes and calls `handle`, `process_ended` and
`plan`.

Whatever the peers do:
  * a page is booked to at most one owner (ledger.py), and becomes free only when its owner returns it or when every
    process of its owner has ended (law 4);
  * a message that breaks the protocol changes nothing and raises ProtocolError; the server then closes that connection;
  * an engine whose connection broke keeps its pages until it reports again or its processes end.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from polder.broker import admission
from polder.broker.config import BrokerConfig
from polder.broker.lease import LeaseBook, book
from polder.broker.ledger import PURPOSES, Ledger, Owner
from polder.broker.policy import Plan, Recalled, decide
from polder.broker.roster import HOST, Engine, Roster, WeightState
from polder.broker.status import device_status, engine_status
from polder.broker.weights import Weights
from polder.broker.wire import (
    USES,
    Demand,
    Done,
    FromBroker,
    Grown,
    Held,
    Hello,
    NeedWeights,
    Neighbours,
    Refused,
    Resize,
    Returned,
    Sleep,
    Status,
    StatusRequest,
    Stock,
    Stream,
    ToBroker,
    Wake,
    Welcome,
)
from polder.errors import ProtocolError

__all__ = ["HOST", "BrokerCore"]

RETRY_S = 0.1  # after a recall that was not met: time until that engine is asked again


@dataclass(kw_only=True)
class BrokerCore:
    """State of one broker. `outbox` collects (connection, message) pairs for the server to send, in order."""

    config: BrokerConfig
    generation: int
    started_at: float
    recovering_until: float = float("-inf")
    """Until then engines of a former broker report what they hold, and nothing is granted."""
    outbox: list[tuple[int, FromBroker]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.config.total_pages())
        self.leases = LeaseBook(ledger=self.ledger, deadline_s=self.config.policy.deadline_s)
        self.roster = Roster(ledger=self.ledger, leases=self.leases)
        self.engines = self.roster.engines
        self.weights = Weights(roster=self.roster, config=self.config, started_at=self.started_at, send=self._send)
        self.refused_messages = 0
        self.reclaimed_pages = 0
        self.uuids: dict[str, str] = {}  # device -> see memory.devices.device_uuid
        self._giveback_ms: deque[float] = deque(maxlen=512)
        self._announced: Neighbours | None = None
        self._stock: dict[int, Stock] = {}  # by process id

    # ------------------------------------------------------------------ events

    def handle(self, connection: int, pid: int, message: ToBroker, now: float) -> None:
        """One message from the process `pid`. Raises ProtocolError, having changed nothing, if it breaks the
        protocol."""
        match message:
            case Hello():
                self._hello(connection, pid, message, now)
            case Stock():
                self._stock[pid] = message
                self._answer(connection)
            case StatusRequest():
                self.outbox.append((connection, self.status(now)))
            case Resize():
                self._answer(connection, self._resize(message))
            case Sleep() | Wake() | Stream():
                self._answer(connection, self._operate(message, now))
            case Demand():
                self._demand(self.roster.of_connection(connection), message, now)
            case NeedWeights():
                self.weights.need(self.roster.of_connection(connection), "a request came", now)
            case Grown():
                self._grown(self.roster.of_connection(connection), message, now)
            case Returned():
                self._returned(self.roster.of_connection(connection), message, now)
        self.plan(now)

    def disconnected(self, connection: int) -> None:
        """The connection is gone. Its engine, if any, keeps its pages until it comes back or its processes end."""
        for engine in self.engines.values():
            if engine.connection == connection:
                engine.connection = None
                self.leases.drop(engine.name)

    def process_ended(self, pid: int, now: float) -> None:
        """A process that said Hello or Fetch has ended. Its engine's pages are free when its last process has ended."""
        self._stock.pop(pid, None)
        for engine in list(self.engines.values()):
            if pid not in engine.processes:
                continue
            engine.processes.discard(pid)
            if pid == engine.pid:
                engine.core_ended_at = now
            if not engine.processes:
                for purpose in PURPOSES:
                    self.reclaimed_pages += sum(self.ledger.forget(Owner(engine.name, purpose)).values())
                self.leases.drop(engine.name)
                del self.engines[engine.name]
        self._announce()
        self.plan(now)

    def orphans(self, now: float, grace_s: float) -> list[int]:
        """Workers whose engine core ended more than `grace_s` ago. Nobody will ever make them unmap their pages."""
        return [
            pid
            for engine in self.engines.values()
            if engine.core_ended_at is not None and now - engine.core_ended_at > grace_s
            for pid in engine.processes
        ]

    def reserve_bytes(self, device: str) -> int:
        """Device memory that the engines on it will still allocate for themselves while they compute."""
        return sum(
            reserve
            for engine in self.engines.values()
            for name, reserve in zip(engine.hello.devices, engine.hello.reserve_bytes, strict=False)
            if name == device
        )

    def plan(self, now: float) -> None:
        """Compares all demands and sends the grants and recalls that follow."""
        if now < self.recovering_until:
            return
        self.leases.mark_overdue(now)
        self.weights.plan(now)
        plans = {device: self._decide(device, now) for device in self.ledger.devices}
        self.weights.carry_out(plans, now)
        for engine in list(self.engines.values()):
            mine = [plans[device] for device in set(engine.hello.devices)]
            engine.target = min((plan.targets[engine.name] for plan in mine), key=lambda t: t.units)
            if engine.connection is None:
                continue
            grant = min(plan.grants.get(engine.name, 0) for plan in mine)
            if grant > 0:
                self._grant(engine, grant, now)
            recalls = [plan.recalls[engine.name] for plan in mine if engine.name in plan.recalls]
            if recalls and not engine.is_quiet("kv", now):
                self._recall(engine, max(recalls), now)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless free + owned = total, and engines hold whole units and no more segments than
        layers."""
        self.ledger.check_integrity()
        self.roster.check_integrity()

    # ------------------------------------------------------------------ engines that join

    def _hello(self, connection: int, pid: int, hello: Hello, now: float) -> None:
        known = self.engines.get(hello.engine)
        refusal = admission.refusal(self.roster, hello, pid, self.config.page_bytes)
        if refusal is not None:
            self.outbox.append((connection, Refused(reason=refusal)))
            return
        admission.check_reported(hello)
        comes_back = bool(hello.held)
        awake = hello.layers > 0 and not comes_back and admission.fits_awake(self.roster, hello)
        first_units = hello.floor_units if awake or not hello.layers else 1
        if not comes_back and not self._is_free(hello, first_units, now):
            reason = f"the floor of {hello.engine!r} is not free yet: it is being recalled from the others"
            self.outbox.append((connection, Refused(reason=reason, retry_s=RETRY_S)))
            return
        engine = Engine(hello=hello, pid=pid, connection=connection, processes={pid})
        if known is not None:
            # The same process again: what it reports replaces what was booked, and promises of the old connection are
            # void.
            engine.processes |= known.processes
            engine.pinned, engine.recalled_total = known.pinned, known.recalled_total
            engine.weights = WeightState(pinned=known.weights.pinned, sleep_due=known.weights.sleep_due)
            self.leases.drop(hello.engine)
            for use in USES:
                self.ledger.forget(Owner(hello.engine, use))
        lease, held = 0, Held()
        if comes_back:
            booked = admission.book_reported(self.ledger, hello)
            if booked is None:
                for device, pages in admission.pages_held(hello).items():
                    self._make_room(device, pages, now)
                reason = f"no room yet for what {hello.engine!r} holds: others are asked to give memory back"
                self.outbox.append((connection, Refused(reason=reason, retry_s=RETRY_S)))
                return
            held = booked
        else:
            held, lease = self._first_pages(engine, first_units, hello.layers if awake else 0, now)
        self.engines[hello.engine] = engine
        welcome = Welcome(
            generation=self.generation,
            lease=lease,
            held=held,
            share_units=self.roster.share(engine),
            ceiling_units=self.roster.ceiling(engine),
            host=admission.book_host(self.ledger, hello),
        )
        self._send(engine, welcome)
        self._announced = None  # the newcomer must hear of the others, even if nothing has changed
        self._announce()

    def _is_free(self, hello: Hello, units: int, now: float) -> bool:
        """Whether a newcomer can have that many KV units. If not, they are recalled from the others."""
        if now < self.recovering_until:
            return False
        free = True
        for device in set(hello.devices):
            own = self.ledger.held(device, Owner(hello.engine, "kv"))
            pages = units * hello.unit_pages_on(device)
            if self.ledger.free(device) + own < pages:
                self._make_room(device, pages - own, now)
                free = False
        return free

    def _make_room(self, device: str, pages: int, now: float) -> None:
        """Recalls enough to have `pages` free. To be repeated until they are."""
        missing = pages - self.ledger.free(device) - self.weights.coming_pages(device)
        for engine in sorted(self.roster.on(device), key=lambda e: self.roster.units_on(e, device, "kv"), reverse=True):
            size = engine.hello.unit_pages_on(device)
            recalled = self.leases.units(engine.name, "recall", "kv")
            spare = self.roster.units_on(engine, device, "kv") - recalled - self.roster.floor(engine)
            missing -= recalled * size
            if missing <= 0 or spare <= 0 or engine.connection is None:
                continue
            units = min(spare, -(-missing // size))
            self._recall(engine, Recalled(units, preempt=True), now)
            missing -= units * size
        if missing > 0:
            self.weights.make_room(device, missing, now)

    def _announce(self) -> None:
        """Tells all engines who is here, if that has changed."""
        lenders = [e for e in self.engines.values() if e.hello.table_bytes and e.alive]
        message = Neighbours(
            lenders=[e.name for e in lenders],
            pids=[e.pid for e in lenders],
            cores=[e.pid for e in self.engines.values() if e.alive],
        )
        if message != self._announced:
            self._announced = message
            self.outbox += [(e.connection, message) for e in self.engines.values() if e.connection is not None]

    # ------------------------------------------------------------------ operators' messages

    def _resize(self, message: Resize) -> str | None:
        """Returns why that cannot be."""
        engine = self.engines.get(message.engine)
        if engine is None:
            names = ", ".join(sorted(self.engines)) or "none"
            return f"no engine {message.engine!r} here; known: {names}"
        low, high = engine.hello.floor_units, self.roster.ceiling(engine)
        if message.units and not low <= message.units <= high:
            return f"{message.engine}: {message.units} units is outside floor {low} .. ceiling {high}"
        engine.pinned = message.units
        return None

    def _operate(self, message: Sleep | Wake | Stream, now: float) -> str | None:
        """Returns why that cannot be."""
        engine = self.engines.get(message.engine)
        if engine is not None and not engine.hello.layers:
            return (
                f'{message.engine} has no elastic weights: start it with POLDER_WEIGHTS=elastic (weights = "elastic")'
            )
        if engine is None:
            names = ", ".join(sorted(e.name for e in self.engines.values() if e.hello.layers)) or "none"
            return f"no engine {message.engine!r} here; those whose weights can move: {names}"
        match message:
            case Sleep():
                self.weights.sleep(engine, now)
            case Wake():
                self.weights.wake(engine, now)
            case Stream():
                return self.weights.stream(engine, message.segments, now)
        return None

    # ------------------------------------------------------------------ engines' messages

    def _demand(self, engine: Engine, demand: Demand, now: float) -> None:
        units = (demand.held_units, demand.busy_units, demand.waiting_units, demand.cached_units)
        if min(*units, demand.spare_segments, demand.idle_s, demand.next_use_s, demand.layer_load_s) < 0:
            raise ProtocolError(f"{engine.name}: negative demand")
        before, engine.demand, engine.demand_at = engine.demand, demand, now
        self.weights.demanded(engine, before)
        needed = max(demand.busy_units + demand.waiting_units, engine.hello.floor_units)
        # Requests of an engine that sleeps wait for its weights, not for KV units.
        entitled = 0 if self.roster.asleep(engine) else min(needed, self.roster.share(engine))
        if entitled <= self.roster.grown_units(engine):
            engine.need_since = None
        elif engine.need_since is None:
            engine.need_since, engine.need_units = now, entitled

    def _grown(self, engine: Engine, message: Grown, now: float) -> None:
        if self.leases.close(message.lease, engine.name) is None:
            return
        if engine.need_since is not None and self.roster.grown_units(engine) >= engine.need_units:
            milliseconds = (now - engine.need_since) * 1e3
            engine.giveback_ms.append(milliseconds)
            self._giveback_ms.append(milliseconds)
            engine.need_since = None

    def _returned(self, engine: Engine, message: Returned, now: float) -> None:
        lease, units = self.leases.returned(engine.hello, message)
        recalled = lease is not None and lease.kind == "recall"
        if message.short and (recalled or message.use == "weights"):
            engine.quiet_until[message.use] = now + RETRY_S
        if message.use == "weights":
            self.weights.returned(engine, units, unasked=lease is None, now=now)
        elif recalled:
            engine.recalled_total += units
            engine.shrank_at = now

    # ------------------------------------------------------------------ messages out

    def _answer(self, connection: int, refusal: str | None = None) -> None:
        self.outbox.append((connection, Done() if refusal is None else Refused(reason=refusal)))

    def _send(self, engine: Engine, message: FromBroker) -> None:
        assert engine.connection is not None
        self.outbox.append((engine.connection, message))

    def _first_pages(self, engine: Engine, units: int, segments: int, now: float) -> tuple[Held, int]:
        """The pages of a newcomer, and the lease of its KV units."""
        grant = self.leases.grant(engine.hello, "kv", units)
        if not segments:
            return Held(kv=grant.pages), grant.lease
        engine.weights.changed_at = now
        engine.weights.reason = "there was room for all of its layers"
        return Held(kv=grant.pages, weights=book(self.ledger, engine.hello, "weights", segments)), grant.lease

    def _grant(self, engine: Engine, units: int, now: float) -> None:
        needed = engine.demand.busy_units + engine.demand.waiting_units if engine.demand else 0
        if self.roster.units(engine, "kv") + units > needed:
            engine.grew_at = now
        self._send(engine, self.leases.grant(engine.hello, "kv", units))

    def _recall(self, engine: Engine, recall: Recalled, now: float) -> None:
        self._send(engine, self.leases.recall(engine.name, "kv", recall.units, preempt=recall.preempt, now=now))

    def _decide(self, device: str, now: float) -> Plan:
        return decide(
            self.weights.kv_pages(device),
            self.ledger.free(device),
            self.roster.views(device, now),
            self.config.policy,
            claims=self.weights.claims(device),
            coming_pages=self.weights.coming_pages(device),
        )

    def status(self, now: float) -> Status:
        return Status(
            generation=self.generation,
            uptime_s=now - self.started_at,
            devices=[
                device_status(self.roster, device, self.config.page_bytes, self.uuids.get(device, ""))
                for device in self.ledger.devices
            ],
            engines=[engine_status(self.roster, engine) for engine in self.engines.values()],
            grants=self.leases.count("grant", "kv"),
            recalls=self.leases.count("recall", "kv"),
            overdue=self.leases.overdue,
            refused_messages=self.refused_messages,
            reclaimed_pages=self.reclaimed_pages,
            giveback_ms=list(self._giveback_ms),
            decisions=list(self.weights.decisions),
            stock={said.engine: said.reason for said in self._stock.values()},
        )
