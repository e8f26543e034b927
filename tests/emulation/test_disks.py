"""Emulated disks keep to their model, and fail when they are told to."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import numpy as np
import pytest

from polder.diskstore.engine import ThreadEngine
from polder.diskstore.model import DiskModel
from polder.emulation.disks import DiskFaults, EmulatedDisk, EmulatedEngine, RealClock, VirtualClock
from tests.diskstore.pages import PAGE, Shelf
from tests.emulation.files import emulated_files

MB = 1_000_000


def disk(bandwidth: float = 100 * MB, *, faults: DiskFaults | None = None, **model: float) -> EmulatedDisk:
    return EmulatedDisk(DiskModel(bytes_per_s=bandwidth, **model), faults, VirtualClock())


def test_a_batch_takes_what_bandwidth_and_latency_say() -> None:
    done, errors = disk(latency_s=0.001).serve(np.full(10, MB), 5.0)
    assert done == pytest.approx(5.0 + 0.001 + 0.01 * np.arange(1, 11))
    assert not errors.any()


def test_small_requests_are_bound_by_their_number() -> None:
    done, _ = disk(latency_s=0.0, requests_per_s=1000).serve(np.full(100, 4096), 0.0)
    assert done[-1] == pytest.approx(0.1)


def test_a_slow_disk_takes_longer_and_a_busy_one_keeps_its_queue() -> None:
    slow = disk(MB * 50, latency_s=0.0)
    assert slow.serve(np.full(1, MB), 0.0)[0][0] == pytest.approx(0.02)
    assert slow.serve(np.full(1, MB), 0.01)[0][0] == pytest.approx(0.04), "it came while the first was served"
    assert slow.serve(np.full(1, MB), 1.0)[0][0] == pytest.approx(1.02), "and this one long after"


def test_faults_are_of_the_share_asked_for_and_the_same_for_a_seed() -> None:
    faults = DiskFaults(fail=0.2, stall=0.1, stall_s=3.0, seed=7)
    (done, errors), again = (disk(faults=faults).serve(np.full(1000, 1), 0.0) for _ in range(2))
    assert (errors == again[1]).all()
    assert 150 < (errors == errno.EIO).sum() < 250
    assert 70 < (done > 3).sum() < 130


def test_a_disk_dies_or_hangs_at_its_hour() -> None:
    dying = disk(faults=DiskFaults(dies_at_s=0.05), latency_s=0.0)
    assert (dying.serve(np.full(10, MB), 0.0)[1] == errno.EIO).tolist() == [False] * 4 + [True] * 6
    hanging = disk(faults=DiskFaults(hangs_at_s=0.05), latency_s=0.0)
    assert np.isinf(hanging.serve(np.full(10, MB), 0.0)[0]).sum() == 6
    assert np.isinf(hanging.serve(np.full(1, 1), 0.0)[0]).all(), "and stays so"
    hanging.recover()


def engine_over(disks: list[EmulatedDisk]) -> EmulatedEngine:
    return EmulatedEngine(ThreadEngine(4), disks)


def test_modelled_time_is_that_of_the_fullest_disk(tmp_path: Path) -> None:
    clock = VirtualClock()
    model = DiskModel(bytes_per_s=PAGE * 1000, latency_s=0.0)
    disks = [EmulatedDisk(model, clock=clock), EmulatedDisk(model.slowed(0.5), clock=clock)]
    engine = engine_over(disks)
    shelf = Shelf([tmp_path / "a", tmp_path / "b"], engine=engine)
    assert shelf.write(range(40), disks=[0] * 30 + [1] * 10).all()
    ok = shelf.read(range(40))
    assert ok.all()
    assert shelf.wrong(range(40), ok) == 0
    assert engine.steps[-1].modelled_s == pytest.approx(0.030)
    assert shelf.read(range(15, 40)).all()
    assert engine.steps[-1].modelled_s == pytest.approx(0.020), "ten pages at half speed"
    assert sum(d.requests for d in disks) < 40, "pages side by side are one request"
    shelf.store.close()


def test_wall_time_follows_the_model(tmp_path: Path) -> None:
    clock = RealClock()
    engine = engine_over([EmulatedDisk(DiskModel(bytes_per_s=20 * MB), clock=clock) for _ in range(2)])
    shelf = Shelf([tmp_path / "a", tmp_path / "b"], engine=engine)
    assert shelf.write(range(32)).all()
    assert shelf.read(range(32)).all()
    for step in engine.steps:
        assert step.wall_s >= step.modelled_s > 0.03
    shelf.store.close()


def test_a_page_that_comes_too_late_is_a_miss_and_stays(tmp_path: Path) -> None:
    clock = VirtualClock()
    slow = EmulatedDisk(DiskModel(bytes_per_s=PAGE * 10, latency_s=0.0), clock=clock)
    shelf = Shelf([tmp_path / "a"], engine=engine_over([slow]), timeout_s=0.55)
    assert shelf.write(range(5)).all()
    assert shelf.write(range(5, 10)).all()
    assert shelf.write(range(10, 14)).all()
    ok = shelf.read(range(0, 14, 2))  # seven requests of 0.1 s
    assert ok.tolist() == [True] * 5 + [False] * 2
    assert shelf.store.stats()[0].timeouts == 2
    assert shelf.read([10, 12]).all()
    shelf.store.close()


def test_a_file_of_a_disk_that_hangs_goes_on_when_it_recovers(tmp_path: Path) -> None:
    here = tmp_path / "a"
    here.mkdir()
    emulated = EmulatedDisk(DiskModel(bytes_per_s=1e9))
    shelf = Shelf([here], open_file=emulated_files({here: emulated}))
    assert shelf.write(range(4)).all()
    emulated.hang()
    found: list[np.ndarray] = []
    reader = threading.Thread(target=lambda: found.append(shelf.read(range(4))))
    reader.start()
    reader.join(0.05)
    assert reader.is_alive()
    emulated.recover()
    reader.join()
    assert found[0].all()
    shelf.store.close()
