"""`polder fsck` finds what is wrong with a disk, and mends what can be mended."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.diskstore.pages import PAGE, Shelf, names
from tests.serve.test_cli import polder

PAGES = 150


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    shelf = Shelf([tmp_path / "a"])
    assert shelf.write(range(PAGES)).all()
    shelf.store.close()
    return tmp_path / "a"


def there(disk: Path) -> int:
    shelf = Shelf([disk])
    ok = shelf.read(range(PAGES))
    assert shelf.wrong(range(PAGES), ok) == 0
    assert shelf.store.stats()[0].corrupt_pages == 0
    shelf.check()
    shelf.store.close()
    return int(ok.sum())


def spoil_pages(disk: Path) -> None:
    slab = np.memmap(disk / "slab", np.uint8).reshape(-1, PAGE)
    slab[[3, 77], 1000] ^= 1
    slab.flush()


def cut_the_slab(disk: Path) -> None:
    os.truncate(disk / "slab", 100 * PAGE)


def damage_the_index(disk: Path) -> None:
    with open(disk / "index.db", "r+b") as file:
        file.seek(3 * 4096)
        file.write(os.urandom(4096))


def lose_the_index(disk: Path) -> None:
    (disk / "index.db").unlink()


def leave_a_file(disk: Path) -> None:
    (disk / "index.db.new").write_bytes(bytes(8192))


def double_a_page(disk: Path) -> None:
    from polder.diskstore.index import SlotIndex, row_bytes
    from polder.diskstore.layout import read_meta

    meta = read_meta(disk)
    assert meta is not None
    index = SlotIndex(disk / "index.db", meta)
    records, _ = index.load()
    records[PAGES] = records[5]
    records["generation"][5] += 1000  # and so the later one does not verify
    index.store({row: row_bytes(records, row) for row in (0, 1)})
    index.close()


@pytest.mark.parametrize(
    ("harm", "words", "left"),
    [
        (spoil_pages, "2 pages do not verify", PAGES - 2),
        (cut_the_slab, "the slab has 6553600 bytes instead of", 100),
        (damage_the_index, "the index is damaged", PAGES - 50),
        (lose_the_index, "the index is lost", 0),
        (leave_a_file, "index.db.new is left over", PAGES),
        (double_a_page, "1 pages are in two slots", PAGES - 1),
    ],
)
def test_it_finds_says_and_repairs(disk: Path, harm: Callable[[Path], None], words: str, left: int) -> None:
    harm(disk)
    found = polder("fsck", str(disk))
    assert found.returncode == 3
    assert words in found.stdout
    mended = polder("fsck", str(disk), "--repair", "--json")
    report = json.loads(mended.stdout)[0]
    assert mended.returncode == 0
    assert report["repaired"]
    assert any(words in problem for problem in report["problems"])
    again = polder("fsck", str(disk), "--json")
    assert (again.returncode, json.loads(again.stdout)[0]["problems"]) == (0, [])
    assert there(disk) == left


def test_a_sound_disk_is_reported_and_left_alone(disk: Path) -> None:
    before = (disk / "slab").stat().st_mtime_ns
    done = polder("fsck", str(disk), "--repair")
    assert done.returncode == 0
    assert done.stdout.startswith(f"{disk}: {PAGES} pages in ")
    assert (disk / "slab").stat().st_mtime_ns == before
    report = json.loads(polder("fsck", str(disk), "--json").stdout)[0]
    assert (report["pages"], report["corrupt_pages"], report["namespace"]) == (PAGES, 0, "tests")
    assert report["disk_bytes"] <= report["limit_bytes"]
    assert there(disk) == PAGES


def test_what_is_over_the_limit_and_not_ours_is_not_repaired(disk: Path) -> None:
    (disk / "thesis.tex").write_bytes(bytes(4 << 20))
    done = polder("fsck", str(disk), "--repair")
    assert done.returncode == 3
    assert "the limit is 16777216" in done.stdout
    assert (disk / "thesis.tex").exists()


def test_a_disk_in_use_missing_or_foreign_is_left_alone_and_is_wrong(disk: Path, tmp_path: Path) -> None:
    shelf = Shelf([disk])
    busy = polder("fsck", str(disk), "--repair")
    assert (busy.returncode, "is used by another process" in busy.stdout) == (3, True)
    assert shelf.store.lookup(names([1])).present.all()
    shelf.store.close()
    assert polder("fsck", str(tmp_path / "none")).returncode == 3
    foreign = polder("fsck", str(tmp_path))
    assert foreign.returncode == 3
    assert foreign.stdout.startswith(f"{tmp_path}: not checked\n")
    assert "it has no meta.json" in foreign.stdout


@pytest.mark.parametrize("first", ["damaged", "missing"])
def test_what_was_done_to_a_disk_is_told_whatever_becomes_of_the_others(disk: Path, tmp_path: Path, first: str) -> None:
    cut_the_slab(disk)
    paths = [str(disk), str(tmp_path / "none")][:: 1 if first == "damaged" else -1]
    said = polder("fsck", *paths)
    assert said.returncode == 3
    assert "the slab has 6553600 bytes instead of" in said.stdout
    assert "none: not checked" in said.stdout
    mended = polder("fsck", *paths, "--repair", "--json")
    reports = {report["directory"]: report for report in json.loads(mended.stdout)}
    assert mended.returncode == 3
    assert list(reports) == paths
    assert reports[str(disk)]["repaired"]
    assert "none" in reports[str(tmp_path / "none")]["problems"][0]
    assert polder("fsck", str(disk)).returncode == 0
