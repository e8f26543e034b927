"""File descriptors over Unix sockets (SCM_RIGHTS, unix(7)).

Descriptors travel beside bytes, so a message of descriptors has at least one byte. The kernel takes at most 253 a message
(SCM_MAX_FD); more are the caller's to split. Received descriptors are close-on-exec from the start: no child that another
thread happens to start inherits them.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Sequence

from polder.errors import ProtocolError

__all__ = ["MAX_FDS", "recv_fds", "send_fds"]

MAX_FDS = 250

_INT_BYTES = array.array("i").itemsize


def send_fds(sock: socket.socket, data: bytes, fds: Sequence[int]) -> int:
    """Sends all of `data`, the descriptors beside its first byte; returns len(data). The fds stay the caller's to close.

    For blocking sockets: blocks until the kernel has everything. Raises ProtocolError for no data or more than MAX_FDS, and
    OSError when the connection is gone (what was sent until then may have arrived).
    """
    if not data or len(fds) > MAX_FDS:
        raise ProtocolError(
            f"a message of {len(data)} bytes with {len(fds)} descriptors: 1 byte or more, {MAX_FDS} or fewer"
        )
    sent = socket.send_fds(sock, [data], fds) if fds else sock.send(data)
    sock.sendall(data[sent:])
    return len(data)


def recv_fds(sock: socket.socket, max_bytes: int, max_fds: int) -> tuple[bytes, list[int]]:
    """One receive: up to `max_bytes` and the descriptors that came beside them, which the caller closes. b"" at the end.

    Raises ProtocolError, with every received descriptor closed, when there were more than `max_fds`; and OSError (TimeoutError,
    BlockingIOError) as socket.recvmsg does, with none received.
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
