"""Write-behind from the host tier to the disk: what is written when, within what bounds. The scheduler's half.

A block that has come to lie in the host tier, or was loaded from there, is a candidate. `plan` takes some in their order, asks
write_admission which deserve the disk and what the budget allows, pins them, and makes a job; a few jobs are under way at a time.
So neither a request nor the engine's blocks ever wait for a disk, and what the disks cannot keep up with leaves the host tier
unwritten.

Three kinds of jobs are the disk's own: "spill"; "tend" gives the pages that are read most a second copy, when nothing else is to
do, out of the same budget; "drop" forgets everything. All go through one lane, in their order.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from polder.arrays import IntArray
from polder.diskstore.keys import Keys
from polder.errors import ConfigError
from polder.planner.rates import LinkRate
from polder.tiers.disk_index import DiskIndex, Spill
from polder.tiers.disk_slots import DiskSlots
from polder.tiers.index import Places, key_numbers
from polder.tiers.pages import Pages, no_keys, short_keys
from polder.tiers.slots import Recipe
from polder.tiers.statistics import TierStatistics
from polder.tiers.transfer import Direction, Finished, Job, Part
from polder.tiers.write_admission import WriteAdmission, WriteBudget

__all__ = ["SpillConfig", "Spills", "load_pages"]

_DAY_S, _RATE_MEMORY_S = 86400.0, 3600.0
_LOOKED_AT = 8
"""Candidates looked at in one step, in batches: admission may refuse most."""

_NEWS_KEPT = 256


@dataclass(frozen=True, kw_only=True)
class SpillConfig:
    """Raises ConfigError for what cannot be meant."""

    written_bytes_per_day: int | None = None
    """All disks and ranks together; None: unlimited. An hour's worth has to be a block at least, or nothing is written."""
    least_reuse: float = 0.3
    """See WriteAdmission."""
    batch_blocks: int = 64
    """Of one job: long enough to keep all disks busy, short enough that the host tier is not pinned."""
    jobs: int = 2
    """Spills under way."""
    copies_every_s: float = 30.0
    copies_blocks: int = 32
    """So many pages at most get a second copy, so often at most."""

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


class Spills:
    """See above. Not thread-safe: it lives in the scheduler's thread, as part of a TierSet."""

    def __init__(
        self,
        index: DiskIndex,
        slots: DiskSlots,
        config: SpillConfig,
        statistics: TierStatistics,
        link: LinkRate,
        *,
        ranks: int,
    ) -> None:
        """`link`: of writes to the disk."""
        self._index, self._slots, self._config, self._ranks = index, slots, config, ranks
        self._statistics, self._link, self.tier = statistics, link, index.disk
        remembered = min(1 << 21, max(1 << 12, 2 * index.capacity))
        self.admission = WriteAdmission(remembered=remembered, least_reuse=config.least_reuse)
        self._budget = WriteBudget(config.written_bytes_per_day)
        self._candidates: dict[int, None] = {}
        self._open: dict[int, _Open] = {}
        self._news: dict[int, list[Finished]] = {}
        self._written_s = np.full(slots.capacity, np.nan)  # since when a slot has its page, where that is known
        self._drop_due = self._sealed = False
        self._writable, self._disks_ok = True, math.nan
        self._loaded, self._tended_s = False, -math.inf
        self.written_bytes = self.spilled_blocks = self.copied_bytes = 0
        self.refused_by_admission = self.refused_by_budget = 0
        self._rate, self._rated_s = 0.0, 0.0

    # ------------------------------------------------------------------ what happens in the other tiers

    def asked(self, keys: Sequence[bytes], now: float) -> None:
        self.admission.asked(key_numbers(keys), now)

    def computed(self, keys: Sequence[bytes], now: float) -> None:
        self.admission.computed(key_numbers(keys), now)

    def moved(self, places: Places) -> None:
        """A job of the engine's blocks has ended: what it left in the host tier may be written."""
        self._candidates |= dict.fromkeys(self._index.in_host(places).tolist())
        self._loaded |= bool((places.tiers == self.tier).any())

    def drop_all(self) -> None:
        """The index was emptied. The disks are, too, by the next job; and nothing is written any more, see `resume`."""
        for job in self._open.values():  # the workers carry it out all the same, and its writes count
            job.spill = None
        self._news.clear()
        self._candidates.clear()
        self._written_s[:] = np.nan
        self._drop_due = self._sealed = True

    def resume(self) -> None:
        """The weights are those that the store's namespace names, although everything was dropped."""
        self._sealed = False

    # ------------------------------------------------------------------ jobs

    @property
    def busy(self) -> bool:
        """Whether `plan` will have something to do, or to wait for, though nothing happens meanwhile."""
        return bool(self._open) or (bool(self._candidates) and self._writable and not self._sealed)

    def plan(self, number: int, now: float) -> Job | None:
        """The next job, with this number; None when there is nothing to do now."""
        if self._drop_due:
            self._drop_due = False
            return self._control(number, "drop")
        if self._sealed or not self._writable or self._slots.losing or len(self._open) >= self._config.jobs:
            return None
        spill = self._next_spill(now) if self._candidates else None
        if spill is not None:
            size = len(spill.targets.keys) * self._slots.slot_bytes
            self._open[number] = _Open(direction="spill", spill=spill, granted_bytes=size)
            return Job(number=number, direction="spill", parts=(self._part(spill),))
        return self._tend(number, now) if not self._open else None

    def _next_spill(self, now: float) -> Spill | None:
        chosen = np.empty(0, dtype=np.int64)
        for _ in range(_LOOKED_AT):
            some = list(itertools.islice(self._candidates, self._config.batch_blocks - len(chosen)))
            for entry in some:
                del self._candidates[entry]
            entries = self._index.settle_known(self._index.spillable(np.array(some, dtype=np.int64)))
            if len(entries):
                wanted = self.admission.judge(self._index.numbers(entries), now)
                self.refused_by_admission += int((~wanted).sum())
                chosen = np.concatenate((chosen, entries[wanted]))
            if len(chosen) >= self._config.batch_blocks or not self._candidates:
                break
        granted = self._budget.take(len(chosen), self._slots.slot_bytes, now)
        self.refused_by_budget += len(chosen) - granted
        if not granted:
            return None
        prepared = self._index.prepare_spill(chosen[:granted])
        left = granted - (len(prepared[0].targets.keys) if prepared else 0)
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

    def _part(self, spill: Spill) -> Part:
        targets, count = spill.targets, len(spill.targets.keys)
        pages = Pages(
            keys=short_keys(targets.keys), sources=spill.sources.slots, stripes=self._index.stripes[targets.entries]
        )
        return Part(
            tier=self.tier,
            rows=np.arange(count),
            blocks=np.empty(0, dtype=np.int64),
            slots=targets.slots,
            seeds=key_numbers(targets.keys),
            recipe=_no_recipe(targets.slots),
            pages=pages,
        )

    def _tend(self, number: int, now: float) -> Job | None:
        due = self._loaded and now - self._tended_s >= self._config.copies_every_s
        if not due or self._disks_ok <= self._ranks:  # on one disk a page has no second place
            return None
        self._tended_s, self._loaded = now, False
        copies = self._budget.take(self._config.copies_blocks, self._slots.slot_bytes, now)
        return self._control(number, "tend", copies) if copies else None

    def _control(self, number: int, direction: Direction, copies: int = 0) -> Job:
        self._open[number] = _Open(direction=direction, granted_bytes=copies * self._slots.slot_bytes)
        none = np.empty(0, dtype=np.int64)
        seeds = np.empty(0, dtype=np.uint64)
        part = Part(tier=self.tier, rows=none, blocks=none, slots=none, seeds=seeds, recipe=_no_recipe(none))
        return Job(number=number, direction=direction, parts=(part,), copies=copies)

    # ------------------------------------------------------------------ the workers report

    def owns(self, number: int) -> bool:
        return number in self._open

    def report(self, finished: Finished, now: float) -> None:
        """One rank has ended one of these jobs."""
        job = self._open[finished.number]
        size, seconds = finished.moved.get(self.tier, (0, 0.0))
        if job.direction == "spill":
            self._link.observe(size, seconds, now)
        self._statistics.moved(self.tier, "store", size, seconds)
        for reason in finished.failed.values():  # what was corrupt was so in the host tier already
            self._statistics.failed(self._index.host if reason == "corrupt" else self.tier, "store", reason)
        job.written_bytes += size
        job.failed |= {row: why for row, why in finished.failed.items() if job.failed.get(row) != "corrupt"}
        job.acks += 1
        if job.acks == self._ranks:
            del self._open[finished.number]
            self._close(job, now)

    def _close(self, job: _Open, now: float) -> None:
        self._count(job.written_bytes, now)
        unused = job.granted_bytes - job.written_bytes if job.direction == "tend" else 0
        self._budget.settle(job.granted_bytes, now, unused_bytes=max(0, unused))
        if job.direction == "tend":
            self.copied_bytes += job.written_bytes
        if job.spill is not None:
            self._index.complete_spill(
                job.spill, sorted(job.failed), sorted(row for row, why in job.failed.items() if why == "corrupt")
            )
            self.spilled_blocks += len(job.spill.targets.keys) - len(job.failed)

    def notice(self, finished: Finished) -> None:
        """What any job of a rank says about its disks."""
        if self.tier in finished.lost:
            self._slots.report_lost(finished.lost[self.tier])
        if self.tier not in finished.room:
            return
        while len(self._news) > _NEWS_KEPT:  # of a rank that could not say how its disks fare
            del self._news[next(iter(self._news))]
        news = self._news.setdefault(finished.number, [])
        news.append(finished)
        if len(news) == self._ranks:
            del self._news[finished.number]
            self._slots.set_room(min(report.room[self.tier] for report in news))
            self._writable = min(report.figures["disks_ok"] for report in news) > 0
            self._disks_ok = sum(report.figures["disks_ok"] for report in news)

    # ------------------------------------------------------------------

    def figures(self, now: float) -> dict[str, float]:
        used = self._slots.statistics().used + self._slots.unbound
        figures = {
            f"tier_{self._slots.name}_used_bytes": float(used * self._slots.slot_bytes),
            "disk_written_bytes_total": float(self.written_bytes),
            "disk_copied_bytes_total": float(self.copied_bytes),
            "disk_spilled_blocks_total": float(self.spilled_blocks),
            "disk_admission_refused_blocks_total": float(self.refused_by_admission),
            "disk_budget_refused_blocks_total": float(self.refused_by_budget),
            "disk_written_bytes_per_day": self._rate * math.exp((self._rated_s - now) / _RATE_MEMORY_S) * _DAY_S,
        }
        return figures if math.isnan(self._disks_ok) else figures | {"disk_disks_ok": self._disks_ok}

    def _count(self, size_bytes: int, now: float) -> None:
        self.written_bytes += size_bytes
        self._rate = self._rate * math.exp((self._rated_s - now) / _RATE_MEMORY_S) + size_bytes / _RATE_MEMORY_S
        self._rated_s = now


def load_pages(keys: Sequence[bytes]) -> Pages:
    """Of a part that loads these blocks."""
    none: IntArray = np.empty(0, dtype=np.int64)
    pages: Keys = short_keys(keys) if keys else no_keys()
    return Pages(keys=pages, sources=none, stripes=none)


def _no_recipe(slots: IntArray) -> Recipe:
    none = np.empty((len(slots), 0, 0), dtype=np.int64)
    return Recipe(lender="", slots=slots, chunks=none, epochs=none)
