"""Frames on a stream socket: 4 bytes of length, then one MessagePack message. Used by both ends."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

from polder.broker.wire import MAX_FDS, MAX_MESSAGE, FromBroker, Message, ToBroker
from polder.errors import AddressInUse, BrokerUnavailable, ConfigError, ProtocolError
from polder.memory.handoff import recv_fds

__all__ = ["Channel", "Deframer", "address_of", "check_socket_path", "encode", "find_stale", "from_broker", "to_broker"]

_HEADER = struct.Struct("<I")
_SUN_PATH = 107  # bytes of sockaddr_un.sun_path, the closing NUL not counted
_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


def encode(message: Message) -> bytes:
    body = _encoder.encode(message)
    if len(body) > MAX_MESSAGE:
        raise ProtocolError(f"{type(message).__name__} of {len(body)} bytes is over the limit of {MAX_MESSAGE}")
    return _HEADER.pack(len(body)) + body


class Deframer(Generic[T]):
    """Turns received bytes into messages. Raises ProtocolError at the first oversized or malformed message."""

    def __init__(self, decoder: msgspec.msgpack.Decoder[T]) -> None:
        self._decoder = decoder
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[T]:
        self._buffer += data
        while len(self._buffer) >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._buffer)
            if length > MAX_MESSAGE:
                raise ProtocolError(f"a message of {length} bytes was announced, the limit is {MAX_MESSAGE}")
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_HEADER.size : end])
            del self._buffer[:end]
            try:
                yield self._decoder.decode(body)
            except (msgspec.DecodeError, msgspec.ValidationError, UnicodeDecodeError, RecursionError) as error:
                raise ProtocolError(f"malformed message: {error}") from None


def to_broker() -> Deframer[ToBroker]:
    return Deframer(msgspec.msgpack.Decoder(ToBroker))


def from_broker() -> Deframer[FromBroker]:
    return Deframer(msgspec.msgpack.Decoder(FromBroker))


def address_of(path: Path) -> str:
    """The kernel's address of a socket path. "@name" is an abstract address: no file, and it ends with its process."""
    text = str(path)
    return "\0" + text[1:] if text.startswith("@") else text


def check_socket_path(path: Path) -> None:
    """Raises ConfigError when the path is longer than the kernel's limit of 107 bytes."""
    length = len(str(path).encode())
    if length > _SUN_PATH:
        raise ConfigError(f"socket path is {length} bytes long, the limit is {_SUN_PATH}: {path}. Choose a shorter one")


def find_stale(path: Path) -> bool:
    """Whether a broker that was killed left its socket file here.

    Raises AddressInUse when a broker listens there, ConfigError when none can.
    """
    check_socket_path(path)
    if str(path).startswith("@"):
        return False
    if not path.parent.is_dir():
        raise ConfigError(f"no directory {path.parent} for the broker's socket: make it, or choose another --socket")
    if not path.exists():
        return False
    if not path.is_socket():
        raise ConfigError(f"{path} exists and is no socket: choose another --socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return True
    raise AddressInUse(f"a broker already listens on {path}: stop it, or choose another --socket")


class Channel:
    """A client's blocking connection to the broker. One thread may send while another receives."""

    def __init__(self, path: Path, *, timeout_s: float) -> None:
        """Connects. Raises BrokerUnavailable when nobody listens there."""
        check_socket_path(path)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(address_of(path))
        except OSError as error:
            self._socket.close()
            raise BrokerUnavailable(f"no broker answers on {path}: {error.strerror or error}") from error
        self._deframer = from_broker()
        self._ready: list[FromBroker] = []
        self._fds: list[int] = []

    def send(self, message: Message) -> None:
        """Raises BrokerUnavailable when the connection is gone."""
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise BrokerUnavailable(f"the broker's connection broke: {error}") from error

    def send_now(self, message: Message) -> None:
        """Sends without ever waiting. Raises BrokerUnavailable when the connection is gone or its buffer is full."""
        frame = encode(message)
        try:
            sent = self._socket.send(frame, socket.MSG_DONTWAIT)
        except OSError as error:
            raise BrokerUnavailable(f"the broker's connection broke: {error}") from error
        if sent < len(frame):
            raise BrokerUnavailable("the broker does not read its messages")

    def set_timeout(self, timeout_s: float) -> None:
        self._socket.settimeout(timeout_s)

    def receive(self) -> FromBroker:
        """The next message. Raises TimeoutError after the channel's time, BrokerUnavailable at the end of the
        connection."""
        while not self._ready:
            try:
                data, fds = recv_fds(self._socket, 1 << 16, MAX_FDS)
            except TimeoutError:
                raise
            except OSError as error:
                raise BrokerUnavailable(f"the broker's connection broke: {error}") from error
            self._fds += fds
            if not data:
                raise BrokerUnavailable("the broker closed the connection")
            self._ready.extend(self._deframer.feed(data))
        return self._ready.pop(0)

    def take_fds(self) -> list[int]:
        """File descriptors received so far; the caller closes them."""
        fds, self._fds = self._fds, []
        return fds

    def shutdown(self) -> None:
        """Wakes a thread blocked in `receive`, which then raises BrokerUnavailable."""
        with contextlib.suppress(OSError):  # already gone
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for fd in self.take_fds():
            os.close(fd)
        self._socket.close()
