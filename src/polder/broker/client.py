"""Sends one request to a broker and returns its answer."""

from __future__ import annotations

import os
from pathlib import Path

from polder.broker.transport import Channel, check_socket_path
from polder.broker.wire import (
    CopyFile,
    CopyFilled,
    Done,
    Fetch,
    FetchCopy,
    FetchTable,
    FromBroker,
    Handles,
    Refused,
    Resize,
    Sleep,
    Status,
    StatusRequest,
    Stock,
    Stream,
    Table,
    Wake,
)
from polder.errors import BrokerUnavailable, ProtocolError, UsageError

__all__ = ["Question", "check_socket_path", "fetch_copy", "fetch_handles", "fetch_table", "request", "status"]

Question = StatusRequest | Resize | Sleep | Wake | Stream | CopyFilled | Stock
"""Requests that are answered by Status or Done."""


def request(socket: Path, message: Question, *, timeout_s: float = 5.0) -> Status | Done:
    """Sends `message`, returns the answer.

    Raises UsageError when the broker refuses, BrokerUnavailable when none answers within `timeout_s`.
    """
    answer, _ = _ask(socket, message, timeout_s)
    if isinstance(answer, Status | Done):
        return answer
    raise ProtocolError(f"{type(answer).__name__} is no answer to {type(message).__name__}")


def status(socket: Path, *, timeout_s: float = 5.0) -> Status:
    answer = request(socket, StatusRequest(), timeout_s=timeout_s)
    assert isinstance(answer, Status)
    return answer


def fetch_handles(socket: Path, message: Fetch, *, timeout_s: float = 5.0) -> tuple[Handles, list[int]]:
    """Handles of pages that the engine holds, with the file descriptors they refer to; the caller closes those."""
    answer, fds = _ask(socket, message, timeout_s)
    if isinstance(answer, Handles):
        return answer, fds
    raise _no_answer(answer, fds, "Fetch")


def fetch_table(socket: Path, message: FetchTable, *, timeout_s: float = 5.0) -> int:
    """The file descriptor of a lender's table, which is the caller's to close. Raises UsageError when there is no such
    lender."""
    answer, fds = _ask(socket, message, timeout_s)
    if isinstance(answer, Table) and len(fds) == 1:
        return fds[0]
    raise _no_answer(answer, fds, "FetchTable")


def fetch_copy(socket: Path, key: str, *, timeout_s: float = 5.0) -> tuple[int, bool]:
    """A memory file for the host copy of some weights, the caller's to close, and whether another process has filled
    it.

    Raises UsageError while another process fills it.
    """
    answer, fds = _ask(socket, FetchCopy(key=key), timeout_s)
    if isinstance(answer, CopyFile) and len(fds) == 1:
        return fds[0], answer.filled
    raise _no_answer(answer, fds, "FetchCopy")


def _no_answer(answer: FromBroker, fds: list[int], question: str) -> ProtocolError:
    """The error to raise; closes what came with the answer."""
    for fd in fds:
        os.close(fd)
    return ProtocolError(f"{type(answer).__name__} with {len(fds)} descriptors is no answer to {question}")


def _ask(
    socket: Path, message: Question | Fetch | FetchTable | FetchCopy, timeout_s: float
) -> tuple[FromBroker, list[int]]:
    channel = Channel(socket, timeout_s=timeout_s)
    try:
        channel.send(message)
        try:
            answer = channel.receive()
        except TimeoutError:
            raise BrokerUnavailable(f"the broker on {socket} did not answer within {timeout_s:g} s") from None
        if isinstance(answer, Refused):
            raise UsageError(answer.reason)
        return answer, channel.take_fds()
    finally:
        channel.close()
