"""The engine core's connection to the broker: a thread listens, the core's own thread acts and answers.

Guarantees
- Nothing here blocks the engine. Sending never waits: a broker that does not read is treated as gone. The thread
  receives, and messages wait in `inbox` until the core handles them between two steps.
- Messages of one connection are handed over in order. When the connection breaks, those not yet handled are dropped;
  `Down` is handed over, then `Up` with the new connection. What was promised on the old connection is void, so the core
  reports what it holds. What the core sends before it has done so is dropped.
- When nothing comes for a second the core is woken all the same, so that an idle engine reports a new demand.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from polder.broker.transport import Channel
from polder.broker.wire import FromBroker, Message
from polder.errors import BrokerUnavailable, ProtocolError

__all__ = ["BrokerLink", "Down", "Tick", "Up"]

logger = logging.getLogger("polder.engine")

QUIET_S = 1.0
RECONNECT_S = 0.2


@dataclass(frozen=True)
class Up:
    """There is a new connection: say Hello, with `BrokerLink.greet`."""

    channel: Channel


@dataclass(frozen=True)
class Down:
    """The connection broke; serve on with what is held."""


@dataclass(frozen=True)
class Tick:
    """Nothing came for a second."""


class BrokerLink:
    def __init__(self, socket: Path, channel: Channel, wake: Callable[[], None]) -> None:
        """Takes over `channel`, on which Hello was answered. `wake`, called by any thread, makes the core look into
        `inbox`."""
        self._path = socket
        self._channel: Channel | None = channel
        self._greeted: Channel | None = channel
        """The same, once Hello was said on it: the core may be a step behind, and speak before it knows of a new
        connection."""
        self._wake = wake
        self._closing = threading.Event()
        self.inbox: deque[FromBroker | Up | Down | Tick] = deque()
        channel.set_timeout(QUIET_S)
        self._thread = threading.Thread(target=self._run, name="polder-broker-link", daemon=True)
        self._thread.start()

    def send(self, message: Message) -> None:
        """Sends if there is a connection; otherwise the message is void, as everything else of that connection."""
        channel = self._greeted
        if channel is None:
            return
        try:
            channel.send_now(message)
        except BrokerUnavailable:
            channel.shutdown()  # the listening thread sees the end and reconnects

    def greet(self, up: Up, hello: Message) -> None:
        """Sends the first message of a new connection, unless that has ended again. From now on `send` uses it."""
        if up.channel is self._channel:
            self._greeted = up.channel
            self.send(hello)

    def drop(self) -> None:
        """Gives this connection up; a new one is made."""
        if self._channel is not None:
            self._channel.shutdown()

    def close(self) -> None:
        self._closing.set()
        self.drop()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._closing.is_set():
            channel = self._channel
            assert channel is not None
            try:
                self._hand_over(channel.receive())
            except TimeoutError:
                self._hand_over(Tick())
            except (BrokerUnavailable, ProtocolError) as error:
                self._channel = self._greeted = None
                channel.close()
                if self._closing.is_set():
                    return
                logger.warning("broker lost (%s): serving on with the memory held, reconnecting", error)
                self.inbox.clear()
                self._hand_over(Down())
                self._channel = self._reconnect()
                if self._channel is not None:
                    self._hand_over(Up(self._channel))

    def _reconnect(self) -> Channel | None:
        while not self._closing.is_set():
            try:
                channel = Channel(self._path, timeout_s=QUIET_S)
            except BrokerUnavailable:
                time.sleep(RECONNECT_S)
            else:
                return channel
        return None

    def _hand_over(self, message: FromBroker | Up | Down | Tick) -> None:
        self.inbox.append(message)
        self._wake()
