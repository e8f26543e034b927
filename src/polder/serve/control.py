"""Orders to a running fleet: one model more, one less, one anew, while the others serve on; and how its children are.

They come through a socket beside the broker's, with its guard: mode 0600, and the same user only (SO_PEERCRED). One
line of JSON each way. A cleaner may remove the socket: then another one is made.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import msgspec

from polder.broker.transport import address_of, check_socket_path
from polder.errors import BrokerUnavailable, EnvironmentFault, PolderError, UsageError
from polder.serve.child import ChildStatus

__all__ = ["Order", "carried_out", "children_of", "give"]

ASKING_S = 5.0
"""How long `children_of` waits for a fleet."""

LOOK_S = 0.5
"""Between looks at whether the socket is still there; an end waits for as long."""


class Order(msgspec.Struct, frozen=True, kw_only=True):
    verb: Literal["add", "remove", "restart", "list"]
    model: str = ""
    """Empty for `list`, which answers with a JSON list of ChildStatus."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True):
    words: str
    """What was done, or why not."""
    failed: Literal["", "usage", "environment"] = ""


def _beside(broker: Path) -> Path:
    return broker.with_name(f"{broker.name}.ctl")


def give(broker: Path, order: Order, *, timeout_s: float | None = None) -> str:
    """Gives an order to the fleet whose broker listens on this socket, and waits until it is carried out.

    Returns what was done. Raises UsageError and EnvironmentFault with the fleet's words, BrokerUnavailable without a
    fleet, TimeoutError when the fleet takes longer than `timeout_s`.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(timeout_s)
        try:
            connection.connect(address_of(_beside(broker)))
        except OSError as error:
            words = f"no `polder serve` takes orders on {_beside(broker)}: {error.strerror}"
            raise BrokerUnavailable(words) from error
        connection.sendall(msgspec.json.encode(order) + b"\n")
        line = connection.makefile("rb").readline()
    if not line:
        raise EnvironmentFault("the fleet ended before the order was carried out")
    answer = msgspec.json.decode(line, type=_Answer)
    if answer.failed:
        raise UsageError(answer.words) if answer.failed == "usage" else EnvironmentFault(answer.words)
    return answer.words


def children_of(broker: Path) -> list[ChildStatus]:
    """The children of the fleet whose broker listens on this socket; empty when no fleet answers, as with a broker that
    runs alone."""
    try:
        return msgspec.json.decode(give(broker, Order(verb="list"), timeout_s=ASKING_S), type=list[ChildStatus])
    except (PolderError, OSError, msgspec.DecodeError):
        return []


@contextlib.contextmanager
def carried_out(broker: Path, carry_out: Callable[[Order], str]) -> Iterator[None]:
    """Takes orders while the context is open. `carry_out` is called from several threads and raises PolderError."""
    path = _beside(broker)
    check_socket_path(path)
    path.unlink(missing_ok=True)  # of a fleet that was killed: nobody listens on the broker's
    ended = threading.Event()
    thread = threading.Thread(target=_take, args=(_listener(path), path, carry_out, ended), name="polder-control")
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    os.fchmod(listener.fileno(), 0o600)  # the mode that bind gives; a umask would be that of all threads
    try:
        listener.bind(address_of(path))
        listener.listen()
    except OSError:
        listener.close()
        raise
    listener.settimeout(LOOK_S)
    return listener


def _take(listener: socket.socket, path: Path, carry_out: Callable[[Order], str], ended: threading.Event) -> None:
    while not ended.is_set():
        if not path.exists():
            with contextlib.suppress(OSError):  # its directory is away, too, until the broker is restarted
                made = _listener(path)
                listener.close()
                listener = made
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            continue
        except OSError:  # for example too many open files
            ended.wait(LOOK_S)
            continue
        threading.Thread(target=_serve, args=(connection, carry_out), daemon=True).start()
    listener.close()


def _serve(connection: socket.socket, carry_out: Callable[[Order], str]) -> None:
    with connection, contextlib.suppress(OSError):
        _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.getuid():
            return
        try:
            order = msgspec.json.decode(connection.makefile("rb").readline(), type=Order)
            answer = _Answer(words=carry_out(order))
        except (PolderError, msgspec.DecodeError) as error:
            answer = _Answer(words=str(error), failed="environment" if isinstance(error, EnvironmentFault) else "usage")
        connection.sendall(msgspec.json.encode(answer) + b"\n")
