"""The other process of test_handoff: adopts the pages that come over a socket, checks them, writes to them, and says so.

Run as `python -m tests.memory.other_process KIND SOCKET_FD GENERATION`.
"""

from __future__ import annotations

import ctypes
import json
import os
import socket
import sys

from polder.memory.handoff import recv_fds
from polder.memory.pool import ImportedPages
from polder.memory.span import Span
from tests.memory.machines import LIBRARY, FakeCuda, make_backend


def main() -> None:
    kind, sock = sys.argv[1], socket.socket(fileno=int(sys.argv[2]))
    sock.settimeout(60)
    if kind == "fake-cuda":
        FakeCuda(os.environ[LIBRARY])
    backend = make_backend(kind)
    data, fds = recv_fds(sock, 1 << 16, 250)
    message = json.loads(data)
    imported = ImportedPages(backend)
    assert imported.missing(1, message["pages"]) == message["pages"]
    imported.adopt(1, message["pages"], fds, message["fd_index"], message["offsets"])
    for fd in fds:
        os.close(fd)
    span = Span(backend, len(message["pages"]))
    span.map(range(span.slots), imported.handles(1, message["pages"]))
    rows = span.tensor().view(span.slots, -1)
    assert [(int(row.min()), int(row.max())) for row in rows] == [(p, p) for p in message["pages"]]
    rows += 100
    backend.fence()
    sock.send(b"written")
    if kind == "cpu":
        assert sock.recv(10) == b"write on"  # the broker has closed its pool, and the pages are still here
        ctypes.memset(span.address(0), 7, backend.page_bytes)
        imported.check_integrity()
        del rows
        span.close()
        imported.discard(1, message["pages"])
        sock.send(b"discarded")


if __name__ == "__main__":
    main()
