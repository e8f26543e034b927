"""Upkeep of an entry store: what is read together comes to lie together, and nothing is lost on the way."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from polder.swarm import entry_store
from tests.swarm.entries import ENTRY, Rig, fill


def test_what_is_read_together_comes_to_lie_together_and_again_after_reading_has_changed(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    groups = rng.permutation(1024).reshape(64, 16)
    sizes = {"memory_bytes": 512 * ENTRY, "hot_bytes": 0, "learn_steps": 100, "ring_steps": 200}
    rig = Rig(tmp_path, entries=1024, limit_bytes=16 << 20, **sizes)
    fill(rig, 1024)
    requests = []
    for step in range(460):
        if step == 200:
            groups[:40] = rng.permutation(groups[:40].reshape(-1)).reshape(40, 16)
        ids = np.sort(groups[rng.choice(64, 6, replace=False)].reshape(-1))
        before = rig.entries.stats.requests
        assert rig.check(ids).all()
        requests.append((rig.entries.stats.requests - before) / len(ids))
        if step % 4 == 0:
            rig.upkeep.advance()
    rig.entries.check_integrity()
    figures = rig.entries.stats
    mean = {at: float(np.mean(requests[at : at + 40])) for at in (60, 160, 200, 420)}
    rig.close()
    assert figures.packed >= 2
    assert figures.lost == 0
    assert mean[160] < 0.2 * mean[60], "packed once"
    assert mean[200] > 3 * mean[160], "groups changed"
    assert mean[420] < 0.5 * mean[200], "packed again"


def test_pages_that_have_not_aged_stay_where_they_are(tmp_path: Path) -> None:
    rig = Rig(tmp_path, entries=512, memory_bytes=256 * ENTRY, learn_steps=64, hot_bytes=0)
    fill(rig, 512)
    rng = np.random.default_rng(3)
    groups = rng.permutation(512).reshape(32, 16)

    def steps(count: int) -> None:
        for _ in range(count):
            rig.check(np.sort(groups[rng.choice(32, 4, replace=False)].reshape(-1)))

    steps(64)
    while rig.upkeep.advance():
        pass
    pages = rig.entries.map.page_of.copy()
    steps(80)
    assert not rig.upkeep.advance(), "nothing has aged"
    assert rig.entries.drift is not None
    changed, groups[:8] = np.arange(8), rng.permutation(groups[:8].reshape(-1)).reshape(8, 16)
    steps(60)
    assert rig.entries.drift.drifted
    assert not rig.upkeep.advance(), "too little is known of it yet"
    steps(64)
    while rig.upkeep.advance():
        pass
    stayed = groups[8:].reshape(-1)
    assert (rig.entries.map.page_of[stayed] == pages[stayed]).mean() > 0.8
    assert (rig.entries.map.page_of[groups[changed].reshape(-1)] != pages[groups[changed].reshape(-1)]).mean() > 0.8
    rig.close()


def test_upkeep_in_another_thread_loses_nothing(tmp_path: Path) -> None:
    sizes = {
        "memory_bytes": 256 * ENTRY,
        "hot_bytes": 32 * ENTRY,
        "learn_steps": 10,
        "ring_steps": 32,
    }
    rig = Rig(tmp_path, entries=1024, limit_bytes=16 << 20, **sizes)
    fill(rig, 1024)
    over = threading.Event()
    failed: list[BaseException] = []

    def advance() -> None:
        try:
            while not over.is_set():
                rig.upkeep.advance()
                if rig.entries.stats.packed and rig.upkeep._round is None:
                    rig.entries.stats.packed = 0  # as if nothing had been packed: round after round
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=advance)
    thread.start()
    rng = np.random.default_rng(0)
    for _ in range(300):
        start = int(rng.integers(0, 900))
        assert rig.check(np.unique(np.concatenate([np.arange(start, start + 60), rng.integers(0, 1024, 40)]))).all()
    over.set()
    thread.join()
    assert not failed
    assert rig.entries.stats.rewritten_pages > 64
    rig.entries.check_integrity()
    rig.close()


def test_steps_longer_than_the_rings_are_read_and_packed_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entry_store, "_RING_ENTRIES", 1000)
    sizes = {"memory_bytes": 400 * ENTRY, "hot_bytes": 0, "learn_steps": 20, "ahead_bytes": ENTRY}
    rig = Rig(tmp_path, entries=512, limit_bytes=16 << 20, **sizes)
    fill(rig, 512)
    rng = np.random.default_rng(0)
    for _ in range(24):
        wanted = np.sort(rng.choice(512, 120, replace=False))
        rig.entries.read_ahead(wanted)
        assert rig.check(wanted).all()
    while rig.upkeep.advance():
        pass
    assert rig.entries.stats.packed == 1
    assert rig.check(np.arange(300)).all()
    rig.close()


def test_the_only_copy_of_a_page_is_kept_however_cold_it_is(tmp_path: Path) -> None:
    sizes = {"memory_bytes": 256 * ENTRY, "hot_bytes": 0, "learn_steps": 40}
    rig = Rig(tmp_path, entries=512, limit_bytes=16 << 20, **sizes)
    fill(rig, 512)
    rng = np.random.default_rng(1)
    groups = rng.permutation(512).reshape(32, 16)
    weights = np.where(np.arange(32) < 4, 8.0, 1.0)
    for _ in range(120):
        rig.check(np.sort(groups[rng.choice(32, 6, replace=False, p=weights / weights.sum())].reshape(-1)))
        rig.upkeep.advance()
    twice = np.flatnonzero(rig.entries.map.disk_of[:, 1] >= 0)
    assert len(twice)
    rig.store.forget(rig.entries.map.keys(twice), rig.entries.map.disk_of[twice, 0])  # the first copies go
    rig.upkeep._cool(twice)
    assert rig.store.lookup(rig.entries.map.keys(twice)).present.any(axis=1).all()
    rig.close()
