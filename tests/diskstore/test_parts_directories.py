"""Directories of pages in parts: they outlive restarts and kills, keep their limits, refuse what they are not, and are checked."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import numpy as np
import pytest

from polder.diskstore.fsck import check_directory, locked, repair_directory
from polder.diskstore.index import create_index, empty_records
from polder.diskstore.layout import index_pages, plan_layout, read_meta
from polder.errors import ConfigError
from tests.diskstore.pages import PAGE, PARTS, Shelf, names, shelf_of_parts, write_until_killed


def test_kills_in_the_middle_of_writing_leave_parts_that_can_be_read_and_none_that_is_wrong(tmp_path: Path) -> None:
    directories = [tmp_path / "a", tmp_path / "b"]
    chance, found = np.random.default_rng(3), 0
    for turn in range(4):
        write_until_killed(directories, seed=turn, parts=PARTS, after_s=chance.uniform(0.1, 0.25))
        shelf = shelf_of_parts(*directories, limit_bytes=8 << 20)
        present = shelf.store.lookup(names(range(300))).present.any(axis=1)
        for at in range(0, 300, 150):
            numbers, parts = range(at, at + 150), chance.integers(0, PARTS, 150).tolist()
            ok = shelf.read_parts(numbers, parts)
            assert shelf.wrong_parts(numbers, parts, ok) == 0
            found += int(ok.sum())
            # At most the slots that were being written, whose old records the index still had.
            assert (present[at : at + 150] & ~ok).sum() <= 16
        shelf.check()
        shelf.store.close()
    assert found > 200


@pytest.mark.parametrize("parts", [1, 2, 16, 64, 100, 247, 250, 496])
def test_an_index_never_has_more_pages_than_are_planned_and_changes_in_place(tmp_path: Path, parts: int) -> None:
    records, path = empty_records(9000 // parts + 2000, parts), tmp_path / "index.db"
    records["generation"] = 1  # and so no row is mostly zeroes
    create_index(path, records, "0" * 32)
    planned = index_pages(len(records), parts)
    with sqlite3.connect(path) as db:
        made = int(db.execute("PRAGMA page_count").fetchone()[0])
        db.execute("UPDATE slots SET records = randomblob(length(records))")
        assert db.execute("PRAGMA page_count").fetchone()[0] == made
    db.close()
    assert made <= planned
    assert made > planned - 10 or records.itemsize < 2040 < 2 * records.itemsize, "two records a page, one a row"


def test_a_directory_of_another_number_of_parts_is_refused(tmp_path: Path) -> None:
    shelf_of_parts(tmp_path / "a").store.close()
    with pytest.raises(ConfigError, match=r"made for parts a page 16, asked for 1: name another directory, or empty"):
        Shelf([tmp_path / "a"])
    with pytest.raises(ConfigError, match="made for parts a page 16, asked for 8"):
        Shelf([tmp_path / "a"], parts=8)
    shelf_of_parts(tmp_path / "a").store.close()
    meta = tmp_path / "a" / "meta.json"
    meta.write_text(meta.read_text().replace('"parts": 16', '"parts": 24'))
    with pytest.raises(ConfigError, match=r"in 24 parts.*empty the directory to start over"):
        shelf_of_parts(tmp_path / "a")


def test_a_directory_of_before_there_were_parts_keeps_its_pages(tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / "a"])
    assert shelf.write(range(30)).all()
    shelf.store.close()
    path = tmp_path / "a" / "meta.json"
    meta = json.loads(path.read_text())
    assert meta.pop("parts") == 1
    path.write_text(json.dumps(meta))
    shelf = Shelf([tmp_path / "a"])
    ok = shelf.read_parts(range(30), [0] * 30)
    assert ok.all(), "a page of one part is that part"
    assert shelf.wrong(range(30), ok) == 0
    shelf.store.close()
    assert empty_records(1, 1).tobytes() == bytes(40)


def test_parts_that_cannot_be_are_refused(tmp_path: Path) -> None:
    for parts in (0, -1, 3, 5, 32):
        with pytest.raises(ConfigError, match=f"in {parts} parts: a part has to be a multiple of 4096 bytes: choose"):
            Shelf([tmp_path / "a"], parts=parts)
    with pytest.raises(ConfigError, match="in 512 parts: 496 are the most: choose larger parts or smaller pages"):
        plan_layout(1 << 30, 2 << 20, 512)
    shelf = shelf_of_parts(tmp_path / "a")
    assert shelf.write([1]).all()
    for part in (-1, PARTS):
        with pytest.raises(ConfigError, match="they are numbered from 0 to 15"):
            shelf.read_parts([1, 1], [0, part])
    assert not len(shelf.read_parts([], []))
    assert shelf.read_parts([1], [15]).all()
    shelf.store.close()


def test_fsck_verifies_every_part_and_drops_pages_with_a_bad_one(tmp_path: Path) -> None:
    shelf = shelf_of_parts(tmp_path / "a")
    assert shelf.write(range(100)).all()
    slab = np.memmap(tmp_path / "a" / "slab", np.uint8).reshape(-1, PARTS, PAGE // PARTS)
    slots = shelf.store.lookup(names(range(100))).slots[:, 0]
    shelf.store.close()
    with locked(tmp_path / "a"):
        report, _ = check_directory(tmp_path / "a")
    assert (report.pages, report.problems) == (100, [])
    slab[slots[:PARTS], np.arange(PARTS), -1] ^= 1
    slab[slots[20], [3, 9]] = slab[slots[20], [9, 3]]
    slab.flush()
    with locked(tmp_path / "a"):
        report, good = check_directory(tmp_path / "a")
        assert report.corrupt_pages == PARTS + 1
        repair_directory(tmp_path / "a", report, good)
        assert check_directory(tmp_path / "a")[0].problems == []
    meta = read_meta(tmp_path / "a")
    assert meta is not None
    assert meta.parts == PARTS
    shelf = shelf_of_parts(tmp_path / "a")
    ok = shelf.read(range(100))
    assert ok.sum() == 100 - PARTS - 1
    assert shelf.wrong(range(100), ok) == 0
    shelf.store.close()
