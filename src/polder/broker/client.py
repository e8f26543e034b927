"""Sends one request to a broker and returns its answer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TypeVar

from polder.broker.transport import Channel, check_socket_path
from polder.broker.wire import (
    CopyFile,
    CopyFilled,
    Done,
    Fetch,
    FetchCopy,
    FetchTable,
    FromOperator,
    Handles,
    Refused,
    Status,
    StatusRequest,
    Stock,
    Table,
)
from polder.errors import BrokerUnavailable, ProtocolError, UsageError

__all__ = ["Question", "check_socket_path", "fetch_copy", "fetch_handles", "fetch_table", "request", "status"]

Question = FromOperator | CopyFilled | Stock
"""Requests that are answered by Done."""
Answer = TypeVar("Answer", Done, Status, Handles, Table, CopyFile)


def request(socket: Path, message: Question, *, timeout_s: float = 5.0) -> None:
    """Sends `message` and returns when it is answered by Done.

    Raises UsageError when the broker refuses, BrokerUnavailable when none answers within `timeout_s`.
    """
    _ask(socket, message, Done, timeout_s)


def status(socket: Path, *, timeout_s: float = 5.0) -> Status:
    return _ask(socket, StatusRequest(), Status, timeout_s)[0]


def fetch_handles(socket: Path, message: Fetch, *, timeout_s: float = 5.0) -> tuple[Handles, list[int]]:
    """Handles of pages that the engine holds, with the file descriptors they refer to; the caller closes those."""
    return _ask(socket, message, Handles, timeout_s)


def fetch_table(socket: Path, message: FetchTable, *, timeout_s: float = 5.0) -> int:
    """The file descriptor of a lender's table, which is the caller's to close. Raises UsageError when there is no such
    lender."""
    return _ask_for_file(socket, message, Table, timeout_s)[1]


def fetch_copy(socket: Path, key: str, *, timeout_s: float = 5.0) -> tuple[int, bool]:
    """A memory file for the host copy of some weights, the caller's to close, and whether another process has filled
    it.

    Raises UsageError while another process fills it.
    """
    answer, fd = _ask_for_file(socket, FetchCopy(key=key), CopyFile, timeout_s)
    return fd, answer.filled


def _ask_for_file(
    socket: Path, message: FetchTable | FetchCopy, expected: type[Answer], timeout_s: float
) -> tuple[Answer, int]:
    """The answer, and the one descriptor that came with it. Raises ProtocolError when none came, or several."""
    answer, fds = _ask(socket, message, expected, timeout_s)
    if len(fds) != 1:
        for fd in fds:
            os.close(fd)
        raise ProtocolError(f"{type(answer).__name__} came with {len(fds)} descriptors")
    return answer, fds[0]


def _ask(
    socket: Path,
    message: Question | StatusRequest | Fetch | FetchTable | FetchCopy,
    expected: type[Answer],
    timeout_s: float,
) -> tuple[Answer, list[int]]:
    """The answer, and the descriptors that came with it."""
    channel = Channel(socket, timeout_s=timeout_s)
    try:
        channel.send(message)
        try:
            answer = channel.receive()
        except TimeoutError:
            raise BrokerUnavailable(f"the broker on {socket} did not answer within {timeout_s:g} s") from None
        if isinstance(answer, Refused):
            raise UsageError(answer.reason)
        if not isinstance(answer, expected):
            raise ProtocolError(f"{type(answer).__name__} is no answer to {type(message).__name__}")
        return answer, channel.take_fds()
    finally:
        channel.close()
