"""The disk tier with everything but vLLM: what comes back is what was computed, or it is a miss."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from polder.diskstore.engine import ThreadEngine
from polder.diskstore.io import Arena
from polder.diskstore.keys import key_array
from polder.diskstore.model import DiskModel
from polder.emulation.disks import DiskFaults, EmulatedDisk, EmulatedEngine, VirtualClock
from polder.errors import ConfigError
from polder.tiers.disk.memory import DiskMemory
from polder.tiers.disk.mirror import common_inventory, inventory
from polder.tiers.disk.spill import SpillConfig
from polder.tiers.disk.striping import Striping
from polder.tiers.jobs import JobResult
from polder.tiers.slots import block_ids
from tests.emulation.files import emulated_files
from tests.tiers.disk_rig import BLOCK, DISK, HOST, PAGE, SLOT, Rig, names

FAST = DiskModel(bytes_per_s=1e12, latency_s=0.0)
ABSENT = -1


@pytest.fixture
def two(tmp_path: Path) -> list[Path]:
    return [tmp_path / "a", tmp_path / "b"]


@pytest.fixture
def rig(two: list[Path]) -> Iterator[Rig]:
    rig = Rig(two)
    yield rig
    rig.close()


def test_blocks_that_left_the_host_tier_come_back_from_disk(rig: Rig) -> None:
    keys = names(0, 40)
    rig.keep(keys)
    found = rig.ask(keys)
    assert found.count(DISK) == 24
    assert found.count(HOST) == 16
    assert not rig.load(keys).failed
    assert rig.tiers.stats()["disk_written_bytes_total"] == 40 * PAGE
    rig.check()


def test_a_spill_needs_no_block_of_the_engine(rig: Rig) -> None:
    keys = names(0, 8)
    rig.compute(keys)
    rig.kv[:] = 0x55
    rig.spill()
    assert (rig.kv == 0x55).all()
    assert int(rig.store.lookup(block_ids(keys)).present.sum()) == 8


def test_a_part_larger_than_the_arena_comes_in_chunks(two: list[Path]) -> None:
    rig = Rig(two, arena_pages=6, host_slots=4, limit_bytes=8 << 20)
    keys = names(0, 120)
    rig.keep(keys, at_once=4)
    finished = rig.load(keys)
    assert not finished.failed
    assert finished.moved[DISK][0] == 116 * BLOCK
    rig.close()


def test_a_restart_keeps_hits_and_bytes(two: list[Path]) -> None:
    rig = Rig(two)
    keys = names(0, 40)
    rig.keep(keys)
    rig.close()
    rig = Rig(two)
    assert rig.slots.unclaimed == 40
    assert len(rig.tiers.index) == 0, "nothing is entered before it is asked for"
    assert rig.ask(keys[:10]) == [DISK] * 10
    assert not rig.load(keys[:10]).failed
    rig.keep(names(100, 30))
    rig.check()
    assert not rig.load(keys).failed
    rig.close()


def test_what_a_restart_was_not_asked_for_makes_room_from_the_least_recent_end(two: list[Path]) -> None:
    rig = Rig(two, limit_bytes=3 << 20)
    capacity = rig.slots.capacity
    keys = names(0, capacity)
    rig.keep(keys)
    used = [key for key, tier in zip(keys, rig.ask(keys), strict=True) if tier == DISK]
    assert 4 <= len(used) <= 8
    rig.load(used)
    rig.close()
    rig = Rig(two, limit_bytes=3 << 20)
    assert rig.slots.unclaimed == capacity
    rig.keep(names(1000, capacity - len(used)))
    assert rig.slots.unclaimed == len(used)
    assert [key for key, tier in zip(keys, rig.tiers.find(keys).tolist(), strict=True) if tier == DISK] == used
    rig.check()
    assert rig.store.evicted == 0
    rig.close()


def test_other_weights_refuse_the_directories(two: list[Path]) -> None:
    rig = Rig(two)
    rig.keep(names(0, 8))
    rig.close()
    with pytest.raises(ConfigError, match="namespace"):
        Rig(two, namespace="others")


def test_a_full_disk_gives_up_its_worst_blocks_and_the_store_never_evicts(two: list[Path]) -> None:
    rig = Rig(two, limit_bytes=3 << 20, host_slots=8)
    keys = names(0, 3 * rig.slots.capacity)
    rig.keep(keys)
    kept = rig.ask(keys)
    assert kept[-rig.slots.capacity :].count(DISK) + kept[-8:].count(HOST) >= rig.slots.capacity - 8
    assert rig.store.evicted == 0
    assert not rig.load(keys).failed
    rig.check()
    rig.close()


def test_bytes_that_changed_in_host_memory_are_not_written(rig: Rig) -> None:
    keys = names(0, 8)
    rig.compute(keys)
    place = int(rig.tiers.index._place[rig.tiers.index._entry_of[keys[3]], HOST])
    rig.region[place * SLOT + 17] ^= 1
    (finished,) = rig.spill()
    assert finished.failed == {3: "corrupt"}
    assert rig.tiers.find(keys).tolist() == [HOST, HOST, HOST, ABSENT, HOST, HOST, HOST, HOST]
    assert not rig.store.lookup(block_ids(keys)).present[3].any()
    rig.check()


def test_a_corrupt_page_is_a_miss_and_said_so(two: list[Path]) -> None:
    rig = Rig(two, host_slots=8)
    keys = names(0, 24)
    rig.keep(keys)
    for directory in two:
        slab = np.memmap(directory / "slab", np.uint8)
        slab[::PAGE] ^= 1
        slab.flush()
    finished = rig.load(keys[:8])
    assert set(finished.failed.values()) == {"corrupt"}
    assert len(finished.failed) == 8
    assert rig.tiers.find(keys[:8]).tolist() == [ABSENT] * 8
    assert rig.tiers.stats()["tier_disk_corrupt_blocks_total"] == 8
    rig.check()
    rig.close()


# ---------------------------------------------------------------- disks that fail


def test_a_disk_that_dies_takes_its_pages_and_its_room_along(two: list[Path]) -> None:
    disks = {two[0]: EmulatedDisk(FAST), two[1]: EmulatedDisk(FAST)}
    rig = Rig(two, host_slots=8, open_file=emulated_files(disks))
    capacity = rig.slots.capacity
    keys = names(0, 40)
    rig.keep(keys)
    disks[two[0]].die()
    finished = rig.load(keys[:20])
    assert 0 < len(finished.failed) < 20
    assert rig.store.states == ("out", "ok")
    found = np.array(rig.ask(keys))
    here = rig.store.lookup(block_ids(keys)).present.any(axis=1)
    assert (here[found == DISK]).all(), "what the disk took along is told, also what nobody has tried to load"
    assert (found == ABSENT).sum() > len(finished.failed)
    assert rig.slots.stats().slots < 0.6 * capacity
    assert not rig.load(keys).failed
    rig.keep(names(500, capacity))
    rig.check()
    assert rig.store.evicted == 0
    assert rig.tiers.stats()["disk_disks_ok"] == 1
    rig.close()


@pytest.mark.parametrize("arena_pages", [48, 12])
def test_a_disk_that_hangs_keeps_a_load_no_longer_than_its_timeout(two: list[Path], arena_pages: int) -> None:
    """With small chunks the disk is not out after the first; it is not read again for that part."""
    disks = {two[0]: EmulatedDisk(FAST), two[1]: EmulatedDisk(FAST)}
    rig = Rig(
        two,
        host_slots=4,
        open_file=emulated_files(disks),
        timeout_s=2.0,
        arena_pages=arena_pages,
        limit_bytes=8 << 20,
    )
    keys = names(0, 80)
    rig.keep(keys, at_once=4)
    disks[two[0]].hang()
    started = time.monotonic()
    finished = rig.load(keys[:76])
    took = time.monotonic() - started
    assert took < 7.0, "several chunks, and the disk hung in each"
    assert 20 < len(finished.failed) < 60
    assert set(finished.failed.values()) <= {"error", "lost"}
    assert not rig.load(keys).failed
    rig.keep(names(500, 16))
    rig.check()
    started = time.monotonic()
    rig.close()
    assert time.monotonic() - started < 30.0
    disks[two[0]].recover()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_disks_that_refuse_writes_still_serve_and_nothing_makes_room_for_nothing(two: list[Path], number: int) -> None:
    disks = {directory: EmulatedDisk(FAST) for directory in two}
    rig = Rig(two, host_slots=8, open_file=emulated_files(disks))
    keys = names(0, rig.slots.capacity)
    rig.keep(keys)
    for disk in disks.values():
        disk.refuse_writes(number)
    rig.keep(names(1000, 200))
    kept = rig.ask(keys).count(DISK)
    assert kept >= rig.slots.stats().slots - 40, "a few batches were evicted for writes that failed, not all"
    assert set(rig.store.states) == {"read-only"}
    assert rig.tiers.plan_spills() is None
    assert not rig.load(keys).failed
    rig.check()
    rig.close()


def test_eio_now_and_then_costs_pages_only(two: list[Path]) -> None:
    disks = {d: EmulatedDisk(FAST, DiskFaults(fail=0.03, seed=n)) for n, d in enumerate(two)}
    rig = Rig(two, host_slots=8, open_file=emulated_files(disks))
    for round_ in range(6):
        keys = names(20 * round_, 40)
        rig.keep(keys)
        rig.ask(keys)
        rig.load(keys)
        rig.check()
    rig.close()


# ---------------------------------------------------------------- where pages lie


def test_neighbours_of_a_prefix_lie_on_different_disks_in_proportion_to_speed() -> None:
    speeds = np.array([1.0, 1.0, 0.5])
    striping = Striping(speeds)
    free = np.full(3, 1000)
    for start in (-7, 0, 3, 12345):
        for length in (5, 10, 25, 50):
            disks = striping.choose(start + np.arange(length), free, free)
            assert (np.bincount(disks, minlength=3) <= np.ceil(length * speeds / speeds.sum()) + 1).all()
    full = np.array([1000, 2, 0])
    disks = striping.choose(np.arange(50), full, np.full(3, 1000))
    assert np.bincount(disks, minlength=3).tolist() == [48, 2, 0]
    assert striping.choose(np.arange(4), np.array([1, 0, 1]), free).tolist().count(-1) == 2


def test_later_turns_go_on_where_the_prefix_ended(two: list[Path]) -> None:
    rig = Rig(two, host_slots=32)
    keys = names(0, 24)
    for end in (5, 6, 13, 24):
        rig.compute(keys[:end])
        rig.spill()
    present = rig.store.lookup(block_ids(keys)).present
    assert present.sum(axis=0).tolist() == [12, 12]
    assert (present.argmax(axis=1)[1:] != present.argmax(axis=1)[:-1]).all()
    rig.close()


def test_reads_follow_the_speeds_that_were_measured(two: list[Path]) -> None:
    clock = VirtualClock()
    slow = DiskModel(bytes_per_s=50e6, latency_s=0.0)
    models = [DiskModel(bytes_per_s=100e6, latency_s=0.0), slow]
    engine = EmulatedEngine(ThreadEngine(2), [EmulatedDisk(model, clock=clock) for model in models])
    rig = Rig(two, engine=engine, host_slots=8)
    keys = names(0, 24)
    rig.keep(keys)
    rig.load(keys[:16])
    assert rig.memory._reader.speeds()[0] == pytest.approx(2 * rig.memory._reader.speeds()[1], rel=0.05)
    rig.keep(names(100, 27))
    present = rig.store.lookup(block_ids(names(100, 27))).present
    assert abs(int(present[:, 0].sum()) - 18) <= 2, "two of three pages on the disk that is twice as fast"
    rig.close()


def test_pages_that_are_read_most_get_second_copies_within_the_budget_and_outlive_a_disk(two: list[Path]) -> None:
    disks = {directory: EmulatedDisk(FAST) for directory in two}
    spilling = SpillConfig(batch_blocks=8, copies_every_s=1.0, copies_blocks=4)
    rig = Rig(two, host_slots=4, open_file=emulated_files(disks), spilling=spilling, limit_bytes=16 << 20)
    keys = names(0, 40)
    rig.keep(keys, at_once=4)
    for _ in range(4):
        rig.ask(keys[:4])
        assert not rig.load(keys[:4]).failed
        rig.spill()
    present = rig.store.lookup(block_ids(keys)).present
    assert present.sum(axis=1).tolist() == [2] * 4 + [1] * 36
    figures = rig.tiers.stats()
    assert figures["disk_copied_bytes_total"] == 4 * PAGE
    assert figures["disk_written_bytes_total"] == 44 * PAGE
    disks[two[0]].die()
    rig.load(keys)
    assert not rig.load(keys[:4]).failed
    assert rig.ask(keys[:4]) == [DISK] * 4
    rig.check()
    rig.close()


def test_copies_make_way_when_pages_need_the_room(two: list[Path]) -> None:
    spilling = SpillConfig(batch_blocks=8, copies_every_s=1.0, copies_blocks=4)
    rig = Rig(two, host_slots=8, spilling=spilling)
    keys = names(0, rig.slots.capacity)
    rig.keep(keys)
    rig.memory._mirror.reads[:] = 9.0
    room = int(rig.store.free.sum())
    assert rig.memory.replicate(100).size_bytes > 0
    assert int(rig.memory._mirror.twice.sum()) <= max(1, room)
    rig.keep(names(1000, 3 * rig.slots.capacity))
    rig.check()
    assert rig.store.evicted == 0
    rig.close()


# ---------------------------------------------------------------- keys, the inventory, everything forgotten


def test_block_ids_differ_by_group_and_by_every_byte() -> None:
    key = bytes(range(32))
    variants = [key + group.to_bytes(4, "big") for group in range(8)]
    variants += [bytes([*key[:at], key[at] ^ 1, *key[at + 1 :]]) + b"\0\0\0\0" for at in range(32)]
    variants += [key[:16], key[:17]]
    assert len({tuple(row) for row in block_ids(variants).tolist()}) == len(variants)
    assert block_ids([]).shape == (0, 2)


def test_the_inventory_is_what_can_be_read_once_each_most_recent_first(two: list[Path]) -> None:
    rig = Rig(two, host_slots=8)
    keys = names(0, 16)
    rig.keep(keys)
    rig.load(keys[:4])
    kept = inventory(rig.store, 100)
    assert len(kept) == 16
    assert {tuple(row) for row in kept[:4].tolist()} == {tuple(row) for row in block_ids(keys[:4]).tolist()}
    assert len(inventory(rig.store, 5)) == 5
    rig.close()


def test_ranks_agree_on_what_all_of_them_have() -> None:
    one = key_array([b"%16d" % n for n in (5, 3, 8, 1)])
    other = key_array([b"%16d" % n for n in (1, 2, 3, 5)])
    assert np.array_equal(common_inventory([one, other]), key_array([b"%16d" % n for n in (5, 3, 1)]))
    none = key_array([])
    assert [len(common_inventory(ranks)) for ranks in ([one, none], [none, one], [none, none])] == [0, 0, 0]


def test_pages_beyond_the_agreed_inventory_are_forgotten(two: list[Path]) -> None:
    rig = Rig(two, host_slots=8)
    keys = names(0, 16)
    rig.keep(keys)
    agreed = block_ids(keys[:10])
    arena = Arena(6, PAGE)
    memory = DiskMemory(
        rig.store, arena, host_address=rig.region.ctypes.data, host_slot_bytes=SLOT, capacity=20, inventory=agreed
    )
    assert rig.store.lookup(block_ids(keys)).present.any(axis=1).tolist() == [True] * 10 + [False] * 6
    lost = np.concatenate((agreed, block_ids(names(90, 1))))
    memory = DiskMemory(
        rig.store, arena, host_address=rig.region.ctypes.data, host_slot_bytes=SLOT, capacity=20, inventory=lost
    )
    assert memory.state().lost.tolist() == [10], "what the store has not is told"
    rig.close()


def test_everything_dropped_is_gone_for_good_and_other_bytes_never_come_back_under_the_same_keys(
    two: list[Path],
) -> None:
    rig = Rig(two, host_slots=8)
    keys = names(0, 16)
    rig.keep(keys)
    rig.tiers.drop_all()
    rig.weights = 1
    rig.compute(keys[:8])
    assert len(rig.spill()) == 1, "the job that empties the disks, and nothing after it"
    assert not rig.store.lookup(block_ids(keys)).present.any()
    rig.tiers.unseal()
    rig.keep(keys)
    assert not rig.load(keys).failed
    rig.check()
    rig.close()


def test_new_weights_leave_the_pages_where_they_are_and_end_the_spills(two: list[Path]) -> None:
    rig = Rig(two, host_slots=8)
    keys = names(0, 24)
    rig.keep(keys)
    kept = rig.store.lookup(block_ids(keys)).present.sum()
    rig.memory.stop()
    rig.tiers.drop_all()
    rig.tiers.unseal()  # as the manager does: it is for the workers to know of the weights
    rig.weights = 1
    assert [finished.failed for finished in rig.spill()] == [{}], (
        "the job that would empty the disks tells that they are stopped"
    )
    written = rig.tiers.stats()["disk_written_bytes_total"]
    rig.keep(names(100, 40))
    assert rig.tiers.plan_spills() is None
    assert not rig.tiers.spilling
    figures = rig.tiers.stats()
    assert figures["disk_written_bytes_total"] == written
    assert figures["tier_disk_failed_blocks_total"] == figures["disk_disks_ok"] == 0
    assert rig.store.lookup(block_ids(keys)).present.sum() == kept
    rig.close()
    rig = Rig(two, host_slots=8)  # with the old weights again
    assert not rig.load(keys).failed
    rig.check()
    rig.close()


def test_a_page_in_a_new_slot_outlives_its_old_one(two: list[Path]) -> None:
    """The scheduler has dropped a place that the store still has: as after a load that failed for another reason."""
    rig = Rig(two, host_slots=4)
    keys = names(0, 4)
    rig.keep(keys, at_once=4)
    rig.keep(names(100, 4), at_once=4)
    job = rig.tiers.prepare_load(keys, tokens=64)
    rig.tiers.report(JobResult(number=job.number, failed=dict.fromkeys(range(4), "error")))
    for key in (keys[1], keys[2], keys[0], keys[3]):  # so each gets a slot that another of them had
        rig.keep([key])
    rig.keep(names(300, 20), at_once=4)
    assert rig.ask(keys) == [DISK] * 4
    assert not rig.load(keys).failed
    rig.check()
    rig.close()


def test_a_page_that_the_store_has_already_is_written_anew(rig: Rig) -> None:
    """It may be of a time before everything was dropped, by a scheduler that this worker has not heard of."""
    keys = names(0, 8)
    short = block_ids(keys)
    rig.arena.bytes[:8] = 0xAB
    assert rig.store.write(short, rig.arena.addresses[:8]).all()
    rig.keep(keys)
    rig.keep(names(100, 16))
    assert not rig.load(keys).failed


@pytest.mark.parametrize(("pages", "slot"), [(2, SLOT), (6, PAGE + 1)])
def test_an_arena_or_a_page_that_is_too_small_is_refused(rig: Rig, pages: int, slot: int) -> None:
    with pytest.raises(ConfigError, match="three pages"):
        DiskMemory(rig.store, Arena(pages, PAGE), host_address=0, host_slot_bytes=slot, capacity=1)
