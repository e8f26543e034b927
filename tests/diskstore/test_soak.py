"""Some seconds of what scripts/soak does for ten minutes, and whether it would see anything."""

from __future__ import annotations

import json
import random
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from polder.diskstore.io import Arena
from polder.diskstore.keys import Keys
from polder.diskstore.store import DiskStore, PageLocations
from polder.memory.addresses import bytes_at
from tests.diskstore import soak
from tests.diskstore.soak import PAGE_BYTES, SoakReport


def test_six_seconds_of_it_are_without_a_wrong_page(tmp_path: Path) -> None:
    report = soak.soak(tmp_path, seconds=6, disks=3, limit_bytes=12 << 20, seed=1)
    assert report.good, report
    assert report.wrong == 0
    assert report.kills >= 1
    assert report.pages_written > 20
    assert report.pages_read > 20
    assert report.pages_read_of_former_runs > 0
    assert report.pages_at_the_end > 0
    assert report.du_samples > 5
    assert 0 < report.highest_du_over_limit <= 1.0


@pytest.fixture
def page() -> np.ndarray:
    page = np.empty(PAGE_BYTES, dtype=np.uint8)
    soak._fill(page, 12, 34)
    return page


def test_a_page_tells_what_it_is(page: np.ndarray) -> None:
    assert soak._version_of(page, 12) == 34
    assert soak._version_of(page, 13) is None
    page[-1] ^= 1
    assert soak._version_of(page, 12) is None
    assert soak._version_of(np.zeros_like(page), 0) is None
    assert [soak._number_of(key) for key in soak._names(np.array([0, 7, 123456]))] == [0, 7, 123456]


class Lying(DiskStore):
    """Vouches for pages that changed, and forgets nothing."""

    def read(self, places: PageLocations, addresses: np.ndarray, disks: np.ndarray | None = None) -> np.ndarray:
        ok = super().read(places, addresses, disks)
        for address in addresses[ok]:
            bytes_at(int(address) + 100, 1)[0] ^= 1
        return ok

    def forget(self, keys: Keys, disks: np.ndarray | None = None) -> int:
        return 0


def test_it_sees_a_store_that_lies(tmp_path: Path) -> None:
    store = Lying(soak._config([tmp_path], 8 << 20))
    counts = np.zeros(len(soak._COUNTS), dtype=np.int64)
    numbers = np.arange(40)
    worker = soak._Worker(store, numbers, 1, counts)
    for at in (0, 20):
        worker._write(numbers[at : at + 20])
        worker._read(numbers[at : at + 20])
    worker._forget(numbers[:5])
    worker._read(numbers[:20])
    store.close()
    found = dict(zip(soak._COUNTS, counts.tolist(), strict=True))
    assert (found["written"], found["read"], found["wrong"], found["misplaced"]) == (40, 60, 60, 5)
    report = SoakReport(minutes=0, disks=1, limit_bytes=8 << 20)
    soak._last_look([tmp_path], report)
    assert (report.wrong, report.problems, report.pages_at_the_end) == (0, [], 40), "on disk all is as it was"


def test_it_sees_a_page_on_disk_that_is_not_what_its_key_says(tmp_path: Path) -> None:
    store = DiskStore(soak._config([tmp_path], 8 << 20))
    arena = Arena(1, PAGE_BYTES)
    soak._fill(arena.bytes[0], 3, 1)
    store.write(soak._names(np.array([4])), arena.addresses)
    store.close()
    report = SoakReport(minutes=0, disks=1, limit_bytes=8 << 20)
    soak._last_look([tmp_path], report)
    assert report.wrong == 1
    assert not report.good


def test_it_sees_a_directory_over_its_limit_and_a_bad_page(tmp_path: Path) -> None:
    store = DiskStore(soak._config([tmp_path], 8 << 20))
    store.close()
    (tmp_path / "much").write_bytes(bytes(8 << 20))
    report, over = SoakReport(minutes=0, disks=1, limit_bytes=8 << 20), threading.Event()
    watcher = threading.Thread(target=soak._watch, args=([tmp_path], report, over))
    watcher.start()
    time.sleep(0.2)
    over.set()
    watcher.join()
    assert report.highest_du_over_limit > 1.5
    assert not report.good
    soak._last_look([tmp_path], report)
    assert "fsck: the directory takes" in report.problems[0]


def test_a_child_that_ends_by_itself_is_a_problem_and_ends_the_run(tmp_path: Path) -> None:
    (tmp_path / "disk0").mkdir()
    (tmp_path / "disk0" / "strange").touch()
    counts = np.memmap(tmp_path / "counts", np.int64, "w+", shape=(soak.THREADS, len(soak._COUNTS)))
    report = SoakReport(minutes=0, disks=1, limit_bytes=8 << 20)
    soak._life(0, [tmp_path / "disk0"], tmp_path / "counts", counts, report, random.Random(0))
    assert (report.kills, len(report.problems)) == (0, 1)
    assert "run 0 ended by itself with 2: " in report.problems[0]
    assert "holds 'strange'" in report.problems[0]


def test_the_command_prints_one_object_and_refuses_nonsense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(folder: Path, **given: object) -> SoakReport:
        assert (folder.parent, given["seconds"], given["disks"], given["limit_bytes"]) == (tmp_path, 30, 2, 16 << 20)
        return SoakReport(minutes=0.5, disks=2, limit_bytes=16 << 20, wrong=1)

    monkeypatch.setattr(soak, "soak", fake)
    words = ["--minutes", "0.5", "--disks", "2", "--limit", "16MiB", "--folder", str(tmp_path)]
    assert soak.main(words) == 1
    assert json.loads(capsys.readouterr().out)["wrong"] == 1
    for wrong in (["--limit", "16 pages"], ["--disks", "0"], ["--minutes", "-1"]):
        with pytest.raises(SystemExit):
            soak.main(wrong)
    assert "--limit: cannot read '16 pages'" in capsys.readouterr().err
