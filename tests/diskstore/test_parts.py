"""Pages that are read in parts: each part is vouched for by itself, and a page with a bad part is a bad page."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from polder.diskstore.aio import AioEngine
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.io import IoEngine, Outcome, PageFile, Transfer, open_page_file
from polder.diskstore.pieces import one_a_page, worst
from tests.diskstore.pages import PAGE, PART, PARTS, Shelf, names, shelf_of_parts


def slab_of(shelf: Shelf, disk: int = 0) -> np.ndarray:
    """[slots, parts, bytes]"""
    return np.memmap(shelf.directories[disk] / "slab", np.uint8).reshape(-1, PARTS, PART)


# ---------------------------------------------------------------- bytes that change


def flip(page: np.ndarray, part: int, chance: np.random.Generator, _: np.ndarray) -> None:
    page[part, chance.integers(PART)] ^= 1 << chance.integers(8)


def tear(page: np.ndarray, part: int, chance: np.random.Generator, _: np.ndarray) -> None:
    page[part, chance.integers(1, 8) * 512 :] = 0xAA


def misdirect_a_part(page: np.ndarray, part: int, _: np.random.Generator, __: np.ndarray) -> None:
    page[part] = page[(part + 1) % PARTS]


def misdirect_a_page(page: np.ndarray, part: int, _: np.random.Generator, other: np.ndarray) -> None:
    page[part] = other[part]


def lose(page: np.ndarray, part: int, _: np.random.Generator, __: np.ndarray) -> None:
    page[part] = 0


KINDS = (flip, tear, misdirect_a_part, misdirect_a_page, lose)


@pytest.mark.parametrize("engine", [ThreadEngine, AioEngine])
def test_a_corrupt_part_is_a_miss_its_page_is_dropped_and_parts_of_other_pages_are_served(
    tmp_path: Path, engine: type[IoEngine]
) -> None:
    shelf, chance = shelf_of_parts(tmp_path / "a", engine=engine()), np.random.default_rng(0)
    assert shelf.write(range(160)).all()
    slots, slab = shelf.store.lookup(names(range(160))).slots[:, 0], slab_of(shelf)
    parts = chance.integers(0, PARTS, 160)
    for number in range(0, 160, 2):
        KINDS[number // 2 % 5](slab[slots[number]], int(parts[number]), chance, slab[slots[number + 1]])
    slab.flush()
    beside = (parts + 1) % PARTS
    ok = shelf.read_parts(range(160), beside.tolist())
    assert ok.all(), "of a page with a bad part the others verify"
    assert shelf.wrong_parts(range(160), beside.tolist(), ok) == 0
    ok = shelf.read_parts(range(160), parts.tolist())
    assert ok.tolist() == [False, True] * 80
    assert shelf.wrong_parts(range(160), parts.tolist(), ok) == 0
    assert shelf.store.lookup(names(range(160))).present[:, 0].tolist() == [False, True] * 80
    stats = shelf.store.stats()[0]
    assert (stats.corrupt_pages, stats.failed_reads, stats.state) == (80, 0, "ok")
    shelf.check()
    shelf.store.close()


def test_of_a_page_that_is_read_whole_every_part_has_to_verify(tmp_path: Path) -> None:
    shelf = shelf_of_parts(tmp_path / "a")
    assert shelf.write(range(PARTS + 1)).all()
    slab = slab_of(shelf)
    slots = shelf.store.lookup(names(range(PARTS))).slots[:, 0]
    slab[slots, np.arange(PARTS), 100] ^= 1
    slab.flush()
    ok = shelf.read(range(PARTS + 1))
    assert ok.tolist() == [False] * PARTS + [True]
    assert shelf.wrong(range(PARTS + 1), ok) == 0
    assert shelf.store.stats()[0].corrupt_pages == PARTS
    shelf.store.close()


def test_parts_that_change_places_within_their_page_do_not_verify(tmp_path: Path) -> None:
    shelf = shelf_of_parts(tmp_path / "a")
    assert shelf.write(range(2)).all()
    slab, slot = slab_of(shelf), int(shelf.store.lookup(names([0])).slots[0, 0])
    slab[slot] = slab[slot, ::-1].copy()
    slab.flush()
    assert not shelf.read_parts([0] * PARTS, range(PARTS)).any()
    assert shelf.store.stats()[0].corrupt_pages == 1, "it is one page"
    assert shelf.read_parts([1] * PARTS, range(PARTS)).all()
    shelf.check()
    shelf.store.close()


def test_in_one_batch_sound_parts_of_a_page_are_served_and_the_page_is_dropped(tmp_path: Path) -> None:
    shelf = shelf_of_parts(tmp_path / "a")
    assert shelf.write(range(3)).all()
    slab, slot = slab_of(shelf), int(shelf.store.lookup(names([1])).slots[0, 0])
    slab[slot, 4, 0] ^= 1
    slab.flush()
    numbers, parts = [1, 1, 1, 0, 2], [5, 4, 3, 4, 4]
    ok = shelf.read_parts(numbers, parts)
    assert ok.tolist() == [True, False, True, True, True]
    assert shelf.wrong_parts(numbers, parts, ok) == 0
    assert shelf.store.lookup(names(range(3))).present[:, 0].tolist() == [True, False, True]
    shelf.check()
    assert shelf.write([1]).all()
    assert shelf.read_parts(numbers, parts).all()
    shelf.store.close()


def test_a_bad_part_is_read_from_another_copy(tmp_path: Path) -> None:
    shelf = shelf_of_parts(tmp_path / "a", tmp_path / "b")
    for disk in (0, 1):
        assert shelf.write(range(20), disks=[disk] * 20).all()
    slab = slab_of(shelf)
    slab[shelf.store.lookup(names(range(20))).slots[:10, 0], 7] = 0
    slab.flush()
    numbers, parts = [n for n in range(20) for _ in range(3)], [6, 7, 8] * 20
    ok = shelf.read_parts(numbers, parts, disks=[0] * 60)
    assert ok.all()
    assert shelf.wrong_parts(numbers, parts, ok) == 0
    assert shelf.store.lookup(names(range(20))).present.tolist() == [[False, True]] * 10 + [[True, True]] * 10
    assert not shelf.read_parts([1], [7], disks=[-1]).any(), "-1: not asked for"
    shelf.check()
    shelf.store.close()


# ---------------------------------------------------------------- faults


class Scratched:
    """A slab of which some bytes cannot be read."""

    alignment_bytes = 4096

    def __init__(self, path: Path, bad: Sequence[int]) -> None:
        self._inner, self._bad = open_page_file(path), bad

    def preadv(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        if any(offset <= at < offset + sum(map(len, buffers)) for at in self._bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._inner.preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        if any(offset <= at < offset + sum(map(len, buffers)) for at in self._bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return self._inner.pwritev(buffers, offset)

    def close(self) -> None:
        self._inner.close()


def scratched(bad: Sequence[int]) -> Callable[[Path], PageFile]:
    return lambda path: Scratched(path, bad)


def test_a_page_of_which_no_part_can_be_read_is_one_failed_page(tmp_path: Path) -> None:
    shelf = shelf_of_parts(tmp_path / "a")
    assert shelf.write(range(4)).all()
    slot = int(shelf.store.lookup(names([2])).slots[0, 0])
    shelf.store.close()
    bad = [slot * PAGE + part * PART for part in range(PARTS)]
    shelf = Shelf([tmp_path / "a"], open_file=scratched(bad), parts=PARTS)
    numbers, parts = [n for n in range(4) for _ in range(PARTS)], [*range(PARTS)] * 4
    ok = shelf.read_parts(numbers, parts)
    assert ok.tolist() == [number != 2 for number in numbers]
    stats = shelf.store.stats()[0]
    assert (stats.failed_reads, stats.read_pages, stats.corrupt_pages, stats.state) == (1, 3, 0, "ok")
    assert not shelf.store.lookup(names([2])).present.any()
    shelf.store.close()


def test_a_slot_of_which_one_part_cannot_be_written_is_not_used_again(tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / "a"], open_file=scratched([2 * PAGE + 5 * PART]), parts=PARTS)
    room = int(shelf.store.room[0])
    assert shelf.write(range(4)).sum() == 3
    assert shelf.store.room[0] == room - 1
    assert shelf.write(range(4)).all(), "the next time it gets another one"
    assert shelf.read(range(4)).all()
    shelf.check()
    shelf.store.close()


class Meddling(ThreadEngine):
    """Reports these errors of the first pieces."""

    errors: Sequence[int] = ()

    def read(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        return self._meddled(super().read(transfers, timeout_s))

    def write(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        return self._meddled(super().write(transfers, timeout_s))

    def _meddled(self, outcomes: list[Outcome]) -> list[Outcome]:
        outcomes[0].errors[: len(self.errors)] = self.errors
        return outcomes


def test_a_page_with_late_parts_stays_unless_another_part_is_bad(tmp_path: Path) -> None:
    engine = Meddling()
    shelf = shelf_of_parts(tmp_path / "a", engine=engine)
    assert shelf.write([0]).all()
    engine.errors = [errno.ETIMEDOUT] * 3
    assert not shelf.read([0]).any()
    assert shelf.read_parts([0] * 5, range(5)).tolist() == [False] * 3 + [True] * 2
    assert shelf.store.stats()[0].timeouts == 2, "pages, each batch"
    assert shelf.store.lookup(names([0])).present.all()
    slab_of(shelf)[shelf.store.lookup(names([0])).slots[0, 0], 9, 0] ^= 1
    assert not shelf.read([0]).any()
    stats = shelf.store.stats()[0]
    assert (stats.timeouts, stats.failed_reads, stats.corrupt_pages) == (2, 2, 1)
    assert not shelf.store.lookup(names([0])).present.any()
    room = int(shelf.store.room[0])
    engine.errors = [errno.ETIMEDOUT, errno.EIO, errno.ETIMEDOUT]
    assert not shelf.write([1]).any()
    assert shelf.store.room[0] == room - 1, "its slot is bad, whatever took too long"
    shelf.check()
    shelf.store.close()


def test_a_page_of_which_a_part_was_read_is_evicted_later(tmp_path: Path) -> None:
    shelf = shelf_of_parts(tmp_path / "a", limit_bytes=4 << 20)
    slots = shelf.store.stats()[0].slots
    assert shelf.write(range(slots)[::-1]).all()  # the last in a batch goes first
    assert shelf.read_parts([0, 1, 1], [3, 3, 4]).all()
    assert shelf.write([1000, 1001]).all()
    gone = ~shelf.store.lookup(names(range(slots))).present[:, 0]
    assert np.flatnonzero(gone).tolist() == [2, 3]
    shelf.store.close()


def test_of_a_row_the_worst_piece_counts_and_of_a_page_the_worst_row() -> None:
    late, full, spoiled = errno.ETIMEDOUT, errno.ENOSPC, errno.EIO
    pieces = np.array([[0, 0, 0], [0, late, 0], [late, full, 0], [full, late, spoiled]], dtype=np.int32)
    assert worst(pieces).tolist() == [0, late, full, spoiled]
    slots, errors = np.array([9, 5, 9, 5, 9, 7]), np.array([0, late, 0, full, spoiled, 0], dtype=np.int32)
    torn = np.array([True, False, False, False, False, False])
    assert np.flatnonzero(one_a_page(slots, errors, torn)).tolist() == [0, 3, 5]
