"""A broker's core and engines with weights that move, message by message, and two engines that take turns."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

from polder.broker.config import BrokerConfig
from polder.broker.core import BrokerCore
from polder.broker.ledger import Owner
from polder.broker.policy import PolicyConfig
from polder.broker.wire import (
    Demand,
    FromBroker,
    Grant,
    Hello,
    Recall,
    Returned,
    Use,
    Welcome,
)
from polder.planner.sharing import SharingConfig
from tests.broker.test_server import PAGE
from tests.broker.test_server import hello as plain_hello

DEVICE = "cpu:0"
OPERATOR = 99
Lease = TypeVar("Lease", Grant, Recall)


def hello(name: str, **values: object) -> Hello:
    """Ten layers of four pages, and a KV floor of three units of two."""
    return plain_hello(name, **{"layers": 10, "layer_pages": 4, **values})


class Broker:
    """A core, and the last message of each kind that each engine got. `a` is connection 1, process 101, and so on."""

    def __init__(self, total: int = 64, **sharing: float) -> None:
        config = BrokerConfig(
            socket=Path("unused"),
            devices={DEVICE: total * PAGE, "cpu:1": total * PAGE},
            page_bytes=PAGE,
            policy=PolicyConfig(reserve_low_ratio=0.0, reserve_high_ratio=0.0),
            sharing=SharingConfig(**{"low_ratio": 0.0, "min_hold_s": 1.0, "min_idle_s": 0.5, **sharing}),
        )
        self.core = BrokerCore(config=config, generation=1, started_at=0.0)
        self.now = 0.0

    def say(self, name: str, message: object, now: float | None = None) -> list[FromBroker]:
        """What the engine is told in answer, news of the others apart."""
        self.now = self.now if now is None else now
        number = OPERATOR if name == "operator" else ord(name) - ord("a") + 1
        self.core.outbox.clear()
        self.core.handle(number, 100 + number, message, self.now)  # type: ignore[arg-type]
        self.core.check_integrity()
        return self.told(name)

    def told(self, name: str) -> list[FromBroker]:
        number = OPERATOR if name == "operator" else ord(name) - ord("a") + 1
        return [m for to, m in self.core.outbox if to == number and type(m).__name__ != "Neighbours"]

    def welcome(self, name: str, **values: object) -> Welcome:
        message = self.say(name, hello(name, **values))[0]
        assert isinstance(message, Welcome), message
        return message

    def demand(self, name: str, now: float | None = None, **values: object) -> list[FromBroker]:
        sizes = ("held_units", "busy_units", "waiting_units", "peak_units", "cached_units")
        defaults = {**dict.fromkeys(sizes, 0), "held_units": 3, "curve": [], "urgent": False}
        return self.say(name, Demand(**{**defaults, **values}), now)  # type: ignore[arg-type]

    def idle(self, name: str, now: float) -> list[FromBroker]:
        return self.demand(name, now, idle_s=10.0, spare_segments=10, next_use_s=math.inf)

    def pages(self, name: str, use: Use = "weights", device: str = DEVICE) -> list[int]:
        pages: list[int] = self.core.ledger.pages_of(device, Owner(name, use)).tolist()
        return pages

    def give_back(
        self, name: str, recall: Recall, units: int | None = None, now: float | None = None
    ) -> list[FromBroker]:
        """Returns what was recalled, or `units` of it."""
        units = recall.units if units is None else units
        pages = self.pages(name, recall.use)[: units * (2 if recall.use == "kv" else 4)]
        short = recall.units - units
        return self.say(name, Returned(lease=recall.lease, use=recall.use, pages=[pages], short=short), now)

    def state(self, name: str) -> tuple[int, bool]:
        status = next(e for e in self.core.status(self.now).engines if e.engine == name)
        return status.segments, status.asleep

    def actions(self) -> list[tuple[str, str, int]]:
        return [(d.engine, d.action, d.segments) for d in self.core.status(self.now).decisions]


def only(messages: list[FromBroker], kind: type[Lease], use: Use = "weights") -> Lease:
    found = [message for message in messages if isinstance(message, kind) and message.use == use]
    assert len(found) == 1, messages
    return found[0]


def two_in_turns() -> Broker:
    """`a` runs and is idle, `b` sleeps: both together do not fit."""
    broker = Broker()
    assert len(broker.welcome("a").held.weights[0]) == 40
    welcome = broker.welcome("b")
    assert welcome.held.weights == []
    assert [len(pages) for pages in welcome.held.kv] == [2], "one that starts asleep gets a unit"
    broker.demand("b", asleep=True, held_units=1)
    broker.idle("a", 10.0)
    return broker
