"""The laws of docs/structures.md, after every step of random lives of a broker and its engines, for KV and weights
alike.

The broker is the real core, the engines hold real pages: a span over the CPU backend, mapped through handles of the
broker's pool, stamped with their owner and use. Messages wait in queues and are delivered in random order between
engines, processes are killed, connections break, the broker is killed and started again. After each step: free + owned
= total (law 1), every mapped page is booked to the engine that maps it, once and for one use (law 4), its bytes are
what its owner wrote (zero when it came, law 2), and no engine is below its floor (law 6), which is one unit
while its weights are away. And from any state, if the others answer, an engine that needs its weights has them within a
bounded number of rounds.
"""

from __future__ import annotations

import ctypes
import math
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from polder.broker.config import BrokerConfig
from polder.broker.core import BrokerCore
from polder.broker.fetching import check_fetch
from polder.broker.ledger import Owner
from polder.broker.policy import PolicyConfig
from polder.broker.wire import (
    USES,
    Demand,
    Fetch,
    FromBroker,
    Grant,
    Grown,
    Held,
    Hello,
    NeedWeights,
    Recall,
    Refused,
    Resize,
    Returned,
    Sleep,
    Stream,
    ToBroker,
    Use,
    Wake,
    Welcome,
)
from polder.memory.cpu import CpuBackend
from polder.memory.pool import ImportedPages, PagePool
from polder.memory.span import Span
from polder.planner.sharing import SharingConfig
from tests.conftest import examples

PAGE = 4096
TOTAL = 60
DEVICE = "cpu:0"
OPERATOR = 999_999
ROUNDS = 60
CONFIG = BrokerConfig(
    socket=Path("unused"),
    devices={DEVICE: TOTAL * PAGE},
    page_bytes=PAGE,
    policy=PolicyConfig(min_hold_s=0.5, reserve_low_ratio=0.05, reserve_high_ratio=0.1),
    sharing=SharingConfig(min_hold_s=0.5, min_idle_s=0.2, turn_s=0.6),
)


@dataclass
class Engine:
    """An engine in small: a worker's span and the core's answers, without vLLM. `layers` 0: its weights do not move."""

    name: str
    pid: int
    connection: int
    pages_per_unit: int
    floor: int
    layers: int
    layer_pages: int
    backend: CpuBackend = field(default_factory=lambda: CpuBackend(page_bytes=PAGE, device=DEVICE))
    inbox: deque[FromBroker] = field(default_factory=deque)
    outbox: deque[ToBroker] = field(default_factory=deque)
    held: dict[Use, dict[int, list[int]]] = field(default_factory=lambda: {"kv": {}, "weights": {}})
    """Pages of each unit."""
    generation: int = -1
    welcome: bool = False
    requests: int = 0
    """KV units that they need."""
    gain: float = 0.0
    idle_since: float = 0.0

    def __post_init__(self) -> None:
        self.imported = ImportedPages(self.backend)
        self.span = Span(self.backend, 2 * TOTAL)
        self.outbox.append(self.hello())

    def close(self) -> None:
        self.span.close()
        self.backend.close()

    @property
    def asleep(self) -> bool:
        return self.layers > 0 and not self.held["weights"]

    @property
    def busy(self) -> int:
        return 0 if self.asleep else min(self.requests, len(self.held["kv"]))

    @property
    def spare_segments(self) -> int:
        held = len(self.held["weights"])
        return max(0, held - self.layers // 2) if self.requests else held

    def size(self, use: Use) -> int:
        return self.pages_per_unit if use == "kv" else self.layer_pages

    def slots(self, use: Use, unit: int) -> np.ndarray:
        start = unit * self.size(use) + (0 if use == "kv" else TOTAL)
        return np.arange(start, start + self.size(use), dtype=np.int64)

    def bytes_of(self, use: Use, unit: int) -> bytes:
        return b"".join(ctypes.string_at(self.span.address(int(slot)), PAGE) for slot in self.slots(use, unit))

    def stamp(self, use: Use) -> int:
        return 1 + 2 * (self.pid % 100) + USES.index(use)

    def hello(self) -> Hello:
        kv, weights = ([page for _, pages in sorted(self.held[use].items()) for page in pages] for use in USES)
        return Hello(
            engine=self.name,
            model="m",
            devices=[DEVICE],
            page_bytes=PAGE,
            pages_per_unit=self.pages_per_unit,
            unit_tokens=16,
            floor_units=self.floor,
            ceiling_units=TOTAL // self.pages_per_unit,
            share_units=0,
            layers=self.layers,
            layer_pages=self.layer_pages,
            held=Held(kv=[kv], weights=[weights]),
        )

    def demand(self, now: float) -> Demand:
        return Demand(
            held_units=len(self.held["kv"]),
            busy_units=self.busy,
            waiting_units=self.requests - self.busy,
            peak_units=self.requests,
            cached_units=len(self.held["kv"]),
            curve=[self.gain * units for units in range(TOTAL // self.pages_per_unit + 1)],
            urgent=self.requests > self.busy,
            asleep=self.asleep,
            spare_segments=self.spare_segments,
            idle_s=0.0 if self.requests else max(1e-3, now - self.idle_since),
            next_use_s=math.inf,
        )

    def map(self, use: Use, pages: list[int], core: BrokerCore, pool: PagePool) -> None:
        size = self.size(use)
        count = len(pages) // size if size else 0
        if not count:
            return
        missing = self.imported.missing(self.generation, pages)
        if missing:
            request = Fetch(engine=self.name, rank=0, device=DEVICE, pages=list(missing))
            assert check_fetch(core.roster, self.pid, request) is None
            fds, index, offsets = pool.export(missing)
            self.imported.adopt(self.generation, missing, fds, index, offsets)
            for fd in fds:
                os.close(fd)
        units = [unit for unit in range(TOTAL) if unit not in self.held[use]][:count]
        slots = np.concatenate([self.slots(use, unit) for unit in units])
        self.span.map(slots, self.imported.handles(self.generation, pages))
        self.span.zero(slots)
        for at, unit in enumerate(units):
            self.held[use][unit] = pages[at * size : (at + 1) * size]
            assert self.bytes_of(use, unit) == bytes(PAGE * size), "a page must come zeroed"
            for slot in self.slots(use, unit):
                ctypes.memset(self.span.address(int(slot)), self.stamp(use), PAGE)

    def give_up(self, use: Use, count: int) -> list[list[int]]:
        """Unmaps so many units. Returns their pages, as a message has them."""
        units = sorted(self.held[use])[len(self.held[use]) - count :]
        if units:
            self.span.unmap(np.concatenate([self.slots(use, unit) for unit in units]))
        return [[page for unit in units for page in self.held[use].pop(unit)]]

    def spare(self, recall: Recall) -> int:
        """Units that it can give up for a recall."""
        if recall.use == "weights":
            return len(self.held["weights"]) if recall.preempt else self.spare_segments
        least = 1 if self.asleep else self.floor
        return len(self.held["kv"]) - (least if recall.preempt else max(least, self.busy))

    def act(self, message: FromBroker, core: BrokerCore, pool: PagePool) -> None:
        match message:
            case Refused():
                if message.retry_s or self.held["kv"]:
                    self.outbox.append(self.hello())
            case Welcome():
                self.generation, self.welcome = message.generation, True
                for use in USES:
                    [pages] = message.held.of(use) or [[]]
                    if message.lease:
                        self.map(use, pages, core, pool)
                    for at, unit in enumerate(sorted(self.held[use])):
                        self.held[use][unit] = pages[at * self.size(use) : (at + 1) * self.size(use)]
                if message.lease:
                    self.outbox.append(Grown(lease=message.lease))
            case Grant():
                if message.use == "weights":
                    assert not self.asleep or message.units == self.layers, (
                        "an engine that sleeps gets all layers or none"
                    )
                self.map(message.use, message.pages[0], core, pool)
                self.outbox.append(Grown(lease=message.lease))
            case Recall():
                count = max(0, min(message.units, self.spare(message)))
                pages, short = self.give_up(message.use, count), message.units - count
                self.outbox.append(Returned(lease=message.lease, use=message.use, pages=pages, short=short))
                if message.use == "weights" and self.asleep and self.requests:
                    self.outbox.append(NeedWeights())


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.backend = CpuBackend(page_bytes=PAGE, device=DEVICE)
        self.now = 0.0
        self.numbers = 1000
        self.generation = 0
        self.engines: dict[str, Engine] = {}
        self.pools: list[PagePool] = []
        self.start_broker(recovering=0.0)

    def start_broker(self, recovering: float) -> None:
        self.generation += 1
        self.pool = PagePool(self.backend, TOTAL)
        self.pools.append(self.pool)
        self.core = BrokerCore(
            config=CONFIG, generation=self.generation, started_at=self.now, recovering_until=self.now + recovering
        )

    @initialize()
    def three_engines(self) -> None:
        """The weights of the first two do not fit at once: they take turns."""
        self.a_newcomer("a", 2, 2, 6, 5)
        self.a_newcomer("b", 3, 2, 4, 8)
        self.a_newcomer("c", 1, 3, 0, 0)
        self.round()

    def number(self) -> int:
        self.numbers += 1
        return self.numbers

    # ------------------------------------------------------------------ what may happen

    @rule(
        name=st.sampled_from("abcd"),
        pages_per_unit=st.integers(1, 3),
        floor=st.integers(1, 3),
        layers=st.sampled_from([0, 2, 5]),
        layer_pages=st.integers(1, 7),
    )
    def a_newcomer(self, name: str, pages_per_unit: int, floor: int, layers: int, layer_pages: int) -> None:
        if name not in self.engines:
            size = layer_pages if layers else 0
            self.engines[name] = Engine(name, self.number(), self.number(), pages_per_unit, floor, layers, size)

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), requests=st.integers(0, 20), gain=st.floats(0, 1))
    def requests_come_or_end(self, data: st.DataObject, requests: int, gain: float) -> None:
        engine = self.pick(data)
        if not engine.welcome:
            return
        if engine.requests and not requests:
            engine.idle_since = self.now
        engine.requests, engine.gain = requests, gain
        if requests and engine.asleep:
            engine.outbox.append(NeedWeights())
        engine.outbox.append(engine.demand(self.now))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), order=st.sampled_from([Sleep, Wake, Stream, Resize]), number=st.integers(0, 12))
    def an_operator_speaks(self, data: st.DataObject, order: type, number: int) -> None:
        values = {Stream: {"segments": number}, Resize: {"units": number}}.get(order, {})
        self.core.handle(OPERATOR, 1, order(engine=self.pick(data).name, **values), self.now)
        self.deliver()

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def an_engine_gives_up_weights_unasked(self, data: st.DataObject) -> None:
        engine = self.pick(data)
        if engine.held["weights"] and engine.welcome and not engine.requests:
            pages = engine.give_up("weights", len(engine.held["weights"]))
            engine.outbox += [Returned(lease=0, use="weights", pages=pages), engine.demand(self.now)]

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), count=st.integers(1, 4))
    def messages_arrive(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            self.one_arrives(self.pick(data))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), count=st.integers(1, 4))
    def an_engine_acts(self, data: st.DataObject, count: int) -> None:
        self.act(self.pick(data), count)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.core.plan(self.now)
        self.deliver()

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def an_engine_is_killed(self, data: st.DataObject) -> None:
        engine = self.engines.pop(self.pick(data).name)
        engine.close()
        self.core.disconnected(engine.connection)
        self.core.process_ended(engine.pid, self.now)
        self.deliver()

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def a_connection_breaks(self, data: st.DataObject) -> None:
        engine = self.pick(data)
        self.core.disconnected(engine.connection)
        self.reconnect(engine)

    @rule()
    def the_broker_is_killed(self) -> None:
        self.start_broker(recovering=0.2)
        for engine in self.engines.values():
            self.reconnect(engine)

    @precondition(lambda self: any(e.layers and e.held["kv"] for e in self.engines.values()))
    @rule(data=st.data(), others_end=st.booleans())
    def an_engine_that_needs_weights_gets_them(self, data: st.DataObject, others_end: bool) -> None:
        """Whether the requests of the others end, or never do."""
        names = sorted(e.name for e in self.engines.values() if e.layers and e.held["kv"])
        waker = self.engines[data.draw(st.sampled_from(names))]
        if any(engine.requests for engine in self.engines.values() if not engine.layers):
            others_end = True  # weights that cannot move and requests that do not end: then there may be no room
        for engine in self.engines.values():
            self.core.handle(OPERATOR, 1, Resize(engine=engine.name, units=0), self.now)
            if engine.requests and others_end:
                engine.requests, engine.idle_since = 0, self.now
        waker.requests = 1
        for _ in range(ROUNDS):
            booked = self.core.engines.get(waker.name)
            pinned = booked.weights.pinned if booked else None
            held = len(waker.held["weights"])
            if waker.welcome and (held == waker.layers or (held and pinned)):
                break  # all of them, or it runs and streams because an operator wants it to
            self.now += 0.11
            if waker.welcome:
                waker.outbox.append(NeedWeights())
            self.round()
        else:
            raise AssertionError(f"{waker.name} does not get its weights: {self.core.status(self.now)}")

    # ------------------------------------------------------------------ inside

    def pick(self, data: st.DataObject) -> Engine:
        return self.engines[data.draw(st.sampled_from(sorted(self.engines)))]

    def round(self) -> None:
        """Everything that was sent arrives, and every engine answers and reports."""
        for engine in self.engines.values():
            if engine.welcome:
                engine.outbox.append(engine.demand(self.now))
            while engine.outbox:
                self.one_arrives(engine)
            self.act(engine, len(engine.inbox))
        self.core.plan(self.now)
        self.deliver()

    def act(self, engine: Engine, count: int) -> None:
        for _ in range(min(count, len(engine.inbox))):
            engine.act(engine.inbox.popleft(), self.core, self.pool)

    def one_arrives(self, engine: Engine) -> None:
        if engine.outbox:
            self.core.handle(engine.connection, engine.pid, engine.outbox.popleft(), self.now)
            self.deliver()

    def reconnect(self, engine: Engine) -> None:
        """What was said on the old connection is void on both sides."""
        engine.connection, engine.welcome = self.number(), False
        engine.inbox.clear()
        engine.outbox.clear()
        engine.outbox.append(engine.hello())

    def deliver(self) -> None:
        by_connection = {e.connection: e for e in self.engines.values()}
        outbox, self.core.outbox = self.core.outbox, []
        for connection, message in outbox:
            if connection in by_connection:
                by_connection[connection].inbox.append(message)

    # ------------------------------------------------------------------ the laws

    @invariant()
    def conservation(self) -> None:
        self.core.check_integrity()

    @invariant()
    def one_owner_and_one_use_a_page(self) -> None:
        seen: set[int] = set()
        for engine in self.engines.values():
            booked = self.core.engines.get(engine.name)
            if booked is None or booked.connection != engine.connection or not engine.welcome:
                continue
            for use in USES:
                mine = [page for pages in engine.held[use].values() for page in pages]
                assert set(mine) <= set(self.core.ledger.pages_of(DEVICE, Owner(engine.name, use)).tolist())
                assert len(set(mine)) == len(mine)
                assert not seen & set(mine), "a page has two owners or two uses"
                seen |= set(mine)

    @invariant()
    def bytes_are_their_owners(self) -> None:
        for engine in self.engines.values():
            for use in USES:
                for unit in engine.held[use]:
                    stamps = bytes([engine.stamp(use)]) * (PAGE * engine.size(use))
                    assert engine.bytes_of(use, unit) == stamps, "somebody else wrote into a mapped page"

    @invariant()
    def nobody_is_below_its_floor(self) -> None:
        for engine in self.engines.values():
            if engine.held["kv"]:
                assert len(engine.held["kv"]) >= (1 if engine.layers else engine.floor)

    @invariant()
    def status_can_always_be_told(self) -> None:
        for engine in self.core.status(self.now).engines:
            assert engine.asleep == (engine.layers > 0 and engine.segments == 0)

    def teardown(self) -> None:
        for engine in self.engines.values():
            engine.close()
        for pool in self.pools:
            pool.close()
        self.backend.close()


TestLives = Lives.TestCase
TestLives.settings = examples(80, steps=60)
