"""Threads and kernel AIO move the same bytes, report the same errors, and name the memory that may still change."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import xxhash

from polder.diskstore import aio
from polder.diskstore.aio import AioEngine
from polder.diskstore.engine import LEAST_RUN_BYTES, RUN_BYTES, RUN_PIECES, ThreadEngine, side_by_side
from polder.diskstore.io import Arena, DirectFile, IoEngine, Transfer, open_page_file
from polder.errors import EnvironmentFault
from tests.diskstore.pages import PAGE, Shelf

PAGES = 96


@pytest.fixture(params=[ThreadEngine, AioEngine])
def engine(request: pytest.FixtureRequest, no_fd_leak: None) -> Iterator[IoEngine]:
    made = request.param()
    yield made
    made.close()


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[DirectFile]]:
    for name in "ab":
        (tmp_path / name).write_bytes(bytes(PAGES * PAGE))
    opened = [open_page_file(tmp_path / name) for name in "ab"]
    yield opened
    for file in opened:
        file.close()


def transfer(disk: int, file: DirectFile, slots: list[int], addresses: np.ndarray) -> Transfer:
    return Transfer(
        disk=disk,
        file=file,
        piece_bytes=PAGE,
        offsets=np.array(slots) * PAGE,
        addresses=addresses[: len(slots)],
        memory=addresses[: len(slots)],
        seeds=np.array(slots, dtype=np.uint64),
    )


def test_what_was_written_is_read_and_both_are_summed(engine: IoEngine, files: list[DirectFile]) -> None:
    chance = np.random.default_rng(0)
    source, target = Arena(2 * PAGES, PAGE), Arena(2 * PAGES, PAGE)
    source.bytes[:] = chance.integers(0, 256, source.bytes.shape, dtype=np.uint8)
    orders = [chance.permutation(PAGES).tolist(), list(range(PAGES))]  # single pages, and runs

    def both(memory: Arena) -> list[Transfer]:
        return [transfer(disk, files[disk], orders[disk], memory.addresses[disk * PAGES :]) for disk in (0, 1)]

    written, read = engine.write(both(source), 20.0), engine.read(both(target), 20.0)
    assert np.array_equal(source.bytes, target.bytes)
    for disk in (0, 1):
        sums = [
            xxhash.xxh3_64_intdigest(source.bytes[disk * PAGES + row], slot) for row, slot in enumerate(orders[disk])
        ]
        assert written[disk].digests.tolist() == read[disk].digests.tolist() == sums
        assert not written[disk].errors.any()
        assert not read[disk].errors.any()
    assert engine.read([], 1.0) == []
    assert len(engine.unsettled()) == 0


def test_every_disk_is_timed_from_the_start_of_the_batch_to_its_own_end(
    engine: IoEngine, files: list[DirectFile]
) -> None:
    target = Arena(PAGES, PAGE)
    started = time.monotonic()
    outcomes = engine.read(
        [
            transfer(0, files[0], [1], target.addresses[-1:]),
            transfer(1, files[1], list(range(PAGES - 1)), target.addresses),
        ],
        20.0,
    )
    took = time.monotonic() - started
    assert all(0 < outcome.seconds <= took for outcome in outcomes)


def test_the_speeds_of_disks_are_measured(engine: IoEngine, tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / "a", tmp_path / "b"], engine=engine)
    assert shelf.write(range(40)).all()
    assert shelf.read(range(40)).all()
    assert (shelf.store.speeds > 0).all()
    shelf.store.close()


def test_of_a_run_only_the_bad_pages_fail(engine: IoEngine, files: list[DirectFile]) -> None:
    os.truncate(files[0].fd, 10 * PAGE)
    target = Arena(16, PAGE)
    outcome = engine.read([transfer(0, files[0], list(range(4, 16)), target.addresses)], 20.0)[0]
    assert outcome.errors.tolist() == [0] * 6 + [errno.EIO] * 6


def test_memory_that_is_not_aligned_is_moved_all_the_same(engine: IoEngine, files: list[DirectFile]) -> None:
    wild = np.zeros(4 * PAGE + 8, dtype=np.uint8)
    addresses = wild.ctypes.data + 8 + np.arange(4) * PAGE
    wild[8:] = 7
    assert not engine.write([transfer(0, files[0], [5, 6, 7, 9], addresses)], 20.0)[0].errors.any()
    wild[:] = 0
    assert not engine.read([transfer(0, files[0], [7, 9, 5, 6], addresses)], 20.0)[0].errors.any()
    assert (wild[8:] == 7).all()


def test_what_is_not_done_in_time_is_named_until_it_is(engine: IoEngine, files: list[DirectFile]) -> None:
    target = Arena(PAGES, PAGE)
    outcome = engine.read([transfer(0, files[0], list(range(0, PAGES, 2)), target.addresses)], 0.0)[0]
    assert set(outcome.errors.tolist()) <= {0, errno.ETIMEDOUT}
    assert (outcome.errors == errno.ETIMEDOUT).any()
    assert np.isin(engine.unsettled(), target.addresses).all()
    until = time.monotonic() + 60
    while len(engine.unsettled()) and time.monotonic() < until:
        time.sleep(0.001)
    assert len(engine.unsettled()) == 0
    assert not engine.read([transfer(0, files[0], [1, 2, 3], target.addresses)], 20.0)[0].errors.any()


def test_a_file_that_is_closed_is_an_error_of_every_page(engine: IoEngine, tmp_path: Path) -> None:
    (tmp_path / "c").write_bytes(bytes(4 * PAGE))
    file = open_page_file(tmp_path / "c")
    file.close()
    target = Arena(2, PAGE)
    outcome = engine.read([transfer(0, file, [0, 2], target.addresses)], 20.0)[0]
    assert outcome.errors.tolist() == [errno.EBADF] * 2


def test_runs_leave_something_for_every_worker() -> None:
    offsets = [page * LEAST_RUN_BYTES for page in (0, 1, 2, 3, 9, 10, 20)]
    assert side_by_side(offsets, LEAST_RUN_BYTES, 1) == [(0, 4), (4, 6), (6, 7)]
    assert side_by_side(offsets, LEAST_RUN_BYTES, 4) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert side_by_side([], PAGE, 4) == []
    long = side_by_side([page * PAGE for page in range(100)], PAGE, 1)
    assert max(end - first for first, end in long) == RUN_PIECES


@pytest.mark.parametrize("piece_bytes", [4096, 16 << 10, 48 << 10, 1 << 20])
def test_a_run_of_small_pieces_is_as_long_as_one_of_pages(piece_bytes: int) -> None:
    offsets = [piece * piece_bytes for piece in range(1000)]
    longest = max(end - first for first, end in side_by_side(offsets, piece_bytes, 1))
    assert longest == max(RUN_PIECES, RUN_BYTES // piece_bytes) <= os.sysconf("SC_IOV_MAX")
    few = side_by_side(offsets[:200], piece_bytes, 1000)
    assert {end - first for first, end in few[:-1]} == {max(1, LEAST_RUN_BYTES // piece_bytes)}, (
        "idle workers cut no shorter"
    )


def test_a_kernel_without_aio_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aio, "_MACHINE", "pdp11")
    with pytest.raises(EnvironmentFault, match="not known on pdp11: use the engine of threads"):
        AioEngine()
    monkeypatch.setattr(aio, "_MACHINE", "x86_64")
    monkeypatch.setitem(aio._CALLS, "x86_64", (1 << 20, 0, 0, 0))  # no such call, as where a profile forbids it
    with pytest.raises(EnvironmentFault, match="Function not implemented"):
        AioEngine()


def test_when_the_system_has_no_more_contexts_threads_do_it(
    files: list[DirectFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AioEngine()
    engine.close()
    monkeypatch.setattr(aio, "_MACHINE", "pdp11")
    target = Arena(2, PAGE)  # named, because its memory ends with it
    assert not engine.read([transfer(0, files[0], [1, 2], target.addresses)], 20.0)[0].errors.any()
    engine.close()


def test_a_file_system_without_direct_access_is_read_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def refuse(path: object, flags: int, *mode: int, **more: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return opened(path, flags, *mode, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("polder.diskstore.io.os.open", refuse)
    shelf = Shelf([tmp_path / "a"], engine=AioEngine())
    assert shelf.write(range(20)).all()
    ok = shelf.read(range(20))
    assert ok.all()
    assert shelf.wrong(range(20), ok) == 0
    shelf.store.close()
