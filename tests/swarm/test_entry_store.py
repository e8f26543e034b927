"""Entries in parts of pages: what is read is what was written, wherever upkeep has put it meanwhile and whatever disks do."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from polder.diskstore.layout import SLAB
from polder.diskstore.model import PM9A3, DiskModel
from polder.errors import BudgetError, ConfigError, IntegrityError
from polder.swarm import entry_map
from polder.swarm.entry_map import EntryMap
from polder.swarm.entry_memory import EntryMemory
from polder.swarm.entry_pages import EntryConfig
from polder.swarm.entry_store import EntryStore
from tests.conftest import examples
from tests.swarm.entries import ENTRY, PARTS, Rig, content, fill


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path, entries=400)
    yield made
    made.close()


# ---------------------------------------------------------------------- random sequences


class Model(RuleBasedStateMachine):
    """Writes, reads, reads ahead, upkeep, corrupted slabs, disks that die: never another byte, and nothing lost without a fault."""

    ids = st.sets(st.integers(0, 159), min_size=1, max_size=40).map(lambda ids: np.array(sorted(ids)))

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        config = {"learn_steps": 3, "ring_steps": 8, "ahead_bytes": 8 * ENTRY}
        self.rig = Rig(Path(self.folder.name), entries=160, **config)
        self.there: set[int] = set()
        self.faults = False

    @rule(ids=ids)
    def write(self, ids: npt.NDArray[np.int64]) -> None:
        fresh = np.array([i for i in ids.tolist() if i not in self.there], dtype=np.int64)
        ok = self.rig.entries.write(fresh, content(fresh))
        assert ok.all() or self.faults
        self.there |= set(fresh[ok].tolist())

    @rule()
    def flush(self) -> None:
        self.rig.entries.flush()

    @rule(ids=ids)
    def read(self, ids: npt.NDArray[np.int64]) -> None:
        ok = self.rig.check(ids)
        expected = np.isin(ids, list(self.there))
        assert not (ok & ~expected).any()
        assert self.faults or np.array_equal(ok, expected)
        self._forget_lost(ids[expected & ~ok])

    def _forget_lost(self, ids: npt.NDArray[np.int64]) -> None:
        """Those that the map gave up can be written again."""
        gone = ids[self.rig.entries.map.page_of[ids] < 0]
        self.there -= set(gone.tolist())

    @rule(ids=ids)
    def ahead(self, ids: npt.NDArray[np.int64]) -> None:
        self.rig.entries.read_ahead(ids)

    @rule()
    def advance(self) -> None:
        self.rig.upkeep.advance()
        self._sync()

    @rule(disk=st.integers(0, 2), at=st.integers(0, (2 << 20) - 1))
    def corrupt(self, disk: int, at: int) -> None:
        with open(self.rig.folders[disk] / SLAB, "r+b") as file:
            file.seek(at)
            byte = file.read(1)
            file.seek(at)
            file.write(bytes([byte[0] ^ 1]))
        self.faults = True

    @rule(disk=st.integers(0, 1))
    def die(self, disk: int) -> None:
        self.rig.disks[disk].die()
        self.faults = True

    def _sync(self) -> None:
        """Upkeep may find that something is lost, too."""
        if self.faults:
            self.rig.entries.read_ahead(np.empty(0, dtype=np.int64))  # waits for what is under way
            lost = [i for i in self.there if self.rig.entries.map.page_of[i] < 0 and not self.rig.entries._unwritten[i]]
            self.there -= {i for i in lost if not self.rig.entries.memory.present[i]}

    @invariant()
    def adds_up(self) -> None:
        if hasattr(self, "rig"):
            self.rig.entries.check_integrity()
            self.rig.store.check_integrity()

    def teardown(self) -> None:
        if hasattr(self, "rig"):
            self.rig.close()
            self.folder.cleanup()


TestModel = Model.TestCase
TestModel.settings = examples(25, steps=25)


# ---------------------------------------------------------------------- memory


def test_what_followed_is_read_ahead_within_its_budget(tmp_path: Path) -> None:
    rig = Rig(tmp_path, entries=400, ahead_bytes=24 * ENTRY, hot_bytes=0)
    fill(rig, 400)
    cycle = [np.arange(at, at + 20) for at in (0, 100, 200, 300)]
    for step in range(12):
        before = rig.entries.stats.read_ahead
        rig.entries.read_ahead(cycle[(step - 1) % 4])
        assert rig.check(cycle[step % 4]).all()
        assert rig.entries.stats.read_ahead - before <= 24
    figures = rig.entries.stats
    assert figures.ahead == 20 * 8, "from the second round on"
    assert figures.ahead <= figures.read_ahead
    rig.close()


def test_a_step_that_memory_cannot_hold_is_refused_with_what_to_do(rig: Rig) -> None:
    fill(rig, 400)
    with pytest.raises(BudgetError, match="raise memory_bytes"):
        rig.entries.read(np.arange(200))
    assert rig.check(np.arange(50)).all()


def test_what_stays_is_found_without_a_request_and_memory_is_bounded(rig: Rig) -> None:
    fill(rig, 400)
    assert rig.check(np.arange(16)).all()
    before = rig.entries.stats.requests
    for _ in range(3):
        assert rig.check(np.arange(16)).all()
    assert rig.entries.stats.requests == before
    assert rig.entries.stats.resident == 48
    assert int(rig.entries.memory.present.sum()) <= rig.entries.memory.slots


def test_an_entry_of_a_dead_disk_is_lost_and_can_be_written_again(rig: Rig) -> None:
    fill(rig, 400)
    rig.disks[1].die()
    ids = np.arange(48)
    for _ in range(12):  # until the disk is out
        ok = rig.check(ids)
        if (rig.entries.map.page_of[ids[~ok]] < 0).all() and not ok.all():
            break
    lost = ids[~ok]
    assert len(lost)
    assert rig.entries.stats.lost >= len(lost)
    assert rig.entries.write(lost, content(lost)).all()
    rig.entries.flush()
    assert rig.check(ids).all()


def test_what_is_stored_stays_as_it_is_and_nothing_is_written_twice_at_a_time(rig: Rig) -> None:
    rig.entries.write(np.arange(20), content(range(20)))
    again = np.array([3, 18, 40])  # in a page, waiting for one, new
    assert rig.entries.write(again, np.concatenate([content([3, 18], version=1), content([40])])).all()
    assert rig.check(np.array([3, 18, 40])).all()
    with pytest.raises(ConfigError, match="twice"):
        rig.entries.write(np.array([50, 50]), content([50, 50]))
    rig.entries.check_integrity()


def test_a_later_process_on_the_same_disks_finds_nothing_of_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Rig(tmp_path, entries=64)
    one.entries.write(np.arange(64), content(range(64), version=1))
    one.store.close()  # as if it had been killed
    monkeypatch.setattr(entry_map, "_PROCESS", np.uint64(1))
    other = Rig(tmp_path, entries=64)
    assert sum(disk.used for disk in other.store.stats()) == 0, "what it left takes no room"
    fill(other, 64)
    beside = EntryStore(other.store, other.entries.config, entries=8)
    assert other.check(np.arange(64)).all(), "what another one of this process has stays"
    beside.close()
    other.entries.close()
    assert sum(disk.used for disk in other.store.stats()) == 0
    other.store.close()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_a_read_that_was_broken_off_nothing_is_taken_for_read(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    fill(rig, 400)
    real = rig.entries.pages.fetch

    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr(rig.entries.pages, "fetch", broken)
    with pytest.raises(error):
        rig.entries.read(np.arange(16))
    monkeypatch.setattr(rig.entries.pages, "fetch", real)
    assert rig.check(np.arange(16)).all()
    rig.entries.check_integrity()


def test_a_full_disk_refuses_entries_and_evicts_none(tmp_path: Path) -> None:
    sizes = {"memory_bytes": 256 * ENTRY, "hot_bytes": 0, "learn_steps": 4}
    rig = Rig(tmp_path, entries=4000, disks=2, limit_bytes=6 << 20, **sizes)
    room = int(rig.store.free.sum()) * PARTS
    stored = rig.entries.write(np.arange(4000), content(range(4000)))
    rig.entries.flush()
    assert room - PARTS <= stored.sum() <= room + PARTS
    there = np.flatnonzero(stored)
    for _ in range(6):
        assert rig.check(there[:100]).all()
    assert not rig.upkeep.advance(), "there is no room to pack"
    assert rig.entries.stats.without_room
    for at in range(0, len(there), 200):
        assert rig.check(there[at : at + 200]).all()
    rig.close()


def test_what_is_read_ahead_keeps_its_budget_and_makes_way_for_a_step(tmp_path: Path) -> None:
    rig = Rig(tmp_path, entries=400, memory_bytes=64 * ENTRY, ahead_bytes=16 * ENTRY, hot_bytes=0)
    fill(rig, 400)
    for _ in range(2):
        for at in (0, 100):
            rig.entries.read_ahead(np.arange(at + 50, at + 60))
            assert rig.check(np.arange(at, at + 16)).all()
    for at in (0, 100, 0, 100):
        rig.entries.read_ahead(np.arange(at + 50, at + 60))
        rig.entries.wait()
        assert rig.entries._kept_ahead.sum() <= 16
    assert rig.check(np.arange(200, 264)).all(), "as long as memory"
    rig.close()


def test_two_contexts_on_one_store_do_not_meet(tmp_path: Path) -> None:
    one = Rig(tmp_path, entries=64)
    other = EntryStore(one.store, one.entries.config, entries=64)
    fill(one, 64)
    other.write(np.arange(32), content(range(32), version=1))
    assert one.check(np.arange(64)).all()
    found = other.read(np.arange(32))
    assert np.array_equal(other.memory.bytes[found.rows], content(range(32), version=1))
    other.close()
    one.close()


def test_sizes_that_cannot_be_meant_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave nothing"):
        EntryConfig(disks=(PM9A3,), memory_bytes=8192, hot_bytes=4096, ahead_bytes=4096)
    with pytest.raises(ConfigError, match="ring_steps"):
        EntryConfig(disks=(PM9A3,), memory_bytes=8192, hot_bytes=0, learn_steps=600)
    rig = Rig(tmp_path, entries=8)
    with pytest.raises(ConfigError, match="2 disks"):
        EntryStore(rig.store, EntryConfig(disks=(PM9A3,) * 2, memory_bytes=8192, hot_bytes=0), entries=8)
    rig.close()


def test_requests_are_spared_where_the_host_is_what_takes_the_time(tmp_path: Path) -> None:
    sparse = np.arange(0, 400, 3)[:40]
    counts = []
    for name, host in (("disk", 0.0), ("host", 1e-3)):
        (tmp_path / name).mkdir()
        rig = Rig(tmp_path / name, entries=400, disks=1)
        fill(rig, 400)
        slow = DiskModel(bytes_per_s=6.9e9, requests_per_s=1.1e6)
        config = EntryConfig(disks=(slow,), memory_bytes=96 * ENTRY, hot_bytes=0, host_s_per_request=host)
        other = EntryStore(rig.store, config, entries=400)
        for at in range(0, 400, 80):
            other.write(np.arange(at, at + 80), content(range(at, at + 80)))
        found = other.read(sparse)
        assert np.array_equal(other.memory.bytes[found.rows], content(sparse))
        counts.append(other.stats.requests)
        other.close()
        rig.close()
    assert counts[1] < counts[0] / 4


def test_more_is_not_read_over_than_there_is_memory_for(tmp_path: Path) -> None:
    sizes = {"memory_bytes": 300 * ENTRY, "hot_bytes": 0}
    rig = Rig(tmp_path, entries=400, disks=1, **sizes)
    fill(rig, 400)
    config = rig.entries.config
    requests = []
    for gap_entries in (0, 60, 400):
        narrow = EntryConfig(
            disks=config.disks,
            memory_bytes=300 * ENTRY,
            hot_bytes=0,
            host_s_per_request=1e-3,
            gap_bytes=gap_entries * ENTRY,
        )
        other = EntryStore(rig.store, narrow, entries=400)
        for at in range(0, 400, 80):
            other.write(np.arange(at, at + 80), content(range(at, at + 80)))
        wanted = np.concatenate([np.arange(0, 120, 2), np.arange(120, 400, 4)])
        found = other.read(wanted)
        assert np.array_equal(other.memory.bytes[found.rows], content(wanted))
        requests.append(other.stats.requests)
        other.close()
    assert requests[0] == 130
    assert requests[2] < requests[1] < requests[0], "the widest gaps that fit"
    rig.close()


# ---------------------------------------------------------------------- parts


def test_books_that_do_not_add_up_are_found() -> None:
    table = EntryMap(8, 4)
    (row,) = table.reserve(1)
    table.put(int(row), np.array([0, 1, 2, -1]), np.array([0, -1]))
    table.check_integrity()
    table.page_of[5] = row
    with pytest.raises(IntegrityError):
        table.check_integrity()
    memory = EntryMemory(8, size_bytes=4 * ENTRY, entry_bytes=ENTRY)
    memory.take(np.array([1]))
    memory.check_integrity()
    memory.slot_of[2] = memory.slot_of[1]
    with pytest.raises(IntegrityError):
        memory.check_integrity()


def test_a_slot_that_a_disk_may_still_write_to_is_given_to_nobody() -> None:
    memory = EntryMemory(8, size_bytes=2 * ENTRY, entry_bytes=ENTRY)
    memory.take(np.array([0, 1]))
    address = memory.addresses(np.array([0]))
    memory.hold_back(np.array([0]))
    memory.settle(address)
    assert memory.free == 0
    memory.settle(address[:0])
    assert memory.free == 1
    memory.check_integrity()
