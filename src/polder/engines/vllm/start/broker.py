"""What an engine core says to the broker, and asks it, before its KV cache exists."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from polder.broker.client import status
from polder.broker.config import BrokerConfig
from polder.broker.server import BrokerServer
from polder.broker.transport import Channel
from polder.broker.wire import DeviceStatus, Hello, Refused, Welcome
from polder.errors import BrokerUnavailable, BudgetError, ConfigError, ProtocolError

__all__ = ["LocalBroker", "ask_sizes", "check_devices", "say_hello"]

BROKER_PATIENCE_S = 10.0  # a broker that starts together with its engines
FLOOR_PATIENCE_S = 60.0  # the others giving a newcomer's floor back


class LocalBroker:
    """The in-process broker of an engine that shares with nobody: same code, own thread, abstract socket."""

    def __init__(self, device_bytes: dict[str, int], page_bytes: int) -> None:
        self.socket = Path(f"@polder-{os.getpid()}-{os.urandom(4).hex()}")
        config = BrokerConfig(socket=self.socket, devices=device_bytes, page_bytes=page_bytes)
        self._server = BrokerServer(config)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._server.run, args=(self._stop,), name="polder-broker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        self._server.close()


def ask_sizes(socket: Path, devices: Sequence[str], uuids: Sequence[str]) -> tuple[int, int]:
    """The broker's page size, and the bytes that one rank could get at most. `devices`, `uuids`: of each rank."""
    deadline = time.monotonic() + BROKER_PATIENCE_S
    while True:
        try:
            known = {d.device: d for d in status(socket).devices}
            break
        except BrokerUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    check_devices(devices, uuids, known)
    pages = min(known[device].total_pages // devices.count(device) for device in devices)
    page_bytes = known[devices[0]].page_bytes
    return page_bytes, pages * page_bytes


def check_devices(devices: Sequence[str], uuids: Sequence[str], known: Mapping[str, DeviceStatus]) -> None:
    """Raises ConfigError unless the broker has each rank's device, by its name and by its UUID where both sides know
    that."""
    for device, uuid in zip(devices, uuids, strict=True):
        other = next((name for name, their in known.items() if uuid and their.uuid == uuid and name != device), None)
        if other is not None:
            raise ConfigError(
                f"this engine's {device} is the broker's {other}: they have different CUDA_VISIBLE_DEVICES. Start both with the "
                f"same, and choose the engine's GPU by --device-ids {other.removeprefix('cuda:')}"
            )
        if device not in known:
            raise ConfigError(
                f"this engine runs on {device}, and the broker has {', '.join(known)}: add --device {device}=SIZE"
            )
        theirs = known[device].uuid
        if uuid and theirs and uuid != theirs:
            raise ConfigError(
                f"{device} is GPU {uuid} for this engine and GPU {theirs} for the broker: start both with the same "
                f"CUDA_VISIBLE_DEVICES, and choose the engine's GPU by --device-ids"
            )


def say_hello(socket: Path, hello: Hello) -> tuple[Channel, Welcome]:
    """A connection on which Hello was answered. Raises BudgetError when it is refused, BrokerUnavailable."""
    deadline = time.monotonic() + FLOOR_PATIENCE_S
    channel = Channel(socket, timeout_s=BROKER_PATIENCE_S)
    try:
        while True:
            channel.send(hello)
            answer = channel.receive()
            if isinstance(answer, Welcome):
                return channel, answer
            if not isinstance(answer, Refused):
                raise ProtocolError(f"the broker answered Hello with {type(answer).__name__}")
            if not answer.retry_s or time.monotonic() > deadline:
                raise BudgetError(answer.reason)
            time.sleep(answer.retry_s)
    except TimeoutError:
        channel.close()
        raise BrokerUnavailable(f"the broker on {socket} did not answer") from None
    except BaseException:
        channel.close()
        raise
