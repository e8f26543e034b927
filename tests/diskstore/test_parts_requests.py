"""Parts of pages and the engines: which requests they make, how fast they are said to be, whose memory they use."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from polder.diskstore import aio
from polder.diskstore.aio import AioEngine
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.io import Arena, Transfer, open_page_file
from polder.diskstore.keys import page_seeds
from polder.diskstore.model import DiskModel
from polder.diskstore.pieces import PageFormat
from polder.emulation.disks import EmulatedDisk, EmulatedEngine, VirtualClock
from tests.diskstore.pages import PAGE, PART, PARTS, Shelf, content, names, shelf_of_parts
from tests.emulation.files import emulated_files

FAST = DiskModel(bytes_per_s=1e12, latency_s=0.0)


def test_side_by_side_parts_are_one_request_and_speeds_count_pages(tmp_path: Path) -> None:
    emulated = EmulatedDisk(DiskModel(bytes_per_s=PAGE * 1000, latency_s=0.0), clock=VirtualClock())
    shelf = shelf_of_parts(tmp_path / "a", engine=EmulatedEngine(ThreadEngine(), [emulated]))
    assert shelf.write(range(40)).all()
    assert emulated.requests == 3, "of 16 pages at most: 256 parts are as long"

    def served(numbers: Sequence[int], parts: Sequence[int]) -> tuple[int, int]:
        before = emulated.requests, emulated.served_bytes
        ok = shelf.read_parts(numbers, parts)
        assert ok.all()
        assert shelf.wrong_parts(numbers, parts, ok) == 0
        return emulated.requests - before[0], (emulated.served_bytes - before[1]) // PART

    order = shelf.store.lookup(names(range(40))).slots[:, 0].argsort().tolist()
    assert served([3] * 6, [4, 2, 3, 7, 6, 5]) == (1, 6)
    assert served([3] * 5, [0, 1, 3, 14, 15]) == (3, 5)
    assert served([order[8], order[9], order[9], order[11]], [15, 0, 1, 2]) == (2, 4), "over the borders of pages, too"
    assert served([5, 5, 6, 5], [2, 2, 9, 2]) == (4, 4), "what is asked for twice is read twice"
    assert shelf.store.speeds[0] == pytest.approx(1000)
    assert shelf.read(range(40)).all()
    assert shelf.store.speeds[0] == pytest.approx(1000)
    shelf.store.close()


class Counted:
    """A slab that counts the calls."""

    alignment_bytes = 4096

    def __init__(self, path: Path, calls: list[int]) -> None:
        self._inner, self._calls = open_page_file(path), calls

    def preadv(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        self._calls.append(sum(map(len, buffers)))
        return self._inner.preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        return self._inner.pwritev(buffers, offset)

    def close(self) -> None:
        self._inner.close()


def test_threads_that_are_idle_do_not_cut_a_page_or_a_run_of_its_parts(tmp_path: Path) -> None:
    calls: list[int] = []
    shelf = Shelf([tmp_path / "a"], open_file=lambda path: Counted(path, calls), parts=PARTS)
    assert shelf.write(range(4)).all()
    assert shelf.read([2]).all()
    assert shelf.read_parts([1] * 10, range(3, 13)).all()
    assert calls == [PAGE, 10 * PART]
    shelf.store.close()


def test_memory_that_is_not_aligned_takes_parts_too(tmp_path: Path) -> None:
    shelf = shelf_of_parts(tmp_path / "a")
    assert shelf.write(range(3)).all()
    wild = np.zeros((6, PART + 24), dtype=np.uint8)
    addresses = wild.ctypes.data + 24 + np.arange(6) * (PART + 24)
    places = shelf.store.lookup(names([0, 0, 1, 2, 2, 1]))
    parts = np.array([0, 1, 15, 8, 8, 14])
    assert shelf.store.read(places, addresses, parts=parts).all()
    for row, (number, part) in enumerate(zip([0, 0, 1, 2, 2, 1], parts.tolist(), strict=True)):
        assert np.array_equal(wild[row, 24:], content(number)[part * PART :][:PART])
    whole = np.zeros(PAGE + 8, dtype=np.uint8)
    assert shelf.store.read(shelf.store.lookup(names([1])), np.array([whole.ctypes.data + 8])).all()
    assert np.array_equal(whole[8:], content(1))
    shelf.store.close()


def test_memory_of_a_page_is_named_by_its_address_while_any_part_of_it_may_change(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    emulated = EmulatedDisk(FAST)
    opener = emulated_files({tmp_path / "a": emulated})
    shelf = Shelf([tmp_path / "a"], open_file=opener, timeout_s=0.2, parts=PARTS)
    assert shelf.write(range(40)).all()
    emulated.hang()
    assert not shelf.read(range(40)).any()
    held = shelf.store.unsettled()
    assert 0 < len(held) == len(np.unique(held)) <= 40
    assert np.isin(held, shelf.target.addresses).all()
    assert shelf.store.stats()[0].timeouts == 40, "pages"
    emulated.recover()
    until = time.monotonic() + 60
    while len(shelf.store.unsettled()) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(shelf.store.unsettled()) == 0
    shelf.store.close()


def test_what_the_kernel_has_of_a_page_is_named_by_the_pages_address(tmp_path: Path) -> None:
    (tmp_path / "slab").write_bytes(bytes(64 * PAGE))
    file, target, engine = open_page_file(tmp_path / "slab"), Arena(64, PAGE), AioEngine()
    keys, generations = names(range(64)), np.ones(64, dtype=np.uint64)
    slots = np.random.default_rng(0).permutation(64)
    pages = PageFormat(page_bytes=PAGE, parts=PARTS, namespace=1)
    call = aio._Call(
        engine._idle[0], [pages.transfer(0, file, slots, keys, generations, target.addresses)], aio._PREADV
    )
    call.submit()
    held = call.memory_in_flight()
    assert len(held) > PARTS
    assert np.isin(held, target.addresses).all()
    while call.submit():
        call.reap(1, 1.0)
    assert len(call.memory_in_flight()) == 0
    engine.close()
    file.close()


def test_seeds_of_parts_differ_and_that_of_a_page_of_one_part_is_the_pages(tmp_path: Path) -> None:
    keys, generations = names(range(500)), np.arange(500, dtype=np.uint64)
    slots, addresses = np.arange(500), np.arange(500) * PAGE
    (tmp_path / "slab").write_bytes(bytes(4096))
    file = open_page_file(tmp_path / "slab")

    def transfer(parts: int, chosen: np.ndarray | None = None) -> Transfer:
        pages = PageFormat(page_bytes=PAGE, parts=parts, namespace=7)
        return pages.transfer(0, file, slots, keys, generations, addresses, chosen)

    assert np.array_equal(transfer(1).seeds, page_seeds(keys, generations, 7))
    whole = transfer(PARTS)
    assert len(np.unique(whole.seeds)) == 500 * PARTS
    assert np.array_equal(whole.offsets, np.arange(500 * PARTS) * PART)
    assert np.array_equal(whole.addresses, whole.offsets)
    for part in range(PARTS):
        one = transfer(PARTS, np.full(500, part))
        assert np.array_equal(one.seeds, whole.seeds[part::PARTS])
        assert np.array_equal(one.offsets, whole.offsets[part::PARTS])
        assert np.array_equal(one.memory, addresses)
    file.close()
