"""Receives file descriptors over Unix sockets (SCM_RIGHTS, unix(7)).

Descriptors travel with bytes, so a message with descriptors has at least one byte, and at most 253 of them (the
kernel's SCM_MAX_FD). Received descriptors are close-on-exec from the start, so no child that another thread starts
inherits them.
"""

from __future__ import annotations

import array
import os
import socket

from polder.errors import ProtocolError

__all__ = ["recv_fds"]

_INT_BYTES = array.array("i").itemsize


def recv_fds(sock: socket.socket, max_bytes: int, max_fds: int) -> tuple[bytes, list[int]]:
    """One receive: up to `max_bytes` bytes, b"" at the end, and the descriptors that came with them. The caller closes
    those.

    Raises ProtocolError, with every received descriptor closed, when there were more than `max_fds`. Raises OSError as
    socket.recvmsg does (TimeoutError, BlockingIOError), with none received.
    """
    room = socket.CMSG_SPACE(max_fds * _INT_BYTES)
    data, ancillary, flags, _ = sock.recvmsg(max_bytes, room, socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % _INT_BYTES])
    # Alignment of the buffer can leave room for one more descriptor than asked for, which then truncates nothing.
    if flags & socket.MSG_CTRUNC or len(fds) > max_fds:
        for fd in fds:
            os.close(fd)
        raise ProtocolError(f"more than {max_fds} descriptors came in one message; all were closed")
    return data, fds.tolist()
