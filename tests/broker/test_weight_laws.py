"""The laws with weights in play: random lives of a broker and of engines whose layers move.

As test_laws.py, with the pages of segments beside those of KV units. The engines hold page numbers, no memory: what is mapped and
zeroed is that file's matter. After each step: free + owned = total (law 1), nobody holds a page that is not booked to it, nobody
holds one that another holds or that it uses twice (law 4), an engine that runs has its floor (law 6), one that sleeps has a unit.
And from any state, if all others become idle and answer, an engine that wakes has its weights within a bounded number of rounds.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from polder.broker.config import BrokerConfig
from polder.broker.core import BrokerCore
from polder.broker.policy import PolicyConfig
from polder.broker.wire import (
    Demand,
    FromBroker,
    GiveSegments,
    Grant,
    Grown,
    Hello,
    Recall,
    Refused,
    Returned,
    Rouse,
    SegmentsReturned,
    Sleep,
    Status,
    Stream,
    TakeSegments,
    ToBroker,
    Wake,
    Welcome,
)
from polder.planner.sharing import SharingConfig

PAGE = 4096
TOTAL = 60
DEVICE = "cpu:0"
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
    """An engine in small. `layers` 0: its weights do not move."""

    name: str
    pid: int
    connection: int
    pages_per_unit: int
    floor: int
    layers: int
    layer_pages: int
    inbox: deque[FromBroker] = field(default_factory=deque)
    outbox: deque[ToBroker] = field(default_factory=deque)
    units: list[list[int]] = field(default_factory=list)
    segments: list[list[int]] = field(default_factory=list)
    welcome: bool = False
    requests: int = 0
    idle_since: float = 0.0

    @property
    def asleep(self) -> bool:
        return self.layers > 0 and not self.segments

    @property
    def least(self) -> int:
        return 1 if self.asleep else self.floor

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
            held={number: [pages] for number, pages in enumerate(self.units)},
            layers=self.layers,
            layer_pages=self.layer_pages,
            held_segments=[[pages] for pages in self.segments],
        )

    def demand(self, now: float) -> Demand:
        busy = min(self.requests, len(self.units)) if not self.asleep else 0
        return Demand(
            held_units=len(self.units),
            busy_units=busy,
            waiting_units=self.requests - busy,
            peak_units=self.requests,
            cached_units=len(self.units),
            curve=[],
            urgent=self.requests > busy,
            asleep=self.asleep,
            spare_segments=self.spare,
            idle_s=0.0 if self.requests else max(1e-3, now - self.idle_since),
            next_use_s=math.inf,
        )

    @property
    def spare(self) -> int:
        return len(self.segments) if not self.requests else max(0, len(self.segments) - self.layers // 2)

    def act(self, message: FromBroker) -> None:
        match message:
            case Refused():
                if message.retry_s or self.units:
                    self.outbox.append(self.hello())
            case Welcome():
                self.welcome = True
                self.units = cut(message.pages[0], self.pages_per_unit)
                self.segments = [pages for [pages] in message.segments]
                if message.lease:
                    self.outbox.append(Grown(lease=message.lease))
            case Grant():
                self.units += cut(message.pages[0], self.pages_per_unit)
                self.outbox.append(Grown(lease=message.lease))
            case GiveSegments():
                assert self.segments or len(message.segments) == self.layers, "one that sleeps gets all layers or none"
                self.segments += [pages for [pages] in message.segments]
                assert len(self.segments) <= self.layers
                self.outbox.append(Grown(lease=message.lease))
            case Recall():
                busy = 0 if message.preempt or self.asleep else self.requests
                count = max(0, min(message.units, len(self.units) - max(self.least, busy)))
                pages = [page for _ in range(count) for page in self.units.pop()]
                self.outbox.append(Returned(lease=message.lease, pages=[pages], short=message.units - count))
            case TakeSegments():
                count = min(message.segments, len(self.segments) if message.preempt else self.spare)
                back = [[self.segments.pop()] for _ in range(count)]
                short = message.segments - count
                self.outbox.append(SegmentsReturned(lease=message.lease, segments=back, short=short))
                if self.asleep and self.requests:
                    self.outbox.append(Wake())


def cut(pages: list[int], size: int) -> list[list[int]]:
    return [pages[at : at + size] for at in range(0, len(pages), size)]


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.numbers = 1000
        self.generation = 0
        self.engines: dict[str, Engine] = {}
        self.start_broker(recovering=0.0)

    def start_broker(self, recovering: float) -> None:
        self.generation += 1
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
            engine = Engine(
                name, self.number(), self.number(), pages_per_unit, floor, layers, layer_pages if layers else 0
            )
            engine.outbox.append(engine.hello())
            self.engines[name] = engine

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), requests=st.integers(0, 12))
    def requests_come_or_end(self, data: st.DataObject, requests: int) -> None:
        engine = self.pick(data)
        if not engine.welcome:
            return
        if engine.requests and not requests:
            engine.idle_since = self.now
        engine.requests = requests
        if requests and engine.asleep:
            engine.outbox.append(Wake())
        engine.outbox.append(engine.demand(self.now))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), word=st.sampled_from(["sleep", "rouse", "stream"]), segments=st.integers(0, 6))
    def an_operator_speaks(self, data: st.DataObject, word: str, segments: int) -> None:
        name = self.pick(data).name
        messages = {"sleep": Sleep(engine=name), "rouse": Rouse(engine=name)}
        message = messages.get(word) or Stream(engine=name, segments=segments)
        self.core.handle(999_999, 1, message, self.now)
        self.deliver()

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def an_engine_gives_up_weights_unasked(self, data: st.DataObject) -> None:
        engine = self.pick(data)
        if engine.segments and engine.welcome and not engine.requests:
            back = [[pages] for pages in engine.segments]
            engine.segments = []
            engine.outbox += [SegmentsReturned(lease=0, segments=back), engine.demand(self.now)]

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), count=st.integers(1, 4))
    def messages_arrive(self, data: st.DataObject, count: int) -> None:
        for _ in range(count):
            self.one_arrives(self.pick(data))

    @precondition(lambda self: self.engines)
    @rule(data=st.data(), count=st.integers(1, 4))
    def an_engine_acts(self, data: st.DataObject, count: int) -> None:
        engine = self.pick(data)
        for _ in range(min(count, len(engine.inbox))):
            engine.act(engine.inbox.popleft())

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.core.plan(self.now)
        self.deliver()

    @precondition(lambda self: self.engines)
    @rule(data=st.data())
    def an_engine_is_killed(self, data: st.DataObject) -> None:
        engine = self.engines.pop(self.pick(data).name)
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

    @precondition(lambda self: any(e.layers and e.units for e in self.engines.values()))
    @rule(data=st.data(), others_end=st.booleans())
    def a_waker_is_served_if_the_others_obey(self, data: st.DataObject, others_end: bool) -> None:
        """Whether their requests end, or never do."""
        names = sorted(e.name for e in self.engines.values() if e.layers and e.units)
        waker = self.engines[data.draw(st.sampled_from(names))]
        if any(engine.requests for engine in self.engines.values() if not engine.layers):
            others_end = True  # weights that cannot move and requests that do not end: then there may be no room
        for engine in self.engines.values():
            if engine.requests and others_end:
                engine.requests, engine.idle_since = 0, self.now
        waker.requests = 1
        for _ in range(ROUNDS):
            booked = self.core.engines.get(waker.name)
            pinned = booked.weights.pinned if booked else None
            if waker.welcome and len(waker.segments) == waker.layers:
                break
            if waker.welcome and waker.segments and pinned:
                break  # it runs, and streams because an operator wants it to
            self.now += 0.11
            if waker.welcome and len(waker.segments) < waker.layers:
                waker.outbox.append(Wake())
            self.round()
        else:
            raise AssertionError(f"{waker.name} does not get its weights: {self.core.status(self.now)}")

    # ------------------------------------------------------------------ the engines' side

    def pick(self, data: st.DataObject) -> Engine:
        return self.engines[data.draw(st.sampled_from(sorted(self.engines)))]

    def round(self) -> None:
        """Everything that was sent arrives, everybody answers, and says how it stands."""
        for engine in self.engines.values():
            if engine.welcome:
                engine.outbox.append(engine.demand(self.now))
            while engine.outbox:
                self.one_arrives(engine)
            while engine.inbox:
                engine.act(engine.inbox.popleft())
        self.core.plan(self.now)
        self.deliver()

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
            for pages, owner in ((engine.units, booked.owner), (engine.segments, booked.weights_owner)):
                mine = [page for part in pages for page in part]
                assert len(set(mine)) == len(mine)
                assert set(mine) <= set(self.core.ledger.pages_of(DEVICE, owner).tolist())
                assert not seen & set(mine), "a page has two owners or two uses"
                seen |= set(mine)

    @invariant()
    def weights_are_whole_segments(self) -> None:
        for engine in self.core.engines.values():
            held = self.core.ledger.held(DEVICE, engine.weights_owner)
            assert held <= engine.hello.layers * engine.hello.layer_pages
            assert not held or held % engine.hello.layer_pages == 0

    @invariant()
    def nobody_is_below_what_it_needs(self) -> None:
        for engine in self.engines.values():
            if engine.units:
                assert len(engine.units) >= (1 if engine.layers else engine.floor)

    @invariant()
    def status_can_always_be_told(self) -> None:
        status = self.core.status(self.now)
        assert isinstance(status, Status)
        assert len(status.decisions) <= 64
        for engine in status.engines:
            assert engine.asleep == (engine.layers > 0 and engine.segments == 0)


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
