"""The laws of docs/structures.md, after every step of random lives of a broker and its engines.

The broker is the real core, the engines hold real pages: a span over the CPU backend, mapped through handles of the broker's pool,
stamped with their owner's name. Messages wait in queues and are delivered in random order between engines, processes are
killed, connections break, the broker is killed and started again. After each step: free + owned = total (law 1), every
mapped page is booked to the engine that maps it and to nobody else (law 4), its bytes are what its owner wrote (zero when
it came, law 2 and 10), and no engine is below its floor (law 6).
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from polder.broker.config import BrokerConfig
from polder.broker.core import BrokerCore
from polder.broker.policy import PolicyConfig
from polder.broker.wire import (
    Demand,
    Fetch,
    FromBroker,
    Grant,
    Grown,
    Hello,
    Recall,
    Refused,
    Resize,
    Returned,
    Status,
    StatusRequest,
    ToBroker,
    Welcome,
)
from polder.memory.cpu import CpuBackend
from polder.memory.pool import ImportedPages, PagePool
from polder.memory.span import Span

PAGE = 4096
TOTAL = 40
DEVICE = "cpu:0"
CONFIG = BrokerConfig(
    socket=Path("unused"),
    devices={DEVICE: TOTAL * PAGE},
    page_bytes=PAGE,
    policy=PolicyConfig(min_hold_s=0.5, reserve_low_ratio=0.05, reserve_high_ratio=0.1),
)


@dataclass
class Engine:
    """An engine in small: the worker's span and the core's answers, without vLLM."""

    name: str
    number: int
    pages_per_unit: int
    floor: int
    pid: int
    backend: CpuBackend
    imported: ImportedPages
    span: Span
    connection: int = 0
    inbox: deque[FromBroker] = field(default_factory=deque)
    outbox: deque[ToBroker] = field(default_factory=deque)
    pages: dict[int, list[int]] = field(default_factory=dict)
    generation_of: dict[int, int] = field(default_factory=dict)
    generation: int = -1
    busy: int = 0

    @property
    def stamp(self) -> int:
        return 100 + self.number

    def hello(self) -> Hello:
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
            held={unit: [pages] for unit, pages in self.pages.items()},
        )

    def slots(self, unit: int) -> np.ndarray:
        return np.arange(unit * self.pages_per_unit, (unit + 1) * self.pages_per_unit, dtype=np.int64)

    def bytes_of(self, unit: int) -> bytes:
        return b"".join(ctypes.string_at(self.span.address(int(s)), PAGE) for s in self.slots(unit))

    def write(self, unit: int) -> None:
        for slot in self.slots(unit):
            ctypes.memset(self.span.address(int(slot)), self.stamp, PAGE)


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.backend = CpuBackend(page_bytes=PAGE, device=DEVICE)
        self.now = 0.0
        self.generation = 0
        self.connections = 0
        self.pids = 1000
        self.engines: dict[str, Engine] = {}
        self.start_broker(recovering=0.0)

    def start_broker(self, recovering: float) -> None:
        self.generation += 1
        self.pool = PagePool(self.backend, TOTAL)
        self.core = BrokerCore(
            config=CONFIG,
            generation=self.generation,
            started_at=self.now,
            recovering_until=self.now + recovering,
        )

    @initialize()
    def two_engines(self) -> None:
        self.start_engine("a", 3, 2)
        self.start_engine("b", 2, 1)

    # ------------------------------------------------------------------ what may happen

    def start_engine(self, name: str, pages_per_unit: int, floor: int) -> None:
        self.pids += 1
        self.connections += 1
        backend = CpuBackend(page_bytes=PAGE, device=DEVICE)
        engine = Engine(
            name=name,
            number=len(self.engines) if name not in self.engines else self.engines[name].number,
            pages_per_unit=pages_per_unit,
            floor=floor,
            pid=self.pids,
            backend=backend,
            imported=ImportedPages(backend),
            span=Span(backend, TOTAL),
            connection=self.connections,
        )
        engine.outbox.append(engine.hello())
        self.engines[name] = engine

    @rule(name=st.sampled_from("abc"), pages_per_unit=st.integers(1, 3), floor=st.integers(1, 3))
    def a_newcomer(self, name: str, pages_per_unit: int, floor: int) -> None:
        if name not in self.engines:
            self.start_engine(name, pages_per_unit, floor)

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), busy=st.integers(0, 30), waiting=st.integers(0, 30), gain=st.floats(0, 1))
    def demand(self, data: st.DataObject, busy: int, waiting: int, gain: float) -> None:
        engine = self.pick(data)
        if engine.generation < 0:
            return
        engine.busy = min(busy, len(engine.pages))
        engine.outbox.append(
            Demand(
                held_units=len(engine.pages),
                busy_units=engine.busy,
                waiting_units=waiting,
                peak_units=engine.busy,
                cached_units=len(engine.pages),
                curve=[gain * i for i in range(TOTAL // engine.pages_per_unit + 1)],
                urgent=waiting > 0,
            )
        )

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), units=st.integers(0, 12))
    def pin(self, data: st.DataObject, units: int) -> None:
        self.core.handle(999_999, 1, Resize(engine=self.pick(data).name, units=units), self.now)
        self.deliver()

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), count=st.integers(1, 4))
    def messages_arrive(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            engine = self.pick(data)
            if engine.outbox:
                self.core.handle(engine.connection, engine.pid, engine.outbox.popleft(), self.now)
                self.deliver()

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), count=st.integers(1, 4))
    def an_engine_acts(self, data: st.DataObject, count: int) -> None:
        engine = self.pick(data)
        for _ in range(min(count, len(engine.inbox))):
            self.act(engine, engine.inbox.popleft())

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.core.plan(self.now)
        self.deliver()

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def an_engine_is_killed(self, data: st.DataObject) -> None:
        engine = self.pick(data)
        engine.span.close()
        del self.engines[engine.name]
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

    # ------------------------------------------------------------------ the engines' side

    def pick(self, data: st.DataObject) -> Engine:
        return self.engines[data.draw(st.sampled_from(sorted(self.engines)))]

    def reconnect(self, engine: Engine) -> None:
        """What was said on the old connection is void on both sides."""
        self.connections += 1
        engine.connection = self.connections
        engine.inbox.clear()
        engine.outbox.clear()
        engine.outbox.append(engine.hello())

    def deliver(self) -> None:
        by_connection = {e.connection: e for e in self.engines.values()}
        outbox, self.core.outbox = self.core.outbox, []
        for connection, message in outbox:
            if connection in by_connection:
                by_connection[connection].inbox.append(message)

    def act(self, engine: Engine, message: FromBroker) -> None:
        match message:
            case Refused():
                if message.retry_s or engine.pages:
                    engine.outbox.append(engine.hello())
            case Welcome():
                engine.generation = message.generation
                if message.lease:
                    self.map(engine, message.pages[0], message.lease)
                else:
                    size = engine.pages_per_unit
                    for at, unit in enumerate(sorted(engine.pages)):
                        engine.pages[unit] = message.pages[0][at * size : (at + 1) * size]
            case Grant():
                self.map(engine, message.pages[0], message.lease)
            case Recall():
                least = engine.floor if message.preempt else max(engine.floor, engine.busy)
                count = max(0, min(message.units, len(engine.pages) - least))
                units = sorted(engine.pages)[len(engine.pages) - count :]
                engine.span.unmap(np.concatenate([engine.slots(u) for u in units]) if units else np.empty(0, np.int64))
                pages = []
                for unit in units:
                    del engine.generation_of[unit]
                    pages += engine.pages.pop(unit)
                engine.busy = min(engine.busy, len(engine.pages))
                engine.outbox.append(Returned(lease=message.lease, pages=[pages], short=message.units - count))

    def map(self, engine: Engine, pages: list[int], lease: int) -> None:
        count = len(pages) // engine.pages_per_unit
        units = [u for u in range(TOTAL // engine.pages_per_unit) if u not in engine.pages][:count]
        slots = np.concatenate([engine.slots(u) for u in units])
        missing = engine.imported.missing(engine.generation, pages)
        if missing:
            request = Fetch(engine=engine.name, rank=0, device=DEVICE, pages=list(missing))
            self.core.handle(0, engine.pid, request, self.now)
            fds, index, offsets = self.pool.export(missing)
            engine.imported.adopt(engine.generation, missing, fds, index, offsets)
            for fd in fds:
                os.close(fd)
        engine.span.map(slots, engine.imported.handles(engine.generation, pages))
        engine.span.zero(slots)
        for at, unit in enumerate(units):
            engine.pages[unit] = pages[at * engine.pages_per_unit : (at + 1) * engine.pages_per_unit]
            engine.generation_of[unit] = engine.generation
            assert engine.bytes_of(unit).count(0) == PAGE * engine.pages_per_unit, "a page must come zeroed"
            engine.write(unit)
        engine.outbox.append(Grown(lease=lease))
        self.deliver()

    # ------------------------------------------------------------------ the laws

    @invariant()
    def conservation(self) -> None:
        self.core.check_integrity()

    @invariant()
    def one_owner_a_page(self) -> None:
        seen: set[tuple[int, int]] = set()
        for engine in self.engines.values():
            booked = self.core.engines.get(engine.name)
            mine = [(engine.generation_of[u], p) for u, pages in engine.pages.items() for p in pages]
            if all(engine.generation_of[u] == engine.generation for u in engine.pages):
                assert not seen & set(mine), "a page is mapped by two engines"
                seen |= set(mine)
            welcomed = engine.generation == self.generation and not any(isinstance(m, Welcome) for m in engine.inbox)
            if booked is not None and booked.connection == engine.connection and booked.pid == engine.pid and welcomed:
                held = set(self.core.ledger.pages_of(DEVICE, booked.owner).tolist())
                assert {p for _, p in mine} <= held, "an engine maps a page that is not booked to it"

    @invariant()
    def bytes_are_their_owners(self) -> None:
        for engine in self.engines.values():
            for unit in engine.pages:
                assert set(engine.bytes_of(unit)) == {engine.stamp}, "somebody else wrote into a mapped page"

    @invariant()
    def nobody_is_below_its_floor(self) -> None:
        for engine in self.engines.values():
            if engine.generation >= 0 and engine.pages:
                assert len(engine.pages) >= engine.floor

    @invariant()
    def status_can_always_be_told(self) -> None:
        self.core.handle(999_998, 1, StatusRequest(), self.now)
        outbox, self.core.outbox = self.core.outbox, []
        assert isinstance(outbox[-1][1], Status)
        self.core.outbox = outbox[:-1]
        self.deliver()

    def teardown(self) -> None:
        for engine in self.engines.values():
            engine.span.close()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
