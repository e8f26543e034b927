"""All tiers of an engine together: what is offered, what is worth it, what is counted."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from polder.tiers.counters import verdict
from polder.tiers.disk.slots import DiskSlots
from polder.tiers.eviction.admission import ReuseGate
from polder.tiers.eviction.policy import Lru
from polder.tiers.host import HostSlots
from polder.tiers.index import ABSENT, PENDING
from polder.tiers.jobs import Job, JobResult
from polder.tiers.slots import block_ids
from polder.tiers.tierset import TierSet

SLOT = 1 << 20


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def keys(name: str, count: int) -> list[bytes]:
    return [hashlib.sha256(f"{name}{i}".encode()).digest() + b"\0\0\0\0" for i in range(count)]


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def tiers(clock: Clock) -> TierSet:
    fast = HostSlots(name="peer", size_bytes=8 * SLOT, slot_bytes=SLOT)
    slow = HostSlots(name="host", size_bytes=16 * SLOT, slot_bytes=SLOT)
    return TierSet([fast, slow], Lru(24), ranks=1, block_tokens=32, clock=clock)


def done(tiers: TierSet, job: Job, seconds: float = 0.001, failed: dict[int, str] | None = None) -> bool:
    moved = {part.tier: (len(part.rows) * SLOT, seconds) for part in job.parts}
    return tiers.report(JobResult(number=job.number, failed=failed or {}, moved=moved))  # type: ignore[arg-type]


def store(tiers: TierSet, names: list[bytes]) -> None:
    prepared = tiers.prepare_store(names, np.arange(len(names)))
    if prepared is not None:
        done(tiers, prepared[1])


def test_a_block_is_pending_while_it_is_written_then_found_in_the_fastest_tier(tiers: TierSet) -> None:
    names = keys("a", 10)
    prepared = tiers.prepare_store(names, np.arange(10))
    assert prepared is not None
    assert (tiers.find(names) == PENDING).all()
    assert tiers.busy
    done(tiers, prepared[1])
    assert tiers.find(names).tolist() == [0] * 8 + [1] * 2
    assert not tiers.busy
    tiers.check_integrity()


def test_what_was_full_twice_is_kept_once_before_anything_is_lost(tiers: TierSet) -> None:
    store(tiers, keys("a", 8))  # in both tiers
    store(tiers, keys("b", 16))
    assert (tiers.find(keys("a", 8)) >= 0).all()
    assert (tiers.find(keys("b", 16)) >= 0).all()
    store(tiers, keys("c", 1))
    assert int((tiers.find(keys("a", 8)) == ABSENT).sum()) == 1, "24 slots: one block has to go"


def test_a_load_that_fails_is_reported_dropped_and_counted(tiers: TierSet) -> None:
    names = keys("a", 3)
    store(tiers, names)
    job = tiers.prepare_load(names, tokens=32 * len(names))
    assert done(tiers, job, failed={1: "corrupt"})
    assert tiers.find(names).tolist() == [0, 1, 0], "its copy in the other tier is left"
    assert tiers.stats()["tier_peer_corrupt_blocks_total"] == 1
    assert tiers.stats()["tier_failed_loads_total"] == 1
    tiers.check_integrity()


def test_a_slow_link_is_refused_and_tried_again_now_and_then(tiers: TierSet, clock: Clock) -> None:
    names = keys("a", 8)
    store(tiers, names)
    tiers.prefill.observe(1000, 0.1)  # 0.1 ms a token, 3.2 ms a block
    slow = np.zeros(8, dtype=np.int64)
    assert tiers.plan_load(slow).blocks == 8, "never measured: it is tried"
    done(tiers, tiers.prepare_load(names, tokens=32 * len(names)), seconds=8 * 0.5)
    clock.now = 1.0
    assert tiers.plan_load(slow).blocks == 0
    clock.now = 10.0
    assert tiers.plan_load(slow).blocks == 1, "a probe"
    assert tiers.plan_load(slow).blocks == 0, "not twice at once"
    tiers.refused(8)
    assert tiers.stats()["tier_refused_tokens_total"] == 8 * 32


def test_everything_is_forgotten_when_the_weights_change_and_late_reports_are_void(tiers: TierSet) -> None:
    names = keys("a", 6)
    store(tiers, names)
    loading = tiers.prepare_load(names, tokens=32 * len(names))
    writing = tiers.prepare_store(keys("b", 3), np.arange(3))
    assert writing is not None
    tiers.drop_all()
    assert (tiers.find(names) == ABSENT).all()
    assert not done(tiers, loading, failed={0: "lost"})
    done(tiers, writing[1])
    assert (tiers.find(keys("b", 3)) == ABSENT).all()
    tiers.check_integrity()


def test_jobs_that_a_reset_has_forgotten_are_under_way_until_every_rank_has_reported(clock: Clock) -> None:
    """Workers still read and write the engine's blocks, which must not move or lose their pages."""
    tier = HostSlots(name="host", size_bytes=16 * SLOT, slot_bytes=SLOT)
    tiers = TierSet([tier], Lru(16), ranks=2, block_tokens=32, clock=clock)
    names = keys("a", 2)
    writing = tiers.prepare_store(names, np.arange(2))
    assert writing is not None
    tiers.report(JobResult(number=writing[1].number))
    tiers.drop_all()
    assert tiers.busy
    tiers.report(JobResult(number=writing[1].number))
    assert not tiers.busy


def test_nothing_is_written_while_blocks_are_about_to_move(tiers: TierSet) -> None:
    tiers.hold()
    assert tiers.prepare_store(keys("a", 4), np.arange(4)) is None
    tiers.resume()
    assert tiers.prepare_store(keys("a", 4), np.arange(4)) is not None


def test_every_rank_must_report_before_a_block_is_found(clock: Clock) -> None:
    slots = HostSlots(name="host", size_bytes=4 * SLOT, slot_bytes=SLOT)
    tiers = TierSet([slots], Lru(4), ranks=2, block_tokens=32, clock=clock)
    prepared = tiers.prepare_store(keys("a", 2), np.arange(2))
    assert prepared is not None
    done(tiers, prepared[1])
    assert (tiers.find(keys("a", 2)) == PENDING).all()
    done(tiers, prepared[1], failed={1: "lost"})
    assert tiers.find(keys("a", 2)).tolist() == [0, ABSENT]


def test_writing_stops_where_nothing_comes_back_and_resumes_when_something_does() -> None:
    gate = ReuseGate(remembered=2000)
    for i in range(40):
        gate.asked(keys(f"once{i}-", 16))
        gate.computed(keys(f"once{i}-", 16))
    assert not gate.open
    for i in range(30, 40):
        assert gate.asked(keys(f"once{i}-", 16)) == 16
    assert gate.open


def test_the_verdict_is_one_line_of_what_was_saved_and_paid(tiers: TierSet) -> None:
    assert verdict({}) == ""
    names = keys("a", 4)
    store(tiers, names)
    tiers.prefill.observe(1000, 1.0)
    done(tiers, tiers.prepare_load(names, tokens=32 * len(names)))
    line = verdict(tiers.stats())
    assert line.startswith("tiers saved 0.128 s of prefill, cost ")
    assert "written never read" in line


def test_what_a_step_has_found_it_can_load_whatever_is_lost_meanwhile(clock: Clock) -> None:
    """A disk takes thousands of pages along; look-ups of one step must not see them go one after another."""
    count = 6000
    disk = DiskSlots(name="disk", capacity=count, slot_bytes=64, inventory=block_ids(keys("p", count)))
    tiers = TierSet(
        [HostSlots(name="host", size_bytes=64, slot_bytes=1), disk],
        Lru(count + 64),
        ranks=1,
        block_tokens=16,
        clock=clock,
    )
    assert (tiers.find(keys("p", count)) >= 0).all()
    job = tiers.prepare_load(keys("p", 4), tokens=64)
    lost = np.arange(0, count, 2)
    tiers.report(JobResult(number=job.number, lost={1: lost}, room={1: count // 2}, gauges={"disks_ok": 1.0}))
    wanted = keys("p", 200)
    for _ in range(3):  # as often as a look-up asks
        assert (tiers.find(wanted) >= 0).all()
    tiers.prepare_load(wanted, tokens=1)
    while disk.losing:
        tiers.refresh()
    assert (tiers.find(keys("p", count)) < 0).sum() == count // 2
    tiers.check_integrity()


@pytest.mark.parametrize("ranks", [1, 4])
def test_ranks_load_at_the_same_time_so_a_load_takes_as_long_with_many_as_with_one(clock: Clock, ranks: int) -> None:
    tiers = TierSet(
        [HostSlots(name="host", size_bytes=64 * ranks, slot_bytes=ranks)],
        Lru(64),
        ranks=ranks,
        block_tokens=16,
        clock=clock,
    )
    prepared = tiers.prepare_store(keys("a", 32), np.arange(32))
    assert prepared is not None
    job = prepared[1]
    for _ in range(2):  # it is stored, and loaded
        for _ in range(ranks):
            tiers.report(JobResult(number=job.number, moved={0: (32, 0.1)}))
        job = tiers.prepare_load(keys("a", 32), tokens=512)
    for _ in range(ranks):
        tiers.report(JobResult(number=job.number, moved={0: (32, 0.1)}))
    tiers.prefill.observe(512, 0.154)
    assert tiers.plan_load(tiers.find(keys("a", 32))).blocks == 32
