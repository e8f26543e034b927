"""Broker and engine cores together, messages in any order that two lines allow: what an operator says about weights comes true."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.conftest import examples

pytest.importorskip("vllm")
from vllm.v1.core.sched.interface import PauseState

from polder.broker.config import BrokerConfig
from polder.broker.core import BrokerCore
from polder.broker.weights import IN_FLIGHT_S
from polder.broker.wire import (
    Demand,
    FromBroker,
    Grant,
    Grown,
    Hello,
    Recall,
    Returned,
    Sleep,
    ToBroker,
    Wake,
    Welcome,
)
from polder.engines.vllm.plans import Taken, WeightsFound
from polder.engines.vllm.weights import calls
from polder.engines.vllm.weights.core import CoreWeights
from polder.planner.sharing import SharingConfig

PAGE = 4096
DEVICE = "cpu:0"
LAYERS, LAYER_PAGES, FLOOR = 4, 5, 2
TOTAL = LAYERS * LAYER_PAGES + 3 * FLOOR + 4
"""The weights of one engine, and the KV floors of two: they take turns."""
ROUNDS = 120


class Scheduler:
    def __init__(self) -> None:
        self.requests: dict[int, object] = {}
        self.pause_state = PauseState.UNPAUSED

    def set_pause_state(self, state: PauseState) -> None:
        self.pause_state = state

    def has_requests(self) -> bool:
        return bool(self.requests)


class Engine:
    """A real CoreWeights over one rank of two lines, and a KV cache that does as it is told."""

    def __init__(self, name: str, connection: int) -> None:
        self.name, self.connection = name, connection
        self.inbox: deque[FromBroker] = deque()
        self.outbox: deque[ToBroker] = deque()
        self.scheduler = Scheduler()
        self.held: list[tuple[int, ...]] = []
        self.pages: list[int] = []
        self.sent: Demand | None = None
        self.due, self.said_at = False, float("-inf")
        """An operator's last word was to sleep, and it was not seen asleep without a request since."""
        found = WeightsFound(layers=LAYERS, layer_pages=LAYER_PAGES, moved_bytes=1, resident_bytes=0, copy_share=0.0)
        self.weights = CoreWeights(self.scheduler, found, self.rpc, self.outbox.append, lambda: False)
        self.weights._idle_since = 0.0  # the machine's clock has nothing to say here
        self.outbox.append(
            Hello(
                engine=name,
                model="m",
                devices=[DEVICE],
                page_bytes=PAGE,
                pages_per_unit=1,
                unit_tokens=16,
                floor_units=FLOOR,
                ceiling_units=TOTAL,
                share_units=FLOOR,
                layers=LAYERS,
                layer_pages=LAYER_PAGES,
            )
        )

    def rpc(self, function: Any, *args: Any) -> list[Any]:
        if function in (calls.adopt, calls.give):
            self.held += [tuple(ranks[0]) for ranks in args[1]]
            return [""]
        if function is calls.take:
            taken, self.held = self.held[: args[0]], self.held[args[0] :]
            return [Taken(segments=tuple(taken))]
        figures = ("weights_loads_total", "weights_copy_seconds_total", "weights_pass_stall_seconds")
        return [dict.fromkeys(figures, 0.0)]

    def act(self, message: FromBroker, now: float) -> None:
        match message:
            case Welcome():
                self.pages = list(message.held.kv[0])
                self.weights.start(message.generation, message.held.weights)
                self.outbox.append(Grown(lease=message.lease))
            case Grant(use="weights"):
                self.weights.on_grant(message, 1, now)
            case Recall(use="weights"):
                self.weights.on_recall(message, 1, now)
            case Grant():
                self.pages += message.pages[0]
                self.outbox.append(Grown(lease=message.lease))
            case Recall():
                least = 1 if self.weights.asleep else FLOOR
                count = max(0, min(message.units, len(self.pages) - least))
                pages = [self.pages.pop() for _ in range(count)]
                short = message.units - count
                self.outbox.append(Returned(lease=message.lease, use="kv", pages=[pages], short=short))

    def report(self, now: float) -> None:
        self.weights.on_tick(now)
        busy = len(self.scheduler.requests)
        self.sent = Demand(
            held_units=len(self.pages),
            busy_units=min(busy, len(self.pages)),
            waiting_units=0,
            peak_units=busy,
            cached_units=0,
            curve=[],
            urgent=False,
            **self.weights.demand(now),
        )
        self.outbox.append(self.sent)

    def end(self, count: int) -> None:
        """Of its oldest requests: they were answered, or aborted."""
        for request in list(self.scheduler.requests)[:count]:
            del self.scheduler.requests[request]


class Lives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        config = BrokerConfig(
            socket=Path("unused"),
            devices={DEVICE: TOTAL * PAGE},
            page_bytes=PAGE,
            sharing=SharingConfig(min_hold_s=0.5, min_idle_s=0.2, turn_s=0.6),
        )
        self.core = BrokerCore(config=config, generation=1, started_at=0.0, recovering_until=0.0)
        self.engines = {name: Engine(name, 10 + at) for at, name in enumerate("ab")}
        self.requests = 0

    @initialize()
    def all_are_welcome(self) -> None:
        for _ in range(3):
            self.round(report=False)

    names = st.sampled_from("ab")

    # ------------------------------------------------------------------ what may happen

    @rule(name=names, gone=st.booleans())
    def a_request_comes(self, name: str, gone: bool) -> None:
        """And is aborted at once, perhaps."""
        engine = self.engines[name]
        self.requests += 1
        engine.scheduler.requests[self.requests] = object()
        engine.weights.on_request(self.now)
        engine.report(self.now)
        if gone:
            engine.end(TOTAL)

    @rule(name=names, count=st.integers(1, 3))
    def requests_end(self, name: str, count: int) -> None:
        self.engines[name].end(count)

    @rule(name=names, seconds=st.sampled_from([0.001, 0.1]))
    def a_step_ends(self, name: str, seconds: float) -> None:
        engine = self.engines[name]
        if engine.scheduler.requests and not engine.weights.asleep:
            self.now += seconds
            engine.weights.on_step([(1, seconds)], self.now)
            engine.report(self.now)

    @rule(name=names)
    def an_operator_says_sleep(self, name: str) -> None:
        self.core.handle(999, 1, Sleep(engine=name), self.now)
        self.deliver()
        self.engines[name].due, self.engines[name].said_at = True, self.now

    @rule(name=names)
    def an_operator_says_wake(self, name: str) -> None:
        self.core.handle(999, 1, Wake(engine=name), self.now)
        self.deliver()
        self.engines[name].due = False

    @rule(name=names, count=st.integers(1, 3))
    def messages_arrive(self, name: str, count: int) -> None:
        for _ in range(count):
            self.one_arrives(self.engines[name])

    @rule(name=names, count=st.integers(1, 3))
    def an_engine_looks_into_its_inbox(self, name: str, count: int) -> None:
        engine = self.engines[name]
        for _ in range(min(count, len(engine.inbox))):
            engine.act(engine.inbox.popleft(), self.now)

    @rule(seconds=st.sampled_from([0.01, 0.3, 1.1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.core.plan(self.now)
        self.deliver()
        for engine in self.engines.values():
            engine.report(self.now)

    @rule(name=names)
    def a_sleep_that_is_due_comes_when_requests_have_ended(self, name: str) -> None:
        engine = self.engines[name]
        if not engine.due:
            return
        for each in self.engines.values():
            each.end(TOTAL)
        for _ in range(ROUNDS):
            self.round()
            if engine.weights.asleep and engine.name not in self.waking():
                break
        assert engine.weights.asleep, f"{name} was put to sleep and is awake: {self.core.status(self.now)}"
        assert engine.name not in self.waking(), "it has no requests"

    @rule(name=names)
    def who_has_requests_gets_weights_whatever_was_said(self, name: str) -> None:
        engine = self.engines[name]
        if not engine.scheduler.requests:
            return
        for _ in range(ROUNDS):
            if not engine.weights.asleep:
                return
            self.round()
        raise AssertionError(f"{name} waits for its weights for ever: {self.core.status(self.now)}")

    # ------------------------------------------------------------------ inside

    def waking(self) -> list[str]:
        return [name for name, engine in self.core.engines.items() if engine.weights.waking_since is not None]

    def round(self, *, report: bool = True) -> None:
        """Time passes, everything that was sent arrives, and everybody answers."""
        self.now += 0.11
        for engine in self.engines.values():
            if report:
                engine.report(self.now)
            while engine.outbox:
                self.one_arrives(engine)
        self.core.plan(self.now)
        self.deliver()
        for engine in self.engines.values():
            while engine.inbox:
                engine.act(engine.inbox.popleft(), self.now)
            self.look(engine)

    def one_arrives(self, engine: Engine) -> None:
        if engine.outbox:
            message = engine.outbox.popleft()
            late = self.now - engine.said_at > IN_FLIGHT_S
            if late and isinstance(message, Demand) and message.asleep and message.idle_s > 0:
                engine.due = False  # for the broker it has slept since then; a request comes after that
            self.core.handle(engine.connection, engine.connection, message, self.now)
            self.deliver()

    def deliver(self) -> None:
        by_connection = {engine.connection: engine for engine in self.engines.values()}
        outbox, self.core.outbox = self.core.outbox, []
        for connection, message in outbox:
            if connection in by_connection:
                by_connection[connection].inbox.append(message)

    def look(self, engine: Engine) -> None:
        if engine.weights.asleep and not engine.scheduler.requests:
            engine.due = False

    @invariant()
    def seen(self) -> None:
        for engine in self.engines.values():
            self.look(engine)
        self.core.check_integrity()
        assert math.isfinite(self.now)


TestLives = Lives.TestCase
TestLives.settings = examples(50, steps=40)
