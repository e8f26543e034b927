"""An index that cannot be written, or does not answer: its disk is read on, and nobody waits for it twice."""

from __future__ import annotations

import contextlib
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from polder.diskstore.engine import TimedCall
from polder.diskstore.index import SlotIndex
from tests.diskstore.pages import Shelf, names, two_disks

# ---------------------------------------------------------------- bytes that change


class InMemory:
    """A slab that no limit on files applies to."""

    alignment_bytes = 1

    def __init__(self, path: Path) -> None:
        self._bytes = memoryview(bytearray(path.stat().st_size))

    def preadv(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        for buffer in buffers:
            buffer[:] = self._bytes[offset : offset + len(buffer)]
            offset += len(buffer)
        return sum(map(len, buffers))

    def pwritev(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        for buffer in buffers:
            self._bytes[offset : offset + len(buffer)] = buffer
            offset += len(buffer)
        return sum(map(len, buffers))

    def close(self) -> None: ...


def test_an_index_that_cannot_be_written_makes_the_disk_read_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf = Shelf([tmp_path / "a"], open_file=InMemory)
    assert shelf.write(range(20)).all()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # as on a file system that is full
        for turn in range(12):
            assert not shelf.write([500 + turn]).any()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert shelf.store.stats()[0].state == "read-only"
    assert "index.db" in caplog.text
    assert shelf.read(range(20)).all()
    shelf.check()
    shelf.store.close()


@contextlib.contextmanager
def hanging(call: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This call of a SlotIndex does not return as long as this lasts, where its disk is the one at `directory`."""
    stock, answers = getattr(SlotIndex, call), threading.Event()

    def hang(self: SlotIndex, *arguments: object) -> None:
        if self._path.parent == directory:
            answers.wait()
        stock(self, *arguments)

    monkeypatch.setattr(SlotIndex, call, hang)
    yield
    answers.set()


@pytest.mark.parametrize("first", ["write", "forget"])
def test_an_index_that_hangs_is_waited_for_once_and_its_disk_is_still_read(
    tmp_path: Path, first: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stock = TimedCall.call

    def for_ever_the_second_time(self: TimedCall, function: Callable[[], None], timeout_s: float) -> None:
        stock(self, function, 1e6 if self.hangs else timeout_s)

    monkeypatch.setattr("polder.diskstore.disk._LEAST_PATIENCE_S", 1.0)
    monkeypatch.setattr(TimedCall, "call", for_ever_the_second_time)
    shelf, _ = two_disks(tmp_path, timeout_s=1.0)
    with hanging("store", tmp_path / "a", monkeypatch):
        started = time.monotonic()
        if first == "write":
            assert shelf.write(range(300, 310), disks=[0] * 5 + [1] * 5).tolist() == [False] * 5 + [True] * 5
        else:
            assert shelf.store.forget(names(range(10))) == 10
        assert time.monotonic() - started < 30
        assert shelf.store.states == ("read-only", "ok")
        assert "read-only: writing the index: no answer for 1 s" in caplog.text
        ok = shelf.read(range(10, 100))
        assert ok.all()
        assert shelf.wrong(range(10, 100), ok) == 0
        assert shelf.store.forget(names(range(10, 20))) == 10, "though they may come back with the next start"
        assert not shelf.read(range(10, 20)).any()
        assert shelf.write(range(400, 420)).all()
        assert not shelf.store.lookup(names(range(400, 420))).present[:, 0].any()
        shelf.check()
    until = time.monotonic() + 60
    while any(t.name == "polder-disk0-call" for t in threading.enumerate()) and time.monotonic() < until:
        time.sleep(0.01)
    assert shelf.store.forget(names([20])) == 1, "and now all of it is noted"
    shelf.store.close()
    again = Shelf([tmp_path / "a", tmp_path / "b"])
    ok = again.read(range(100))
    assert again.wrong(range(100), ok) == 0
    assert not ok[10:21].any()
    assert ok[21:].all()
    assert again.store.states == ("ok", "ok")
    again.check()
    again.store.close()


@pytest.mark.parametrize("call", ["store", "close"])
def test_a_store_is_closed_though_a_disk_hangs(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("polder.diskstore.disk._LEAST_PATIENCE_S", 1.0)
    shelf, _ = two_disks(tmp_path, timeout_s=1.0)
    assert shelf.read(range(100)).all()
    with hanging(call, tmp_path / "a", monkeypatch):
        started = time.monotonic()
        shelf.store.close()
        assert time.monotonic() - started < 30
        assert "not closed: no answer for 1 s" in caplog.text
        again = Shelf([tmp_path / "a", tmp_path / "b"])
        assert again.store.states == ("out", "ok"), "a directory that may still be written to is in use"
        again.store.close()


def test_when_no_thread_can_be_had_the_index_is_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at the end of the interpreter."""
    shelf, _ = two_disks(tmp_path)

    def refuse_to_start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse_to_start)
        assert shelf.store.forget(names(range(10))) == 10
        shelf.store.close()
    again = Shelf([tmp_path / "a", tmp_path / "b"])
    assert again.read(range(100)).tolist() == [False] * 10 + [True] * 90
    again.store.close()
