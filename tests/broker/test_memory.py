"""A device that has less memory than its budget, and a file table that is full: the broker serves on, and the budget
shrinks."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polder.broker import client, device_pages, server, wire
from polder.broker.transport import Channel, encode
from polder.errors import ConfigError, UsageError
from polder.memory.cuda import CudaBackend
from polder.memory.page import PAGE_BYTES
from tests.broker.test_server import Running, answer_on, config, hello, wait_for
from tests.memory.machines import FAKE_MB, FakeCuda

DEVICE_PAGES = (FAKE_MB << 20) // PAGE_BYTES
BUDGET = 24


class Engine:
    """One with a page a unit."""

    def __init__(self, broker: Running, name: str, floor: int, **values: object) -> None:
        self.broker, self.name = broker, name
        self.channel = Channel(broker.path, timeout_s=60.0)
        self.channel.send(
            hello(
                name,
                **{"devices": ["cuda:0"], "page_bytes": PAGE_BYTES, "pages_per_unit": 1, "floor_units": floor} | values,
            )
        )
        welcome = answer_on(self.channel)
        assert isinstance(welcome, wire.Welcome)
        self.lease, self.pages = welcome.lease, welcome.held.kv[0]

    def fetch(self, pages: list[int] | None = None) -> int:
        """How many handles came."""
        wanted = self.pages if pages is None else pages
        request = wire.Fetch(engine=self.name, rank=0, device="cuda:0", pages=wanted)
        answer, fds = client.fetch_handles(self.broker.path, request)
        for fd in fds:
            os.close(fd)
        return len(answer.fd_index)

    def give_all_back(self) -> None:
        self.channel.send(wire.Returned(lease=self.lease, use="kv", pages=[self.pages]))


@pytest.fixture
def others(fake_cuda: FakeCuda) -> Iterator[CudaBackend]:
    """What else runs on the device."""
    fake_cuda.reset()
    backend = CudaBackend(0)
    yield backend
    backend.close()
    fake_cuda.reset()


@pytest.fixture
def broker(
    others: CudaBackend, short_dir: Path, no_fd_leak: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Running]:
    monkeypatch.setattr(device_pages, "MISSING_EVERY_S", 0.1)
    running = Running(short_dir / "broker", devices={"cuda:0": BUDGET * PAGE_BYTES}, page_bytes=PAGE_BYTES)
    yield running
    running.stop()


def total_pages(broker: Running) -> int:
    return broker.status().devices[0].total_pages


def test_out_of_memory_refuses_one_fetch_and_shrinks_the_budget_until_memory_is_free(
    broker: Running, others: CudaBackend
) -> None:
    taken = others.create(DEVICE_PAGES - 16)
    first, second = Engine(broker, "a", 10), Engine(broker, "b", 10)
    assert first.fetch() == 10
    with pytest.raises(UsageError, match="out of memory"):
        second.fetch()
    assert total_pages(broker) < BUDGET, "what is free and cannot be made is nobody's"
    second.give_all_back()
    # The six pages that there is room for are found, and no more.
    wait_for(lambda: total_pages(broker) == 16)
    assert first.fetch() == 10
    others.destroy(taken)
    wait_for(lambda: total_pages(broker) == BUDGET)
    first.channel.close()
    second.channel.close()


def test_an_export_that_fails_refuses_one_fetch_and_ends_nothing(broker: Running, fake_cuda: FakeCuda) -> None:
    engine = Engine(broker, "a", 10)
    fake_cuda.fail("cuMemExportToShareableHandle", 4)
    with pytest.raises(UsageError, match="cuMemExportToShareableHandle"):
        engine.fetch()
    assert total_pages(broker) == BUDGET
    assert engine.fetch() == 10
    engine.channel.close()


def test_no_page_is_made_of_what_engines_need_in_their_steps(broker: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CudaBackend, "free_bytes", lambda _: 12 * PAGE_BYTES)
    engine = Engine(broker, "a", 10, reserve_bytes=[8 * PAGE_BYTES])
    with pytest.raises(UsageError, match="need 16 MiB in their steps"):
        engine.fetch()
    assert engine.fetch(engine.pages[:4]) == 4
    engine.channel.close()


def test_a_budget_beyond_what_is_free_is_refused_at_the_start(
    others: CudaBackend, short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CudaBackend, "free_bytes", lambda _: (BUDGET - 1) * PAGE_BYTES)
    devices = {"cuda:0": BUDGET * PAGE_BYTES}
    with pytest.raises(ConfigError, match=r"48 MiB is more than the 46 MiB that are free: lower --device cuda:0"):
        server.BrokerServer(config(short_dir / "broker", devices=devices, page_bytes=PAGE_BYTES))
    assert not (short_dir / "broker").exists(), "the next start would take this for a broker that was killed"


def test_descriptors_that_the_kernel_does_not_take_yet_are_sent_later(
    broker: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It limits how many of one user are on their way, for users other than root."""
    refused = []
    send = socket.send_fds

    def full_at_first(to: socket.socket, buffers: list[bytes], fds: list[int]) -> int:
        if not refused:
            refused.append(len(fds))
            raise OSError(errno.ETOOMANYREFS, "Too many references: cannot splice")
        return send(to, buffers, fds)

    monkeypatch.setattr(socket, "send_fds", full_at_first)
    engine = Engine(broker, "a", 10)
    assert engine.fetch() == 10
    assert refused == [10]
    engine.channel.close()


def test_descriptors_do_not_pile_up_in_the_broker(broker: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many questions that came in one piece: each answer is sent before the next is made."""
    engine = Engine(broker, "a", 10)
    most, sent = [0], []
    send, export = socket.send_fds, CudaBackend.export_many

    def counted_send(to: socket.socket, buffers: list[bytes], fds: list[int]) -> int:
        sent.append(len(fds))
        return send(to, buffers, fds)

    def counted_export(self: CudaBackend, handles: Any) -> Any:
        found = export(self, handles)
        made.append(len(found[0]))
        most[0] = max(most[0], sum(made) - sum(sent))
        return found

    made: list[int] = []
    monkeypatch.setattr(socket, "send_fds", counted_send)
    monkeypatch.setattr(CudaBackend, "export_many", counted_export)
    question = wire.Fetch(engine="a", rank=0, device="cuda:0", pages=engine.pages)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(broker.path))
        peer.sendall(encode(question) * 8)
        wait_for(lambda: len(sent) == 8)
    assert most == [10]
    engine.channel.close()


def test_the_broker_may_have_many_files_open(others: CudaBackend, short_dir: Path) -> None:
    """Pages that are handed over are a descriptor each."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        made = server.BrokerServer(config(short_dir / "broker", devices={"cuda:0": PAGE_BYTES}, page_bytes=PAGE_BYTES))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
        made.close()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
