"""Descriptors over sockets, and pages over descriptors: another process maps the same memory."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from polder.broker.wire import MAX_FDS
from polder.errors import ProtocolError
from polder.memory.handoff import recv_fds
from polder.memory.pool import PagePool
from tests.memory.machines import REPOSITORY, Machine


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair()
    for end in (a, b):
        end.settimeout(60)
    yield a, b
    a.close()
    b.close()


@pytest.mark.usefixtures("no_fd_leak")
def test_descriptors_arrive_close_on_exec(pair: tuple[socket.socket, socket.socket]) -> None:
    a, b = pair
    sent = [os.open("/dev/null", os.O_RDONLY) for _ in range(MAX_FDS)]
    assert socket.send_fds(a, [b"hello"], sent) == 5
    data, fds = recv_fds(b, 100, MAX_FDS)
    assert (data, len(fds)) == (b"hello", MAX_FDS)
    assert all(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for fd in fds)
    for fd in [*sent, *fds]:
        os.close(fd)


@pytest.mark.usefixtures("no_fd_leak")
@pytest.mark.parametrize(("sent", "wanted"), [(9, 8), (2, 1), (1, 0), (200, 3)])
def test_too_many_descriptors_are_closed_and_refused(
    pair: tuple[socket.socket, socket.socket], sent: int, wanted: int
) -> None:
    a, b = pair
    fds = [os.open("/dev/null", os.O_RDONLY) for _ in range(sent)]
    socket.send_fds(a, [b"x"], fds)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ProtocolError, match=f"more than {wanted}"):
        recv_fds(b, 10, wanted)
    assert len(os.listdir("/proc/self/fd")) == before
    for fd in fds:
        os.close(fd)


def test_bytes_without_descriptors_and_the_end(pair: tuple[socket.socket, socket.socket]) -> None:
    a, b = pair
    a.send(b"plain")
    assert recv_fds(b, 3, 8) == (b"pla", [])
    assert recv_fds(b, 3, 8) == (b"in", [])
    a.close()
    assert recv_fds(b, 3, 8) == (b"", [])


def test_another_process_maps_and_writes_the_same_pages(
    machine: Machine, pair: tuple[socket.socket, socket.socket]
) -> None:
    a, b = pair
    pages = [4, 1, 2]
    pool = PagePool(machine.backend, 6)
    with machine.span(3) as span:
        span.map(range(3), pool.handles(pages))
        for slot, page in enumerate(pages):
            machine.fill(span.address(slot), page)
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.memory.other_process", machine.kind, str(b.fileno())],
            pass_fds=[b.fileno()],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        b.close()
        with contextlib.ExitStack() as stack:
            stack.callback(child.wait, 60)
            stack.callback(child.kill)
            fds, fd_index, offsets = pool.export(pages)
            message = json.dumps({"pages": pages, "fd_index": fd_index, "offsets": offsets})
            socket.send_fds(a, [message.encode()], fds)
            for fd in fds:
                os.close(fd)
            assert a.recv(100) == b"written"
            assert [machine.bytes(span.address(slot)) for slot in range(3)] == [{104}, {101}, {102}]
            if machine.kind == "cpu":
                assert machine.backend.resident_bytes() == 3 * machine.page
                pool.close()
                a.send(b"write on")
                assert a.recv(100) == b"discarded"
                # Its discard gave the memory back for everybody, as that of a page which only it held.
                assert machine.bytes(span.address(0)) == {0}
            assert child.wait(60) == 0
            stack.pop_all()
    pool.close()
