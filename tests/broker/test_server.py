"""The broker on its socket: who may speak, what nonsense does, what the end of a process does."""

from __future__ import annotations

import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from polder.broker import client, wire
from polder.broker.config import BrokerConfig
from polder.broker.server import BrokerServer
from polder.broker.transport import Channel
from polder.errors import AddressInUse, BrokerUnavailable, ConfigError, UsageError

PAGE = 4096


def config(path: Path, **values: object) -> BrokerConfig:
    defaults: dict[str, object] = {"socket": path, "devices": {"cpu:0": 64 * PAGE}, "page_bytes": PAGE}
    return BrokerConfig(**{**defaults, **values})  # type: ignore[arg-type]


class Running:
    def __init__(self, path: Path, **values: object) -> None:
        self.path = path
        self.server = BrokerServer(config(path, **values))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.server.run, args=(self._stop,))
        self._thread.start()

    def status(self) -> wire.Status:
        return client.status(self.path)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()
        self.server.close()


@pytest.fixture
def broker(short_dir: Path, no_fd_leak: None) -> Iterator[Running]:
    running = Running(short_dir / "broker")
    yield running
    running.stop()


def answer_on(channel: Channel) -> wire.FromBroker:
    """The next message that is not about who is here."""
    while isinstance(message := channel.receive(), wire.Neighbours):
        pass
    return message


def hello(name: str = "a", **values: object) -> wire.Hello:
    defaults: dict[str, object] = {
        "engine": name,
        "model": "m",
        "devices": ["cpu:0"],
        "page_bytes": PAGE,
        "pages_per_unit": 2,
        "unit_tokens": 16,
        "floor_units": 3,
        "ceiling_units": 32,
        "share_units": 0,
    }
    return wire.Hello(**{**defaults, **values})  # type: ignore[arg-type]


def wait_for(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def connected(path: Path, message: wire.Hello) -> tuple[Channel, wire.FromBroker]:
    channel = Channel(path, timeout_s=60.0)
    channel.send(message)
    return channel, channel.receive()


def receive_to_the_end(channel: Channel) -> None:
    while True:
        channel.receive()


ENGINE = """
import sys, time
from pathlib import Path
from polder.broker import wire
from polder.broker.transport import Channel
from tests.broker.test_server import hello
channel = Channel(Path(sys.argv[1]), timeout_s=60)
channel.send(hello(sys.argv[2])); print(type(channel.receive()).__name__, flush=True); time.sleep(60)
"""


def engine_process(path: Path, name: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", ENGINE, str(path), name], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "Welcome"
    return process


def test_an_engine_that_has_another_process_id_to_itself_is_refused(broker: Running) -> None:
    _, answer = connected(broker.path, hello(pid=os.getpid() + 1))
    assert isinstance(answer, wire.Refused)
    assert "PID namespace" in answer.reason


def test_an_engine_of_another_protocol_is_told_so_whatever_its_process_id(broker: Running) -> None:
    _, answer = connected(broker.path, hello(protocol=wire.PROTOCOL - 1, pid=os.getpid() + 1))
    assert isinstance(answer, wire.Refused)
    assert "install the same Polder" in answer.reason


def test_an_engine_in_a_pid_namespace_of_its_own_is_refused(broker: Running) -> None:
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode:
        pytest.skip("this user may not make a PID namespace")
    command = [*unshare, sys.executable, "-c", ENGINE.replace("; time.sleep(60)", ""), str(broker.path), "a"]
    assert subprocess.run(command, capture_output=True, text=True, timeout=120).stdout.strip() == "Refused"


def test_only_the_owner_may_open_the_socket(broker: Running) -> None:
    assert stat.S_IMODE(os.stat(broker.path).st_mode) == 0o600


@pytest.mark.parametrize(
    "nonsense",
    [
        b"\xff\xff\xff\xff",
        struct.pack("<I", wire.MAX_MESSAGE + 1),
        struct.pack("<I", 4) + b"\xc1\xc1\xc1\xc1",
        struct.pack("<I", 3) + b"abc",
        b"GET / HTTP/1.1\r\n\r\n" + b"x" * 100,
    ],
)
def test_nonsense_costs_its_sender_the_connection_and_nobody_else(broker: Running, nonsense: bytes) -> None:
    good, answer = connected(broker.path, hello())
    assert isinstance(answer, wire.Welcome)
    with socket.socket(socket.AF_UNIX) as bad:
        bad.settimeout(60)
        bad.connect(str(broker.path))
        bad.sendall(nonsense)
        assert bad.recv(100) == b""
    status = broker.status()
    assert status.refused_messages == 1
    assert [e.engine for e in status.engines] == ["a"]
    good.close()


def test_half_a_message_is_waited_for_without_harm(broker: Running) -> None:
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(broker.path))
        slow.sendall(struct.pack("<I", 1000) + b"x")
        assert broker.status().refused_messages == 0


@pytest.mark.parametrize(
    "message",
    [
        wire.Grown(lease=1),
        wire.Returned(lease=1, use="kv", pages=[[0]]),
        wire.Fetch(engine="a", rank=0, device="cpu:0", pages=[0]),
    ],
)
def test_acting_before_hello_is_refused(broker: Running, message: wire.Message) -> None:
    channel = Channel(broker.path, timeout_s=60.0)
    channel.send(message)
    with pytest.raises(BrokerUnavailable):
        channel.receive()
    channel.close()


def test_giving_back_a_foreign_page_changes_nothing(broker: Running) -> None:
    (a, welcome_a), (b, _) = connected(broker.path, hello("a")), connected(broker.path, hello("b"))
    assert isinstance(welcome_a, wire.Welcome)
    b.send(wire.Returned(lease=0, use="kv", pages=[welcome_a.held.kv[0][:2]]))
    with pytest.raises(BrokerUnavailable):
        receive_to_the_end(b)
    assert broker.status().devices[0].pages_by_owner["a/kv"] == 6
    a.close()
    b.close()


def test_a_killed_engine_gives_its_pages_back(broker: Running) -> None:
    process = engine_process(broker.path, "a")
    assert broker.status().devices[0].pages_by_owner == {"a/kv": 6}
    process.kill()
    wait_for(lambda: broker.status().devices[0].free_pages == 64)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert broker.status().engines == []
    assert broker.status().reclaimed_pages == 6


def test_a_name_in_use_by_a_living_process_is_refused(broker: Running) -> None:
    process = engine_process(broker.path, "a")
    channel, answer = connected(broker.path, hello("a"))
    assert isinstance(answer, wire.Refused)
    assert str(process.pid) in answer.reason
    channel.close()
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def test_a_budget_too_small_says_how_much_is_needed(broker: Running) -> None:
    first, _ = connected(broker.path, hello("a", floor_units=20))
    second, answer = connected(broker.path, hello("b", floor_units=20))
    assert isinstance(answer, wire.Refused)
    assert "320 KiB" in answer.reason  # 2 engines x 20 units x 2 pages x 4 KiB
    first.close()
    second.close()


def test_handles_are_given_for_held_pages_only(broker: Running) -> None:
    channel, welcome = connected(broker.path, hello("a"))
    assert isinstance(welcome, wire.Welcome)
    fetch = wire.Fetch(engine="a", rank=0, device="cpu:0", pages=welcome.held.kv[0])
    handles, fds = client.fetch_handles(broker.path, fetch)
    assert handles.offsets == [page * PAGE for page in welcome.held.kv[0]]
    for fd in fds:
        os.close(fd)
    with pytest.raises(BrokerUnavailable):
        client.fetch_handles(broker.path, msgspec.structs.replace(fetch, pages=[60]))
    channel.close()


def test_resize_of_an_unknown_engine_is_refused(broker: Running) -> None:
    channel, _ = connected(broker.path, hello("a"))
    with pytest.raises(UsageError):
        client.request(broker.path, wire.Resize(engine="nobody", units=4))
    channel.close()


def test_two_brokers_on_one_socket_are_refused(broker: Running) -> None:
    with pytest.raises(AddressInUse, match="already listens"):
        BrokerServer(config(broker.path))
    assert broker.status().engines == []


def test_a_socket_path_too_long_is_refused_before_anything_starts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="107"):
        BrokerServer(config(tmp_path / ("x" * 120)))


def test_a_file_in_the_way_is_not_touched(short_dir: Path) -> None:
    path = short_dir / "broker"
    path.write_text("mine")
    with pytest.raises(ConfigError, match="no socket"):
        BrokerServer(config(path))
    assert path.read_text() == "mine"


def test_a_stopped_broker_leaves_nothing(short_dir: Path, no_fd_leak: None) -> None:
    running = Running(short_dir / "broker")
    running.stop()
    assert list(short_dir.iterdir()) == []


def test_a_restarted_broker_waits_for_reports_before_it_grants(short_dir: Path) -> None:
    path = short_dir / "broker"
    with socket.socket(socket.AF_UNIX) as crashed:
        crashed.bind(str(path))  # a socket file that nobody listens on: what kill -9 leaves
    running = Running(path, recovery_s=600.0)
    newcomer, answer = connected(path, hello("new"))
    assert isinstance(answer, wire.Refused)
    assert answer.retry_s > 0
    survivor, welcome = connected(path, hello("old", held=wire.Held(kv=[[10, 11, 20, 21, 0, 1]])))
    assert isinstance(welcome, wire.Welcome)
    assert running.status().devices[0].pages_by_owner == {"old/kv": 6}
    running.server.core.recovering_until = time.monotonic()
    newcomer.send(hello("new"))
    granted = answer_on(newcomer)
    assert isinstance(granted, wire.Welcome)
    assert not {10, 11, 20, 21, 0, 1} & set(granted.held.kv[0])
    newcomer.close()
    survivor.close()
    running.stop()


def test_a_borrower_is_recalled_and_the_owner_granted(broker: Running) -> None:
    borrower, welcome = connected(broker.path, hello("a"))
    owner, _ = connected(broker.path, hello("b"))
    assert isinstance(welcome, wire.Welcome)
    held = list(welcome.held.kv[0])
    want = {"held_units": 3, "busy_units": 26, "waiting_units": 0, "peak_units": 26, "cached_units": 3, "curve": []}
    borrower.send(wire.Demand(**want, urgent=True))  # type: ignore[arg-type]
    grant = answer_on(borrower)
    assert isinstance(grant, wire.Grant)
    assert grant.units == 23
    held += grant.pages[0]
    borrower.send(wire.Grown(lease=grant.lease))
    need = {"held_units": 3, "busy_units": 3, "waiting_units": 11, "peak_units": 14, "cached_units": 3, "curve": []}
    owner.send(wire.Demand(**need, urgent=True))  # type: ignore[arg-type]
    first = answer_on(owner)  # what was free comes at once
    assert isinstance(first, wire.Grant)
    owner.send(wire.Grown(lease=first.lease))
    recall = answer_on(borrower)
    assert isinstance(recall, wire.Recall)
    assert recall.preempt
    borrower.send(wire.Returned(lease=recall.lease, use="kv", pages=[held[-2 * recall.units :]]))
    second = answer_on(owner)
    assert isinstance(second, wire.Grant)
    owner.send(wire.Grown(lease=second.lease))
    wait_for(lambda: len(broker.status().giveback_ms) == 1)
    status = {e.engine: e for e in broker.status().engines}
    assert status["b"].held_units == 14
    assert status["a"].borrowed_units == status["a"].held_units - 16
    assert status["a"].recalled_units == recall.units
    borrower.close()
    owner.close()


def test_the_host_tier_is_booked_by_quota_and_free_again_when_its_engine_ends(
    short_dir: Path, no_fd_leak: None
) -> None:
    running = Running(short_dir / "broker", devices={"cpu:0": 64 * PAGE, "host:0": 8 * PAGE})
    try:
        first = Channel(running.path, timeout_s=60.0)
        first.send(hello("a", host_pages=6))
        welcome = answer_on(first)
        assert isinstance(welcome, wire.Welcome)
        assert len(welcome.host[0]) == 6
        request = wire.Fetch(engine="a", rank=0, device="host:0", pages=welcome.host[0])
        handles, fds = client.fetch_handles(running.path, request)
        assert len(handles.offsets) == 6
        for fd in fds:
            os.close(fd)
        second = Channel(running.path, timeout_s=60.0)
        second.send(hello("b", host_pages=3))
        assert isinstance(answer_on(second), wire.Refused)
        first.close()
        second.close()
    finally:
        running.stop()


def test_a_lenders_table_reaches_its_neighbours_who_hear_of_it(short_dir: Path, no_fd_leak: None) -> None:
    running = Running(short_dir / "broker")
    try:
        lender, borrower = Channel(running.path, timeout_s=60.0), Channel(running.path, timeout_s=60.0)
        lender.send(hello("a", table_bytes=8192))
        assert isinstance(answer_on(lender), wire.Welcome)
        borrower.send(hello("b"))
        assert isinstance(answer_on(borrower), wire.Welcome)
        heard = borrower.receive()
        assert isinstance(heard, wire.Neighbours)
        assert heard.lenders == ["a"]
        with pytest.raises(UsageError):
            client.fetch_table(running.path, wire.FetchTable(engine="b", lender="a"))
        own = client.fetch_table(running.path, wire.FetchTable(engine="a", lender="a"))
        theirs = client.fetch_table(running.path, wire.FetchTable(engine="b", lender="a"))
        assert os.fstat(own).st_ino == os.fstat(theirs).st_ino
        for fd in (own, theirs):
            os.close(fd)
        with pytest.raises(UsageError):
            client.fetch_handles(running.path, wire.Fetch(engine="b", rank=0, device="cpu:0", pages=[63], lender="a"))
        lender.close()
        borrower.close()
    finally:
        running.stop()


def test_an_engine_that_serves_as_stock_is_known_as_long_as_it_lives(broker: Running) -> None:
    code = (
        "import sys; from pathlib import Path; from polder.broker import client, wire;"
        f"client.request(Path({str(broker.path)!r}), wire.Stock(engine='bert', reason='no KV cache'));"
        "print('told', flush=True); sys.stdin.read()"
    )
    engine = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert engine.stdout is not None
    assert engine.stdout.readline() == b"told\n"
    assert broker.status().stock == {"bert": "no KV cache"}
    assert not broker.status().engines
    engine.communicate()
    wait_for(lambda: not broker.status().stock)
