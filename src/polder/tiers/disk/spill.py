"""Writes the disk tier behind the host tier: which blocks are written, when, and how many. The scheduler's half.

A block that was copied to the host tier, or loaded from it, is a candidate. In every step `plan` takes some candidates
in their order, asks admission.py which of them are worth the disk's endurance and how many the daily budget
allows, pins them in the host tier and makes a job. Only a few jobs are under way at a time. So no request and no block
of the engine ever waits for a disk, and blocks that the disks cannot keep up with leave the host tier unwritten.

There are three kinds of jobs, carried out by one thread of each worker in their order:

    spill      copies blocks from the host tier to the disks
    replicate  gives the pages that are read most a second copy on another disk, when there is nothing else to do
    drop       forgets all pages
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from polder.errors import ConfigError
from polder.planner.rates import LinkRate
from polder.tiers.counters import TierCounters
from polder.tiers.disk.admission import WriteAdmission, WriteBudget
from polder.tiers.index import BlockIndex, Spill
from polder.tiers.jobs import Direction, Job, JobResult, Part
from polder.tiers.slots import Slots, block_ids
from polder.tiers.table import Places

__all__ = ["SpillConfig", "Spiller"]

_DAY_S, _RATE_MEMORY_S = 86400.0, 3600.0
_LOOKED_AT = 8
"""So many batches of candidates are looked at in one step, because admission may refuse most of them."""

_REPORTS_KEPT = 256


@dataclass(frozen=True, kw_only=True)
class SpillConfig:
    """Raises ConfigError for invalid numbers."""

    written_bytes_per_day: int | None = None
    """The limit for all disks and ranks together; None: unlimited. If the limit of an hour is less than one block,
    nothing is written."""
    least_reuse: float = 0.3
    """See WriteAdmission."""
    batch_blocks: int = 64
    """Blocks in one job: enough to keep all disks busy, and not so many that much of the host tier is pinned."""
    jobs: int = 2
    """The most spill jobs under way at a time."""
    copies_every_s: float = 30.0
    copies_blocks: int = 32
    """Every `copies_every_s` at most, so many pages at most get a second copy."""

    def __post_init__(self) -> None:
        if min(self.batch_blocks, self.jobs) < 1 or self.copies_blocks < 0:
            raise ConfigError(f"spills of {self.batch_blocks} blocks, {self.jobs} at a time; write numbers from 1")


@dataclass(kw_only=True)
class _Open:
    """A job under way."""

    direction: Direction
    spill: Spill | None = None
    granted_bytes: int = 0
    written_bytes: int = 0
    acks: int = 0
    failed: dict[int, str] = field(default_factory=dict)


class Spiller:
    """See the module's docstring. Not thread-safe: it belongs to the scheduler's thread."""

    def __init__(
        self,
        index: BlockIndex,
        slots: Slots,
        config: SpillConfig,
        counters: TierCounters,
        link: LinkRate,
        *,
        ranks: int,
    ) -> None:
        """`link`: the measured speed of writes to the disk."""
        self._index, self._slots, self._config, self._ranks = index, slots, config, ranks
        self._counters, self._link, self.tier = counters, link, index.behind
        remembered = min(1 << 21, max(1 << 12, 2 * index.capacity))
        self.admission = WriteAdmission(remembered=remembered, least_reuse=config.least_reuse)
        self._budget = WriteBudget(config.written_bytes_per_day)
        self._candidates: dict[int, None] = {}
        self._open: dict[int, _Open] = {}
        self._reports: dict[int, list[JobResult]] = {}
        self._written_s = np.full(
            slots.capacity, np.nan
        )  # [slots] when the page in it was written; NaN where that is not known
        self._drop_due = self._sealed = False
        self._writable, self._disks_ok = True, math.nan
        self._loaded, self._replicated_s = False, -math.inf
        self.written_bytes = self.spilled_blocks = self.copied_bytes = 0
        self.refused_by_admission = self.refused_by_budget = 0
        self._rate, self._rated_s = 0.0, 0.0

    # ------------------------------------------------------------------ what happens in the other tiers

    def asked(self, keys: Sequence[bytes], now: float) -> None:
        self.admission.asked(block_ids(keys)[:, 0], now)

    def computed(self, keys: Sequence[bytes], now: float) -> None:
        self.admission.computed(block_ids(keys)[:, 0], now)

    def moved(self, places: Places) -> None:
        """A load or store has ended: the blocks that it left in the host tier are candidates."""
        self._candidates |= dict.fromkeys(self._index.spillable(np.unique(places.entries)).tolist())
        self._loaded |= bool((places.tiers == self.tier).any())

    def drop_all(self) -> None:
        """The index was emptied. The next job empties the disks, and nothing is written until `unseal`."""
        for job in self._open.values():  # the workers still carry it out, and its writes count
            job.spill = None
        self._reports.clear()
        self._candidates.clear()
        self._written_s[:] = np.nan
        self._drop_due = self._sealed = True

    def unseal(self) -> None:
        """The weights are still those that the store's namespace names, although everything was dropped."""
        self._sealed = False

    # ------------------------------------------------------------------ jobs

    @property
    def busy(self) -> bool:
        """Whether `plan` will have something to do, or to wait for, even if no request comes."""
        return bool(self._open) or (bool(self._candidates) and self._writable and not self._sealed)

    def plan(self, number: int, now: float) -> Job | None:
        """Makes the next job, with this number; None when there is nothing to do now."""
        if self._drop_due:
            self._drop_due = False
            return self._control(number, "drop")
        if self._sealed or not self._writable or self._slots.losing or len(self._open) >= self._config.jobs:
            return None
        spill = self._next_spill(now) if self._candidates else None
        if spill is not None:
            size = len(spill.targets) * self._slots.slot_bytes
            self._open[number] = _Open(direction="spill", spill=spill, granted_bytes=size)
            return self._spill_job(number, spill)
        return self._replicate(number, now) if not self._open else None

    def _next_spill(self, now: float) -> Spill | None:
        chosen = np.empty(0, dtype=np.int64)
        for _ in range(_LOOKED_AT):
            some = list(itertools.islice(self._candidates, self._config.batch_blocks - len(chosen)))
            for entry in some:
                del self._candidates[entry]
            entries = self._index.adopt_entries(self._index.spillable(np.array(some, dtype=np.int64)))
            if len(entries):
                wanted = self.admission.judge(self._index.ids[entries, 0], now)
                self.refused_by_admission += int((~wanted).sum())
                chosen = np.concatenate((chosen, entries[wanted]))
            if len(chosen) >= self._config.batch_blocks or not self._candidates:
                break
        granted = self._budget.take(len(chosen), self._slots.slot_bytes, now)
        self.refused_by_budget += len(chosen) - granted
        if not granted:
            return None
        prepared = self._index.prepare_spill(chosen[:granted])
        left = granted - (len(prepared[0].targets) if prepared else 0)
        if left:
            self._budget.settle(left * self._slots.slot_bytes, now, unused_bytes=left * self._slots.slot_bytes)
        if prepared is None:
            return None
        spill, evicted = prepared
        ages = now - self._written_s[evicted]
        if np.isfinite(ages).any():
            age, known = float(np.nanmean(ages)), self.admission.lifetime_s
            self.admission.lifetime_s = age if math.isinf(known) else known + 0.1 * (age - known)
        self._written_s[spill.targets.slots] = now
        return spill

    def _spill_job(self, number: int, spill: Spill) -> Job:
        targets = spill.targets
        part = Part(
            tier=self.tier,
            rows=np.arange(len(targets)),
            slots=targets.slots,
            ids=self._index.ids[targets.entries],
            sources=spill.sources.slots,
            stripes=self._index.stripes[targets.entries],
        )
        return Job(number=number, direction="spill", parts=(part,))

    def _replicate(self, number: int, now: float) -> Job | None:
        due = self._loaded and now - self._replicated_s >= self._config.copies_every_s
        if not due or self._disks_ok <= self._ranks:  # on one disk a page has no second place
            return None
        self._replicated_s, self._loaded = now, False
        copies = self._budget.take(self._config.copies_blocks, self._slots.slot_bytes, now)
        return self._control(number, "replicate", copies) if copies else None

    def _control(self, number: int, direction: Direction, copies: int = 0) -> Job:
        self._open[number] = _Open(direction=direction, granted_bytes=copies * self._slots.slot_bytes)
        none = np.empty(0, dtype=np.int64)
        part = Part(tier=self.tier, rows=none, slots=none, ids=np.empty((0, 2), dtype=np.uint64))
        return Job(number=number, direction=direction, parts=(part,), copies=copies)

    # ------------------------------------------------------------------ the workers report

    def owns(self, number: int) -> bool:
        return number in self._open

    def report(self, finished: JobResult, now: float) -> None:
        """Takes one rank's result of one of these jobs."""
        job = self._open[finished.number]
        size, seconds = finished.moved.get(self.tier, (0, 0.0))
        if job.direction == "spill":
            self._link.observe(size, seconds, now)
        self._counters.moved(self.tier, "store", size, seconds)
        for reason in finished.failed.values():  # corrupt bytes were found in the host tier
            self._counters.failed(self._index.source if reason == "corrupt" else self.tier, "store", reason)
        job.written_bytes += size
        job.failed |= {row: why for row, why in finished.failed.items() if job.failed.get(row) != "corrupt"}
        job.acks += 1
        if job.acks == self._ranks:
            del self._open[finished.number]
            self._close(job, now)

    def _close(self, job: _Open, now: float) -> None:
        self._count(job.written_bytes, now)
        unused = job.granted_bytes - job.written_bytes if job.direction == "replicate" else 0
        self._budget.settle(job.granted_bytes, now, unused_bytes=max(0, unused))
        if job.direction == "replicate":
            self.copied_bytes += job.written_bytes
        if job.spill is not None:
            self._index.complete_spill(
                job.spill, sorted(job.failed), sorted(row for row, why in job.failed.items() if why == "corrupt")
            )
            self.spilled_blocks += len(job.spill.targets) - len(job.failed)

    def notice(self, finished: JobResult) -> None:
        """Takes what a rank reports about its disks with any job."""
        if self.tier in finished.lost:
            self._slots.report_lost(finished.lost[self.tier])
        if self.tier not in finished.room:
            return
        while len(self._reports) > _REPORTS_KEPT:  # a rank could not report on its disks
            del self._reports[next(iter(self._reports))]
        reports = self._reports.setdefault(finished.number, [])
        reports.append(finished)
        if len(reports) == self._ranks:
            del self._reports[finished.number]
            self._slots.set_room(min(report.room[self.tier] for report in reports))
            self._writable = min(report.gauges["disks_ok"] for report in reports) > 0
            self._disks_ok = sum(report.gauges["disks_ok"] for report in reports)

    # ------------------------------------------------------------------

    def stats(self, now: float) -> dict[str, float]:
        used = self._slots.stats().used + self._slots.unclaimed
        stats = {
            f"tier_{self._slots.name}_used_bytes": float(used * self._slots.slot_bytes),
            "disk_written_bytes_total": float(self.written_bytes),
            "disk_copied_bytes_total": float(self.copied_bytes),
            "disk_spilled_blocks_total": float(self.spilled_blocks),
            "disk_admission_refused_blocks_total": float(self.refused_by_admission),
            "disk_budget_refused_blocks_total": float(self.refused_by_budget),
            "disk_written_bytes_per_day": self._rate * math.exp((self._rated_s - now) / _RATE_MEMORY_S) * _DAY_S,
        }
        return stats if math.isnan(self._disks_ok) else stats | {"disk_disks_ok": self._disks_ok}

    def _count(self, size_bytes: int, now: float) -> None:
        self.written_bytes += size_bytes
        self._rate = self._rate * math.exp((self._rated_s - now) / _RATE_MEMORY_S) + size_bytes / _RATE_MEMORY_S
        self._rated_s = now
