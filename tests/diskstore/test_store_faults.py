"""Whatever happens to its disks, the store gives the right bytes or none, and goes on."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from polder.diskstore.aio import AioEngine
from polder.diskstore.config import DiskConfig, StoreConfig
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.io import IoEngine, PageFile, open_page_file
from polder.diskstore.store import DiskStore
from polder.emulation.disks import DiskFaults, EmulatedDisk
from tests.diskstore.pages import FAST, PAGE, Shelf, content, names, two_disks, write_until_killed
from tests.emulation.files import emulated_files

# ---------------------------------------------------------------- bytes that change


def flip(page: np.ndarray, chance: np.random.Generator, _: np.ndarray) -> None:
    page[chance.integers(PAGE)] ^= 1 << chance.integers(8)


def tear(page: np.ndarray, chance: np.random.Generator, _: np.ndarray) -> None:
    page[chance.integers(1, 128) * 512 :] = 0xAA


def misdirect(page: np.ndarray, _: np.random.Generator, other: np.ndarray) -> None:
    page[:] = other


def lose_a_block(page: np.ndarray, chance: np.random.Generator, _: np.ndarray) -> None:
    at = chance.integers(16) * 4096
    page[at : at + 4096] = 0


def swap_sectors(page: np.ndarray, _: np.random.Generator, __: np.ndarray) -> None:
    page[:1024] = np.roll(page[:1024], 512)


KINDS = (flip, tear, misdirect, lose_a_block, swap_sectors)


@pytest.mark.parametrize("engine", [ThreadEngine, AioEngine])
def test_a_thousand_corrupt_pages_are_a_thousand_misses(tmp_path: Path, engine: type[IoEngine]) -> None:
    shelf = Shelf([tmp_path / "a", tmp_path / "b"], 48 << 20, engine=engine())
    chance = np.random.default_rng(0)
    numbers = np.arange(1200)
    for at in range(0, 1200, 200):
        assert shelf.write(numbers[at : at + 200].tolist()).all()
    places = shelf.store.lookup(names(numbers.tolist()))
    slabs = [np.memmap(tmp_path / name / "slab", np.uint8).reshape(-1, PAGE) for name in "ab"]
    spoiled = chance.permutation(1200)[:1000]
    where = {int(n): (int(places.present[n].argmax()), int(places.slots[n].max())) for n in range(1200)}
    for index, number in enumerate(spoiled.tolist()):
        disk, slot = where[number]
        KINDS[index % 5](slabs[disk][slot], chance, content((number + 1) % 1200))
    for slab in slabs:
        slab.flush()
    fine = wrong = 0
    for at in range(0, 1200, 200):
        part = numbers[at : at + 200].tolist()
        ok = shelf.read(part)
        fine += int(ok.sum())
        wrong += shelf.wrong(part, ok)
        assert not np.intersect1d(np.array(part)[ok], spoiled).size
    assert (fine, wrong) == (200, 0)
    assert sum(s.corrupt_pages for s in shelf.store.stats()) == 1000
    assert all(s.state == "ok" for s in shelf.store.stats()), "bad pages are no bad disk"
    assert shelf.store.lookup(names(numbers.tolist())).present.sum() == 200, "and are looked for once"
    shelf.check()
    shelf.store.close()


def test_an_index_that_is_older_than_the_slab_gives_no_stale_page(tmp_path: Path) -> None:
    """As after a loss of power: the last commits are gone, their slots are in use again."""
    shelf = Shelf([tmp_path / "a"], 4 << 20)
    slots = shelf.store.stats()[0].slots
    assert shelf.write(range(slots)).all()
    shelf.store.close()
    shutil.copy(tmp_path / "a" / "index.db", tmp_path / "old.db")
    shelf = Shelf([tmp_path / "a"], 4 << 20)
    assert shelf.write(range(100, 110)).all()
    shelf.store.forget(names([0]))
    assert shelf.write([0], 7).all()
    shelf.store.close()
    shutil.copy(tmp_path / "old.db", tmp_path / "a" / "index.db")
    shelf = Shelf([tmp_path / "a"], 4 << 20)
    ok = shelf.read(range(slots))
    assert shelf.wrong(range(slots), ok) == 0
    assert slots - 13 < ok.sum() < slots
    assert not shelf.read(range(100, 110)).any()
    shelf.store.close()


@pytest.mark.parametrize("damage", ["zeroes", "cut", "gone", "noise", "another disk's", "one page"])
def test_a_damaged_index_costs_pages_only(tmp_path: Path, damage: str) -> None:
    shelf = Shelf([tmp_path / "a"], 64 << 20)
    for at in range(0, 900, 150):
        assert shelf.write(range(at, at + 150)).all()
    shelf.store.close()
    index = tmp_path / "a" / "index.db"
    data = bytearray(index.read_bytes())
    if damage == "gone":
        index.unlink()
    elif damage == "another disk's":
        Shelf([tmp_path / "b"], 64 << 20).store.close()
        shutil.copy(tmp_path / "b" / "index.db", index)
    else:
        half = len(data) // 8192 * 4096
        if damage == "one page":
            data[half : half + 4096] = os.urandom(4096)
        elif damage == "zeroes":
            data[:] = bytes(len(data))
        elif damage == "cut":
            del data[half:]
        else:
            data[:] = os.urandom(len(data))
        index.write_bytes(data)
    shelf = Shelf([tmp_path / "a"], 64 << 20)
    kept = 0
    for at in range(0, 900, 150):
        ok = shelf.read(range(at, at + 150))
        assert shelf.wrong(range(at, at + 150), ok) == 0
        kept += int(ok.sum())
    assert kept == (800 if damage == "one page" else 0)
    assert shelf.write(range(2000, 2100)).all()
    assert shelf.read(range(2000, 2100)).all()
    shelf.check()
    shelf.store.close()


# ---------------------------------------------------------------- kill -9


def test_twenty_kills_in_the_middle_of_writing_leave_no_wrong_page(tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    chance = np.random.default_rng(3)
    found = 0
    for turn in range(20):
        write_until_killed(directories, seed=turn, parts=1, after_s=chance.uniform(0.0, 0.15))
        shelf = Shelf(directories, 8 << 20)
        present = shelf.store.lookup(names(range(300))).present.any(axis=1)
        for at in range(0, 300, 150):
            ok = shelf.read(range(at, at + 150))
            assert shelf.wrong(range(at, at + 150), ok) == 0
            found += int(ok.sum())
            # At most the slots that were being written, whose old records the index still had.
            assert (present[at : at + 150] & ~ok).sum() <= 16
        assert all(s.state == "ok" for s in shelf.store.stats())
        shelf.check()
        shelf.store.close()
    assert found > 1000


# ---------------------------------------------------------------- disks that refuse


def settled(shelf: Shelf) -> None:
    """Returns when nothing hangs any more."""
    until = time.monotonic() + 60
    while len(shelf.store.unsettled()) and time.monotonic() < until:
        time.sleep(0.01)
    assert len(shelf.store.unsettled()) == 0


def test_a_disk_that_dies_loses_its_own_pages_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shelf, emulated = two_disks(tmp_path)
    emulated.die()
    ok = shelf.read(range(100))
    assert ok.tolist() == [False] * 40 + [True] * 60, "twenty came from their copies"
    assert shelf.wrong(range(100), ok) == 0
    assert "out: reading: Input/output error" in caplog.text
    a, b = shelf.store.stats()
    assert (a.state, a.reason, b.state) == ("out", "reading: Input/output error", "ok")
    assert not shelf.store.lookup(names(range(100))).present[:, 0].any()
    assert shelf.write(range(100)).all(), "what it had is written elsewhere"
    assert shelf.read(range(100)).all()
    shelf.check()
    shelf.store.close()


def test_a_few_errors_are_misses_and_the_disk_stays(tmp_path: Path) -> None:
    shelf, _ = two_disks(tmp_path)
    shelf.store.close()
    failing = EmulatedDisk(FAST, DiskFaults(fail=0.04, seed=2))
    shelf = Shelf([tmp_path / "a", tmp_path / "b"], open_file=emulated_files({tmp_path / "a": failing}))
    ok = np.concatenate([shelf.read([n, n + 40]) for n in range(0, 60, 2)])
    stats = shelf.store.stats()[0]
    assert 0 < stats.failed_reads < 8
    assert stats.state == "ok"
    assert ok.sum() >= len(ok) - stats.failed_reads
    shelf.check()
    shelf.store.close()


def test_a_disk_that_hangs_holds_nobody_up_and_its_memory_is_named(tmp_path: Path) -> None:
    shelf, emulated = two_disks(tmp_path, timeout_s=1.0)
    emulated.hang()
    started = time.monotonic()
    ok = shelf.read(range(100))
    assert time.monotonic() - started < 30
    held = shelf.store.unsettled()
    assert 0 < len(held) <= 60
    assert np.isin(held, shelf.target.addresses).all()
    assert ok.tolist() == [False] * 40 + (~np.isin(shelf.target.addresses[40:100], held)).tolist()
    assert ok[60:].all()
    assert shelf.store.stats()[0].state == "out"
    places, others = shelf.store.lookup(names(range(40, 100))), shelf.source.addresses[:60]
    assert shelf.store.read(places, others).all(), "the other disk's threads are free, and it has twenty copies"
    assert not shelf.read(range(40, 50)).any(), "what hangs may write here"
    emulated.recover()
    settled(shelf)
    shelf.store.close()


def test_a_read_that_lands_late_changes_no_page_that_was_vouched_for(tmp_path: Path) -> None:
    shelf, emulated = two_disks(tmp_path, timeout_s=1.0)
    slab = np.memmap(tmp_path / "a" / "slab", np.uint8)
    slab[:] = 0xAB
    slab.flush()
    emulated.hang()
    ok = shelf.read(range(100))
    emulated.recover()
    settled(shelf)
    assert (shelf.target.bytes[40:60] == 0xAB).any(), "there a copy would have been read to"
    assert ok[60:].all()
    assert shelf.wrong(range(100), ok) == 0
    assert shelf.store.stats()[1].read_pages == ok.sum(), "and no copy was"
    shelf.store.close()


def test_a_write_that_hangs_is_not_accepted_and_what_lands_late_is_never_taken_for_another(tmp_path: Path) -> None:
    shelf, emulated = two_disks(tmp_path, timeout_s=1.0)
    emulated.hang()
    assert not shelf.write(range(200, 232), disks=[0] * 32).any()
    shelf.source.bytes[:] = 0x55  # against the rules: `unsettled` names this memory
    emulated.recover()
    time.sleep(0.1)
    assert shelf.store.stats()[0].state == "read-only"
    ok = shelf.read(range(60))
    assert ok.all()
    assert shelf.wrong(range(60), ok) == 0
    shelf.store.close()
    again = Shelf([tmp_path / "a", tmp_path / "b"])
    assert not again.read(range(200, 232)).any()
    assert again.write(range(200, 232), disks=[0] * 32).all()
    again.check()
    again.store.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_cannot_be_written_to_is_still_read(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    shelf, emulated = two_disks(tmp_path)
    emulated.refuse_writes(number)
    assert not shelf.write(range(300, 320), disks=[0] * 20).any()
    stats = shelf.store.stats()[0]
    assert (stats.state, stats.reason) == ("read-only", f"writing: {os.strerror(number)}")
    assert f"read-only: writing: {os.strerror(number)}" in caplog.text
    assert shelf.read(range(100)).all()
    assert shelf.write(range(400, 420)).all(), "new pages go to the other disk"
    assert not shelf.store.lookup(names(range(400, 420))).present[:, 0].any()
    shelf.check()
    shelf.store.close()


# ---------------------------------------------------------------- disks that cannot be opened


def refuse(number: int) -> Callable[[Path], PageFile]:
    def open_file(path: Path) -> PageFile:
        if path.parent.name == "a":
            raise OSError(number, os.strerror(number), str(path))
        return open_page_file(path)

    return open_file


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_disk_that_cannot_be_opened_is_out_and_the_others_serve(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    shelf, _ = two_disks(tmp_path)
    shelf.store.close()
    shelf = Shelf([tmp_path / "a", tmp_path / "b"], open_file=refuse(number))
    assert os.strerror(number) in caplog.text
    assert shelf.read(range(100)).tolist() == [False] * 40 + [True] * 60
    assert shelf.write(range(100)).all()
    shelf.store.close()
    whole = Shelf([tmp_path / "a", tmp_path / "b"])
    assert whole.store.lookup(names(range(60))).present[:, 0].all(), "its pages were not touched"
    whole.store.close()


def test_a_directory_that_is_missing_in_use_or_too_small_is_out_with_a_message(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shelf, _ = two_disks(tmp_path)
    other = Shelf([tmp_path / "a"])
    assert "is used by another process" in caplog.text
    assert not other.write(range(3)).any()
    assert not other.read(range(3)).any()
    assert other.store.forget(names(range(3))) == 0
    assert len(other.store.by_recency(0)) == 0
    other.check()
    other.store.close()
    shelf.store.close()
    shutil.rmtree(tmp_path / "a")
    free = shutil.disk_usage(tmp_path).free
    disks = (
        DiskConfig(directory=tmp_path / "a", limit_bytes=8 << 20),
        DiskConfig(directory=tmp_path / "b", limit_bytes=2 * free),
    )
    store = DiskStore(StoreConfig(disks=disks, page_bytes=PAGE, namespace="tests"))
    assert "make it on the disk that is to be used" in caplog.text
    assert "cannot be allocated" in caplog.text
    assert [s.state for s in store.stats()] == ["out", "out"]
    assert not store.lookup(names(range(3))).present.any()
    store.close()
    assert shutil.disk_usage(tmp_path).free > free - (1 << 30), "what was got of it was given back"


def test_a_directory_that_is_removed_while_in_use_is_a_new_one_afterwards(tmp_path: Path) -> None:
    shelf, _ = two_disks(tmp_path)
    shutil.rmtree(tmp_path / "a")
    assert shelf.wrong(range(100), shelf.read(range(100))) == 0
    shelf.write(range(600, 640))
    assert shelf.read(range(60, 100)).all()
    shelf.store.close()
    again = Shelf([tmp_path / "a", tmp_path / "b"])
    assert again.read(range(40, 100)).all()
    assert again.write(range(40), disks=[0] * 40).all()
    again.check()
    again.store.close()


def test_a_fault_in_an_engine_thread_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        alignment_bytes = 1

        def preadv(self, buffers: object, offset: int, /) -> int:
            raise RuntimeError("a bug")

        pwritev = preadv

        def close(self) -> None: ...

    shelf = Shelf([tmp_path / "a"], open_file=lambda path: Broken(), timeout_s=60.0)
    assert not shelf.write(range(4)).any()
    assert "a disk thread failed" in caplog.text
    shelf.store.close()
