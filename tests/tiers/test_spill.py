"""Write-behind as the scheduler sees it: what is written when, how much at a time, what is counted."""

from __future__ import annotations

import pickle

import numpy as np
import numpy.typing as npt
import pytest

from polder import metrics
from polder.errors import ConfigError
from polder.tiers.disk.admission import WriteAdmission
from polder.tiers.disk.slots import DiskSlots
from polder.tiers.disk.spill import SpillConfig
from polder.tiers.eviction.policy import Lru
from polder.tiers.host import HostSlots
from polder.tiers.index import ABSENT
from polder.tiers.jobs import Job, JobResult
from polder.tiers.slots import Slots, block_ids
from polder.tiers.tierset import TierSet
from tests.tiers.disk_rig import Clock, names

SLOT, PAGE = 1 << 16, 1 << 16
HOST, DISK = 0, 1
DAY_S = 86400.0


class Machine:
    def __init__(self, *, host: int = 32, disk: int = 64, ranks: int = 1, **config: float) -> None:
        self.clock, self.ranks = Clock(), ranks
        self.disk = DiskSlots(name="disk", capacity=disk, slot_bytes=PAGE * ranks)
        slots: list[Slots] = [HostSlots(name="host", size_bytes=host * SLOT, slot_bytes=SLOT), self.disk]
        self.tiers = TierSet(
            slots,
            Lru(host + disk),
            ranks=ranks,
            block_tokens=16,
            clock=self.clock,
            spilling=SpillConfig(**{"batch_blocks": 8, **config}),  # type: ignore[arg-type]
        )

    def store(self, keys: list[bytes]) -> None:
        prepared = self.tiers.prepare_store(keys, np.arange(len(keys)))
        assert prepared is not None
        self.end(prepared[1])

    def end(self, job: Job, failed: dict[int, str] | None = None, *, seconds: float = 0.01, ok: int = 2) -> None:
        for _ in range(self.ranks):
            finished = JobResult(number=job.number, failed=failed or {})  # type: ignore[arg-type]
            for part in job.parts:
                count = len(part.rows) + job.copies - len(failed or {})
                finished.moved[part.tier] = (count * PAGE, seconds)
                if part.tier == DISK:
                    finished.room[DISK] = self.disk.capacity
                    finished.gauges["disks_ok"] = ok
            self.tiers.report(pickle.loads(pickle.dumps(finished)))
        self.tiers.check_integrity()

    def plan(self) -> Job:
        job = self.tiers.plan_spills()
        assert job is not None
        return pickle.loads(pickle.dumps(job))  # type: ignore[no-any-return]

    def stat(self, name: str) -> float:
        return self.tiers.stats()[name]


def test_few_spills_are_under_way_and_each_is_bounded() -> None:
    machine = Machine()
    machine.store(names(0, 20))
    jobs = [machine.plan(), machine.plan()]
    assert machine.tiers.plan_spills() is None
    assert [len(job.parts[0].rows) for job in jobs] == [8, 8]
    machine.end(jobs[0])
    assert len(machine.plan().parts[0].rows) == 4


def test_a_job_says_what_the_worker_needs() -> None:
    machine = Machine()
    keys = names(0, 5)
    machine.store(keys)
    part = machine.plan().parts[0]
    assert np.array_equal(part.ids, block_ids(keys))
    assert np.diff(part.stripes).tolist() == [1] * 4
    assert len(set(part.slots.tolist())) == len(set(part.sources.tolist())) == 5


def test_a_block_that_is_being_spilled_is_not_evicted() -> None:
    machine = Machine(host=8)
    machine.store(names(0, 8))
    job = machine.plan()
    assert machine.tiers.prepare_store(names(100, 8), np.arange(8)) is None
    machine.end(job)
    machine.store(names(100, 8))
    assert machine.tiers.find(names(0, 8)).tolist() == [DISK] * 8


def test_what_failed_is_not_on_disk_and_what_was_corrupt_is_nowhere() -> None:
    machine = Machine()
    machine.store(names(0, 4))
    machine.end(machine.plan(), {1: "error", 2: "corrupt"})
    assert machine.tiers.find(names(0, 4)).tolist() == [HOST, HOST, ABSENT, HOST]
    assert machine.disk.stats().used == 2
    assert machine.stat("tier_disk_failed_blocks_total") == 1
    assert machine.stat("tier_host_corrupt_blocks_total") == 1
    assert machine.stat("disk_spilled_blocks_total") == 2


def test_every_rank_must_have_written_a_page_before_it_is_found() -> None:
    machine = Machine(host=4, ranks=2)
    machine.store(names(0, 4))
    job = machine.plan()
    finished = JobResult(number=job.number, moved={DISK: (4 * PAGE, 0.1)})
    machine.tiers.report(finished)
    assert machine.disk.stats().used == 4
    assert machine.tiers.spilling
    machine.tiers.report(JobResult(number=job.number, failed={0: "error"}, moved={DISK: (3 * PAGE, 0.1)}))
    assert machine.disk.stats().used == 3
    assert machine.stat("disk_written_bytes_total") == 7 * PAGE
    assert machine.stat("tier_disk_store_seconds_total") == pytest.approx(0.2)
    machine.tiers.check_integrity()


def test_the_budget_bounds_what_is_written_and_says_what_it_refused() -> None:
    machine = Machine(written_bytes_per_day=24 * 10 * PAGE)
    machine.store(names(0, 30))
    written = 0
    while (job := machine.tiers.plan_spills()) is not None:
        written += len(job.parts[0].rows)
        machine.end(job)
    assert machine.tiers.plan_spills() is None
    assert written == 10, "an hour's worth"
    assert machine.stat("disk_budget_refused_blocks_total") == 20
    machine.clock.now += 1900.0
    machine.tiers.asked(names(0, 30), tokens=1)
    machine.end(machine.tiers.prepare_load(names(0, 30), tokens=30 * 16))
    assert len(machine.plan().parts[0].rows) == 5


def test_what_is_not_admitted_is_written_when_it_is_used_again() -> None:
    machine = Machine(least_reuse=0.5)
    for request in range(100):
        keys = names(100 * request, 16)
        machine.clock.now += 1.0
        machine.tiers.asked(keys, tokens=16 * 16)
        machine.tiers.reuse.open = True
        machine.store(keys)
        while (job := machine.tiers.plan_spills()) is not None:
            machine.end(job)
    refused = machine.stat("disk_admission_refused_blocks_total")
    assert refused > 800
    machine.tiers.asked(keys, tokens=16 * 16)
    machine.end(machine.tiers.prepare_load(keys, tokens=16 * 16))
    assert len(machine.plan().parts[0].rows) == 8
    assert len(machine.plan().parts[0].rows) == 8
    assert machine.stat("disk_admission_refused_blocks_total") == refused


def test_nothing_is_spilled_while_blocks_are_about_to_move_or_no_disk_can_be_written() -> None:
    machine = Machine()
    machine.store(names(0, 24))
    machine.tiers.hold()
    assert machine.tiers.plan_spills() is None
    machine.tiers.resume()
    machine.end(machine.plan(), ok=0)
    assert machine.tiers.plan_spills() is None


def test_copies_are_paid_from_the_budget_and_what_is_not_used_is_given_back() -> None:
    machine = Machine(host=4, written_bytes_per_day=24 * 12 * PAGE, copies_every_s=1.0, copies_blocks=6)
    keys = names(0, 4)
    machine.store(keys)
    machine.end(machine.plan())
    machine.store(names(100, 4))
    machine.end(machine.plan())
    assert machine.tiers.plan_spills() is None, "nothing was read from disk"
    machine.end(machine.tiers.prepare_load(keys, tokens=64))
    job = machine.plan()
    assert (job.direction, job.copies) == ("replicate", 4), "what is left of the hour"
    assert machine.tiers.plan_spills() is None
    machine.tiers.report(
        JobResult(number=job.number, moved={DISK: (PAGE, 0.1)}, room={DISK: 64}, gauges={"disks_ok": 2})
    )
    assert machine.stat("disk_copied_bytes_total") == PAGE
    machine.clock.now += 2.0
    machine.end(machine.tiers.prepare_load(keys, tokens=64))
    assert machine.plan().copies == 3


def test_everything_dropped_empties_the_disk_once_and_stops_writing() -> None:
    machine = Machine()
    machine.store(names(0, 12))
    late = machine.plan()
    machine.tiers.drop_all()
    machine.tiers.check_integrity()
    job = machine.plan()
    assert job.direction == "drop"
    machine.store(names(0, 12))
    assert machine.tiers.plan_spills() is None
    machine.end(late)
    machine.end(job)
    assert machine.tiers.plan_spills() is None
    machine.tiers.unseal()
    assert len(machine.plan().parts[0].rows) == 8


def test_a_disk_that_is_slower_than_recomputing_is_refused_and_a_fast_one_is_used() -> None:
    machine = Machine(host=8)
    keys = names(0, 8)
    machine.store(keys)
    machine.end(machine.plan())
    machine.store(names(100, 8))
    machine.tiers.prefill.observe(1000, 0.1)  # 1.6 ms a block
    tiers = machine.tiers.find(keys)
    assert tiers.tolist() == [DISK] * 8
    assert machine.tiers.plan_load(tiers).blocks == 8, "never measured: it is tried"
    machine.end(machine.tiers.prepare_load(keys, tokens=128), seconds=1.0)
    assert machine.tiers.plan_load(tiers).blocks == 0
    machine.end(machine.tiers.prepare_load(keys, tokens=128), seconds=0.001)
    for _ in range(20):
        machine.end(machine.tiers.prepare_load(keys, tokens=128), seconds=0.05 / 20)
    machine.clock.now += 1.0
    for _ in range(400):
        machine.end(machine.tiers.prepare_load(keys, tokens=128), seconds=0.002)
    assert machine.tiers.plan_load(tiers).blocks == 8
    assert machine.stat("tier_disk_hit_tokens_total") > 0


def test_stats_name_the_disk_as_every_other_tier() -> None:
    machine = Machine()
    machine.store(names(0, 8))
    machine.end(machine.plan())
    stats = machine.tiers.stats()
    assert stats["tier_disk_used_bytes"] == 8 * PAGE
    assert stats["tier_disk_size_bytes"] == 64 * PAGE
    assert stats["tier_disk_stored_bytes_total"] == 8 * PAGE
    assert stats["disk_disks_ok"] == 2
    assert {name for name in stats if name.startswith("disk_")} == {metric.key for metric in metrics.DISKS}
    assert stats["disk_written_bytes_per_day"] == pytest.approx(24 * 8 * PAGE)
    machine.clock.now += 3600.0
    assert machine.stat("disk_written_bytes_per_day") == pytest.approx(24 * 8 * PAGE / np.e)


def test_a_disk_that_cannot_be_used_at_the_start_is_a_tier_without_slots() -> None:
    machine = Machine(disk=0)
    machine.store(names(0, 8))
    assert machine.tiers.plan_spills() is None
    assert machine.stat("tier_disk_size_bytes") == 0
    machine.tiers.check_integrity()


def test_a_disk_without_host_memory_before_it_is_refused() -> None:
    disk = DiskSlots(name="disk", capacity=4, slot_bytes=PAGE)
    host = HostSlots(name="host", size_bytes=4 * SLOT, slot_bytes=SLOT)
    for slots in ([disk], [disk, host]):
        with pytest.raises(ConfigError, match="host tier"):
            TierSet(slots, Lru(8), ranks=1, block_tokens=16)
    with pytest.raises(ConfigError, match="spills"):
        SpillConfig(batch_blocks=0)


def test_what_is_written_counts_although_everything_was_dropped_meanwhile() -> None:
    machine = Machine(written_bytes_per_day=24 * 10 * PAGE)
    machine.store(names(0, 8))
    job = machine.plan()
    machine.tiers.drop_all()
    machine.tiers.unseal()
    machine.end(job)
    machine.end(machine.plan())  # the drop
    assert machine.stat("disk_written_bytes_total") == 8 * PAGE
    assert machine.stat("disk_spilled_blocks_total") == 0
    machine.store(names(8, 16))
    assert len(machine.plan().parts[0].rows) == 2, "of the ten pages of this hour"


@pytest.mark.parametrize("reasons", [("corrupt", "error"), ("error", "corrupt")])
def test_a_host_copy_that_one_rank_found_corrupt_is_dropped_whatever_others_say(reasons: tuple[str, str]) -> None:
    machine = Machine(ranks=2)
    machine.store(names(0, 2))
    job = machine.plan()
    for reason in reasons:
        machine.tiers.report(JobResult(number=job.number, failed={0: reason}))  # type: ignore[dict-item]
    assert machine.tiers.find(names(0, 2)).tolist() == [ABSENT, HOST]


def test_while_candidates_are_left_the_engine_goes_on_stepping(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(host=128)
    looked_at = 0

    def refuse_the_first(_: WriteAdmission, numbers: npt.NDArray[np.uint64], now: float) -> npt.NDArray[np.bool_]:
        nonlocal looked_at
        looked_at += len(numbers)
        return np.arange(looked_at - len(numbers), looked_at) >= 70

    monkeypatch.setattr(WriteAdmission, "judge", refuse_the_first)
    machine.store(names(0, 100))
    assert machine.tiers.plan_spills() is None, "eight batches were refused"
    steps = 0
    while machine.tiers.spilling:
        job = machine.tiers.plan_spills()
        steps += 1
        if job is not None:
            machine.end(job)
    assert machine.stat("disk_spilled_blocks_total") == 30
    assert steps < 16
