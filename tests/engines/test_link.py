"""The engine core's line to the broker: who comes back says Hello first."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from polder.broker.transport import Channel, to_broker
from polder.broker.wire import Hello, Message, Returned
from polder.engines.vllm.core.link import BrokerLink, Down, Up

HELLO = Hello(
    engine="a",
    model="m",
    devices=["cpu:0"],
    page_bytes=0,
    pages_per_unit=1,
    unit_tokens=1,
    floor_units=1,
    ceiling_units=1,
    share_units=1,
)
LATE = Returned(lease=7, use="kv", pages=[[1]])
LIMIT_S = 60.0


class Line:
    """Both ends: the test accepts connections in the broker's place."""

    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._stack = stack
        self._listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(str(path))
        self._listener.listen()
        self._listener.settimeout(LIMIT_S)
        self.woken = threading.Condition()
        channel = Channel(path, timeout_s=LIMIT_S)
        self.far = self.accepted()
        self.link = BrokerLink(path, channel, self._wake)
        stack.callback(self.link.close)

    def accepted(self) -> socket.socket:
        connection = self._stack.enter_context(self._listener.accept()[0])
        connection.settimeout(LIMIT_S)
        return connection

    def _wake(self) -> None:
        with self.woken:
            self.woken.notify_all()

    def up(self) -> Up:
        """The core has nothing else to do until the new connection stands."""
        with self.woken:
            assert self.woken.wait_for(lambda: any(isinstance(m, Up) for m in self.link.inbox), LIMIT_S)
        return next(message for message in self.link.inbox if isinstance(message, Up))


@pytest.fixture
def line(short_dir: Path) -> Iterator[Line]:
    with ExitStack() as stack:
        yield Line(short_dir / "b", stack)


def received(connection: socket.socket, count: int) -> list[Message]:
    deframer = to_broker()
    found: list[Message] = []
    while len(found) < count:
        data = connection.recv(65536)
        assert data, "the connection was closed"
        found += deframer.feed(data)
    return found


def test_what_the_core_says_before_it_knows_of_a_new_connection_does_not_reach_it(line: Line) -> None:
    """A broker closes the connection of one that says anything before Hello, and the engine is without it for longer."""
    line.far.close()
    far = line.accepted()
    up = line.up()
    line.link.send(LATE)  # of a step that began on the old connection
    line.link.greet(up, HELLO)
    line.link.send(LATE)
    assert received(far, 2) == [HELLO, LATE]


def test_a_connection_that_has_ended_is_not_greeted(line: Line) -> None:
    line.far.close()
    second = line.accepted()
    up = line.up()
    second.close()
    far = line.accepted()
    with line.woken:
        assert line.woken.wait_for(lambda: line.up() is not up, LIMIT_S)
    line.link.greet(up, HELLO)
    line.link.greet(line.up(), HELLO)
    line.link.send(LATE)
    assert received(far, 2) == [HELLO, LATE]
    assert any(isinstance(message, Down) for message in line.link.inbox)
