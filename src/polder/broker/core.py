"""The broker without its sockets: messages in, messages out, time as an argument.

Everything the broker knows is here, so that tests drive it step by step with a clock of their own and check the laws after each
step. The server (server.py) only moves bytes, watches processes and calls `handle`, `process_ended` and `tick`.

What must hold whatever the peers do:
  * a page is booked to at most one owner (the ledger), and becomes free only by a Returned of its owner or when every
    process of its owner has ended (law 4);
  * a message that breaks the protocol changes nothing and raises ProtocolError: the server closes that connection;
  * an engine whose connection broke keeps its pages until it reports again or its processes end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from polder.broker import admission, fetching
from polder.broker.admission import Held
from polder.broker.config import BrokerConfig
from polder.broker.lease import LeaseBook
from polder.broker.ledger import Ledger, Owner
from polder.broker.policy import Plan, Recalled, decide
from polder.broker.roster import HOST, Engine, Roster, WeightState
from polder.broker.status import device_status, engine_status
from polder.broker.weights import Weights
from polder.broker.wire import (
    Demand,
    Done,
    Fetch,
    FetchTable,
    FromBroker,
    Grant,
    Grown,
    Hello,
    Neighbours,
    Recall,
    Refused,
    Resize,
    Returned,
    Rouse,
    SegmentsReturned,
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

RETRY_S = 0.1  # after a recall that came back short: time until the policy asks that engine again
GRANT_DEADLINE_S = 5.0


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
        self.leases = LeaseBook()
        self.roster = Roster(ledger=self.ledger, leases=self.leases)
        self.engines = self.roster.engines
        self.weights = Weights(roster=self.roster, config=self.config, started_at=self.started_at, send=self._send)
        self.refused_messages = 0
        self.reclaimed_pages = 0
        self._giveback_ms: deque[float] = deque(maxlen=512)
        self._announced: Neighbours | None = None
        self._stock: dict[int, Stock] = {}  # by process id
        self._missing: dict[str, set[int]] = {}  # device -> pages that there is no memory for
        self.uuids: dict[str, str] = {}  # device -> see memory.devices.device_uuid

    # ------------------------------------------------------------------ what happens

    def handle(self, connection: int, pid: int, message: ToBroker, now: float) -> None:
        """One message from the process `pid`. Raises ProtocolError, having changed nothing, if it breaks the protocol."""
        match message:
            case Hello():
                self._hello(connection, pid, message, now)
            case Stock():
                self._stock[pid] = message
                self.outbox.append((connection, Done()))
            case StatusRequest():
                self.outbox.append((connection, self.status(now)))
            case Resize():
                self._resize(connection, message)
            case Sleep() | Rouse() | Stream():
                self._operate(connection, message, now)
            case Fetch():
                self._answer(connection, fetching.check_fetch(self.roster, pid, message))
            case FetchTable():
                self._answer(connection, fetching.check_table(self.roster, message))
            case Demand():
                self._demand(self.roster.of_connection(connection), message, now)
            case Grown():
                self._grown(self.roster.of_connection(connection), message, now)
            case Returned():
                self._returned(self.roster.of_connection(connection), message, now)
            case Wake():
                self.weights.wake(self.roster.of_connection(connection), "a request came", now)
            case SegmentsReturned():
                self.weights.returned(self.roster.of_connection(connection), message, now)
        self.plan(now)

    def disconnected(self, connection: int) -> None:
        """The connection is gone. Its engine, if any, keeps its pages: it may come back, or its processes end."""
        for engine in self.engines.values():
            if engine.connection == connection:
                engine.connection = None
                self.leases.drop(engine.name)

    def process_ended(self, pid: int, now: float) -> None:
        """A process that said Hello or Fetch has ended. Its engine's pages are free when the last of its processes has."""
        self._stock.pop(pid, None)
        for engine in list(self.engines.values()):
            if pid not in engine.processes:
                continue
            engine.processes.discard(pid)
            if pid == engine.pid:
                engine.core_ended_at = now
            if not engine.processes:
                for owner in (engine.owner, engine.weights_owner, Owner(engine.name, "lent")):
                    self.reclaimed_pages += sum(self.ledger.forget(owner).values())
                self.leases.drop(engine.name)
                del self.engines[engine.name]
        self._announce()
        self.plan(now)

    def orphans(self, now: float, grace_s: float) -> list[int]:
        """Workers whose engine core ended more than `grace_s` ago: nobody will ever unmap their pages for them."""
        return [
            pid
            for engine in self.engines.values()
            if engine.core_ended_at is not None and now - engine.core_ended_at > grace_s
            for pid in engine.processes
        ]

    def withhold(self, device: str, pages: Iterable[int]) -> None:
        """The device has no memory for these pages. Whoever holds some gives them back; nobody gets them until `restore`."""
        self._missing.setdefault(device, set()).update(pages)
        self._withhold_missing()

    def restore(self, device: str, pages: Sequence[int]) -> None:
        """There is memory for these pages again."""
        self._missing.get(device, set()).difference_update(pages)
        self.ledger.restore(device, pages)

    def reserve_bytes(self, device: str) -> int:
        """What the engines on a device will still take from it for themselves, while they compute."""
        return sum(
            reserve
            for engine in self.engines.values()
            for name, reserve in zip(engine.hello.devices, engine.hello.reserve_bytes, strict=False)
            if name == device
        )

    def missing(self, device: str) -> list[int]:
        """Pages that there is no memory for, rising."""
        return sorted(self._missing.get(device, ()))

    def _withhold_missing(self) -> None:
        for device, pages in self._missing.items():
            if self.ledger.withheld(device) < len(pages):
                self.ledger.withhold(device, sorted(pages))

    def plan(self, now: float) -> None:
        """Compares all demands and sends the grants and recalls that follow."""
        self._withhold_missing()
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
            if recalls and now >= engine.quiet_until:
                self._recall(engine, max(recalls), now)

    def fetchable(self, message: Fetch) -> bool:
        """Whether handles of these pages may be given out."""
        return fetching.fetchable(self.roster, message)

    def check_integrity(self) -> None:
        self.ledger.check_integrity()

    # ------------------------------------------------------------------ messages

    def _hello(self, connection: int, pid: int, hello: Hello, now: float) -> None:
        self._withhold_missing()
        known = self.engines.get(hello.engine)
        refusal = admission.refusal(self.roster, hello, pid, self.config.page_bytes)
        if refusal is not None:
            self.outbox.append((connection, Refused(reason=refusal)))
            return
        comes_back = bool(hello.held or hello.held_segments)
        reported = admission.reported(hello)
        awake = hello.layers > 0 and not comes_back and admission.fits_awake(self.roster, hello)
        first_units = hello.floor_units if awake or not hello.layers else 1
        if not comes_back and not self._is_free(hello, first_units, now):
            reason = f"the floor of {hello.engine!r} is not free yet: it is being recalled from the others"
            self.outbox.append((connection, Refused(reason=reason, retry_s=RETRY_S)))
            return
        engine = Engine(hello=hello, owner=Owner(hello.engine, "kv"), pid=pid, connection=connection, processes={pid})
        if known is not None:
            # The same process again: what it reports replaces what we booked; promises of the old connection are void.
            engine.processes |= known.processes
            engine.pinned, engine.recalled_total = known.pinned, known.recalled_total
            engine.weights = WeightState(pinned=known.weights.pinned, sleep_due=known.weights.sleep_due)
            self.leases.drop(hello.engine)
            self.ledger.forget(engine.owner)
            self.ledger.forget(engine.weights_owner)
        lease, held = 0, admission.claim(self.ledger, engine, reported) if comes_back else None
        if comes_back and held is None:
            self._make_room(hello, reported, now)
            reason = f"no room yet for what {hello.engine!r} holds: others are asked to give memory back"
            self.outbox.append((connection, Refused(reason=reason, retry_s=RETRY_S)))
            return
        self.engines[hello.engine] = engine
        if held is None:
            segments = self.weights.book_all(engine, now) if awake else []
            lease, pages = self._take(engine, first_units, now)
            held = Held(pages=pages, segments=segments)
        welcome = Welcome(
            generation=self.generation,
            page_bytes=self.config.page_bytes,
            lease=lease,
            pages=held.pages,
            share_units=self.roster.share(engine),
            ceiling_units=self.roster.ceiling(engine),
            host=self._take_host(hello),
            segments=held.segments,
        )
        self._send(engine, welcome)
        self._announced = None  # the newcomer must hear of the others, whoever they are
        self._announce()

    def _answer(self, connection: int, answer: FromBroker | None) -> None:
        if answer is not None:
            self.outbox.append((connection, answer))

    def _send(self, engine: Engine, message: FromBroker) -> None:
        assert engine.connection is not None
        self.outbox.append((engine.connection, message))

    def _take_host(self, hello: Hello) -> list[list[int]]:
        """Books the engine's pages of the host tier, those of a former connection included."""
        owner = Owner(hello.engine, "lent")
        if HOST not in self.ledger.devices:
            return []
        wanted = admission.host_pages(hello)
        if self.ledger.held(HOST, owner) != wanted:  # else it comes back, and uses the ones that it has
            self.ledger.forget(owner)
            self.ledger.take(HOST, owner, wanted)
        pages = self.ledger.pages_of(HOST, owner).tolist()
        return [pages[rank :: len(hello.devices)] for rank in range(len(hello.devices))]

    def _announce(self) -> None:
        """Tells all engines who is here, if that has changed."""
        lenders = [e for e in self.engines.values() if e.hello.table_bytes and e.core_ended_at is None]
        message = Neighbours(
            lenders=[e.name for e in lenders],
            pids=[e.pid for e in lenders],
            cores=[e.pid for e in self.engines.values() if e.core_ended_at is None],
        )
        if message != self._announced:
            self._announced = message
            self.outbox += [(e.connection, message) for e in self.engines.values() if e.connection is not None]

    def _is_free(self, hello: Hello, units: int, now: float) -> bool:
        """Whether a newcomer can have that many units; if not, they are asked from the others."""
        if now < self.recovering_until:
            return False
        free = True
        for device in set(hello.devices):
            own = self.ledger.held(device, Owner(hello.engine, "kv"))
            pages = units * hello.pages_per_unit * hello.devices.count(device)
            if self.ledger.free(device) + own < pages:
                self._recall_for_floor(device, pages - own, now)
                free = False
        return free

    def _make_room(self, hello: Hello, held: Held, now: float) -> None:
        pages_each = len(held.pages[0]) + len(held.segments) * hello.layer_pages
        for device in set(hello.devices):
            self._recall_for_floor(device, pages_each * hello.devices.count(device), now)

    def _recall_for_floor(self, device: str, pages: int, now: float) -> None:
        """Recalls enough for a newcomer's floor, or for a latecomer's pages; it asks again until they are there."""
        missing = pages - self.ledger.free(device) - self.weights.coming_pages(device)
        for engine in sorted(self.engines.values(), key=lambda e: self.roster.held(e, device), reverse=True):
            per_unit = engine.pages_per_unit(device)
            open_units = self.leases.units(engine.name, "recall")
            spare = self.roster.held(engine, device) - open_units - self.roster.floor(engine) if per_unit else 0
            missing -= open_units * per_unit
            if missing <= 0 or spare <= 0 or engine.connection is None:
                continue
            units = min(spare, -(-missing // per_unit))
            self._recall(engine, Recalled(units, preempt=True), now)
            missing -= units * per_unit
        if missing > 0:
            self.weights.make_room(device, missing, now)

    def _resize(self, connection: int, message: Resize) -> None:
        engine = self.engines.get(message.engine)
        if engine is None:
            names = ", ".join(sorted(self.engines)) or "none"
            self.outbox.append((connection, Refused(reason=f"no engine {message.engine!r} here; known: {names}")))
            return
        low, high = engine.hello.floor_units, self.roster.ceiling(engine)
        if message.units and not low <= message.units <= high:
            reason = f"{message.engine}: {message.units} units is outside floor {low} .. ceiling {high}"
            self.outbox.append((connection, Refused(reason=reason)))
            return
        engine.pinned = message.units
        self.outbox.append((connection, Done()))

    def _operate(self, connection: int, message: Sleep | Rouse | Stream, now: float) -> None:
        engine = self.engines.get(message.engine)
        if engine is None or not engine.hello.layers:
            names = ", ".join(sorted(e.name for e in self.engines.values() if e.hello.layers)) or "none"
            reason = f"no engine {message.engine!r} here whose weights can move; those that can: {names}"
            self.outbox.append((connection, Refused(reason=reason)))
            return
        refusal = None
        match message:
            case Sleep():
                self.weights.sleep(engine, now)
            case Rouse():
                self.weights.rouse(engine, now)
            case Stream():
                refusal = self.weights.stream(engine, message.segments, now)
        self.outbox.append((connection, Done() if refusal is None else Refused(reason=refusal)))

    def _demand(self, engine: Engine, demand: Demand, now: float) -> None:
        if min(demand.held_units, demand.busy_units, demand.waiting_units, demand.cached_units) < 0:
            raise ProtocolError(f"{engine.name}: negative demand")
        if min(demand.spare_segments, demand.idle_s, demand.next_use_s, demand.layer_load_s) < 0:
            raise ProtocolError(f"{engine.name}: negative demand")
        before, engine.demand, engine.demand_at = engine.demand, demand, now
        self.weights.demanded(engine, before)
        entitled = min(
            max(demand.busy_units + demand.waiting_units, engine.hello.floor_units), self.roster.share(engine)
        )
        if self.roster.asleep(engine):
            entitled = 0  # its requests wait for weights, not for this
        if entitled <= self.roster.grown_units(engine):
            engine.need_since = None
        elif engine.need_since is None:
            engine.need_since, engine.need_units = now, entitled

    def _grown(self, engine: Engine, message: Grown, now: float) -> None:
        if self.leases.acknowledge(message.lease, engine.name) is None:
            return
        if engine.need_since is not None and self.roster.grown_units(engine) >= engine.need_units:
            milliseconds = (now - engine.need_since) * 1e3
            engine.giveback_ms.append(milliseconds)
            self._giveback_ms.append(milliseconds)
            engine.need_since = None

    def _returned(self, engine: Engine, message: Returned, now: float) -> None:
        per_unit = engine.hello.pages_per_unit
        if len(message.pages) != len(engine.hello.devices) or any(
            len(p) != len(message.pages[0]) or len(p) % per_unit for p in message.pages
        ):
            raise ProtocolError(f"{engine.name} returns parts of units")
        by_device: dict[str, list[int]] = {}
        for device, numbers in zip(engine.hello.devices, message.pages, strict=True):
            by_device.setdefault(device, []).extend(numbers)
        self.ledger.give_all_back(engine.owner, by_device)
        lease = self.leases.acknowledge(message.lease, engine.name)
        if lease is not None and lease.kind == "recall":
            engine.recalled_total += len(message.pages[0]) // per_unit
            engine.shrank_at = now
            if message.short:
                engine.quiet_until = now + RETRY_S

    # ------------------------------------------------------------------ pages out

    def _take(self, engine: Engine, units: int, now: float) -> tuple[int, list[list[int]]]:
        pages = []
        for device in engine.hello.devices:
            taken = self.ledger.take(device, engine.owner, units * engine.hello.pages_per_unit)
            pages.append(taken.tolist())
        lease = self.leases.open("grant", engine.name, units, now=now, deadline_s=GRANT_DEADLINE_S)
        return lease.number, pages

    def _grant(self, engine: Engine, units: int, now: float) -> None:
        needed = engine.demand.busy_units + engine.demand.waiting_units if engine.demand else 0
        if self.roster.held_units(engine) + units > needed:
            engine.grew_at = now
        lease, pages = self._take(engine, units, now)
        self._send(engine, Grant(lease=lease, units=units, pages=pages))

    def _recall(self, engine: Engine, recall: Recalled, now: float) -> None:
        deadline_s = self.config.policy.deadline_s
        lease = self.leases.open("recall", engine.name, recall.units, now=now, deadline_s=deadline_s)
        message = Recall(lease=lease.number, units=recall.units, deadline_s=deadline_s, preempt=recall.preempt)
        self._send(engine, message)

    def _decide(self, device: str, now: float) -> Plan:
        views = [*self.weights.claims(device), *self.roster.views(device, now)]
        return decide(
            self.weights.kv_pages(device),
            self.ledger.free(device),
            views,
            self.config.policy,
            coming_pages=self.weights.coming_pages(device),
        )

    def status(self, now: float) -> Status:
        leases = self.leases.statistics()
        return Status(
            generation=self.generation,
            uptime_s=now - self.started_at,
            devices=[
                device_status(self.roster, device, self.config.page_bytes, self.uuids.get(device, ""))
                for device in self.ledger.devices
            ],
            engines=[engine_status(self.roster, engine) for engine in self.engines.values()],
            grants=leases.grants,
            recalls=leases.recalls,
            overdue=leases.overdue,
            refused_messages=self.refused_messages,
            reclaimed_pages=self.reclaimed_pages,
            giveback_ms=list(self._giveback_ms),
            decisions=list(self.weights.decisions),
            stock={said.engine: said.reason for said in self._stock.values()},
        )
