"""All tiers of one engine, as its scheduler sees them: which blocks can be loaded, which are worth it, and where blocks
are written.

    refresh          between two steps: forgets blocks that lenders took back or disks lost
    find, plan_load  for a request: which of its blocks are in tiers, and how many are worth loading (planner/gate.py)
    prepare_load     pins these blocks and makes the job that the workers carry out
    prepare_store    chooses slots for blocks that the engine has computed or loaded, and makes the job
    plan_spills      in every step: the next job that writes one tier from another (disk/spill.py)
    report           takes what a rank reports of a job; the last report closes the job
    drop_all         when the weights change: forgets everything
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from polder.arrays import IntArray
from polder.planner.gate import Cut, best_cut
from polder.planner.rates import LinkRate, PrefillRate
from polder.tiers.counters import TierCounters
from polder.tiers.disk.spill import SpillConfig, Spiller
from polder.tiers.eviction.admission import ReuseGate
from polder.tiers.eviction.policy import EvictionPolicy
from polder.tiers.index import BlockIndex
from polder.tiers.jobs import Direction, Job, JobResult, Part
from polder.tiers.slots import Slots
from polder.tiers.table import ABSENT, Places

__all__ = ["TierSet"]

PROBE_EVERY_S = 5.0
"""A tier that is too slow to be used is tried with one block this often, because it may have become faster."""
LEAST_TRIAL, MOST_TRIAL = 512, 4096
"""Half of what the tiers hold, within these bounds: so many blocks are asked for before it is judged whether writing
pays. Users who all begin at once have nothing to reuse yet."""
MOST_REMEMBERED = 1 << 18
"""Keys of computed blocks that are remembered to judge reuse, 200 bytes each."""
OVERHEAD_S = 0.003
"""Cost of any asynchronous load: vLLM takes two empty steps for it (3 to 5 ms)."""


@dataclass(kw_only=True)
class _Open:
    """A job under way."""

    direction: Direction
    places: Places
    tokens: int
    """The tokens that a load saves its request from computing."""
    acks: int = 0
    failed: dict[int, str] | None = None
    began: float = 0.0


class TierSet:
    """See the module's docstring. Not thread-safe: it belongs to the scheduler's thread."""

    def __init__(
        self,
        tiers: Sequence[Slots],
        policy: EvictionPolicy,
        *,
        ranks: int,
        block_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        spilling: SpillConfig | None = None,
    ) -> None:
        """`tiers`: from the fastest to the slowest. `ranks`: how many workers report each job. `spilling`: how a tier
        is written that is written behind another one.

        Raises ConfigError unless such a tier is the last one and comes right after host memory.
        """
        self._tiers, self._ranks, self._block_tokens, self._clock = tuple(tiers), ranks, block_tokens, clock
        self.index = BlockIndex(self._tiers, policy)
        self.reuse = ReuseGate(
            remembered=min(MOST_REMEMBERED, max(1024, 2 * self.index.capacity)),
            trial=min(MOST_TRIAL, max(LEAST_TRIAL, self.index.capacity // 2)),
        )
        self.prefill = PrefillRate()
        self.links: dict[tuple[int, Direction], LinkRate] = {
            (tier, direction): LinkRate() for tier in range(len(tiers)) for direction in ("load", "store")
        }
        self.counters = TierCounters([tier.name for tier in tiers])
        self._spillers = [
            Spiller(self.index, slots, spilling or SpillConfig(), self.counters, self.links[tier, "store"], ranks=ranks)
            for tier, slots in enumerate(tiers)
            if slots.behind
        ]
        """Write the tiers that are written behind another one."""
        self._open: dict[int, _Open] = {}
        self._dropped: dict[int, int] = {}
        """Jobs that `drop_all` has forgotten but workers still carry out: number -> ranks that have reported."""
        self._queued = np.zeros(len(tiers))  # [tiers] bytes of the loads under way
        self._next = 1
        self._probed = dict.fromkeys(range(len(tiers)), float("-inf"))
        self._held = False

    # ------------------------------------------------------------------ a request asks

    def refresh(self) -> None:
        """Forgets blocks whose slots are gone. Not to be called within a step: what a look-up found must stay loadable
        in that step."""
        self.counters.lost_blocks += self.index.refresh()

    def find(self, keys: Sequence[bytes]) -> IntArray:
        """[n] the fastest tier that each block can be loaded from, PENDING or ABSENT; see BlockIndex.find."""
        self.index.adopt(keys, self._clock())
        return self.index.find(keys)

    def asked(self, keys: Sequence[bytes], *, tokens: int) -> None:
        """To be called once for each request and KV cache group, with the blocks that the engine's own cache lacks, in
        order.

        `tokens`: how many tokens the request lacks. A token counts once, however many groups have blocks for it.
        """
        tiers = self.index.find(keys).tolist()
        self.reuse.asked(keys, {key for key, tier in zip(keys, tiers, strict=True) if tier != ABSENT})
        now = self._clock()
        self.index.touch(keys, now)
        for spiller in self._spillers:
            spiller.asked(keys, now)
        self.counters.asked_tokens += tokens

    def plan_load(self, tiers: IntArray) -> Cut:
        """How many of a prefix's blocks to load, given the tier of each. A tier that is too slow is tried now and
        then."""
        if not len(tiers):
            return Cut(blocks=0, load_s=0.0, recompute_s=0.0)
        costs, queued = {}, {}
        for tier in range(len(self._tiers)):
            rate = self.links[tier, "load"].bytes_per_s
            if rate is not None:
                costs[tier] = 1.0 / rate
            queued[tier] = float(self._queued[tier]) / self._ranks
        if self.prefill.seconds_per_token is None:
            return Cut(blocks=len(tiers), load_s=0.0, recompute_s=0.0)
        cut = best_cut(
            tiers,
            # Ranks load at the same time, and each measures its own share of a block.
            block_bytes=self._tiers[0].slot_bytes // self._ranks,
            block_tokens=self._block_tokens,
            seconds_per_byte=costs,
            queued_bytes=queued,
            seconds_per_token=self.prefill.seconds_per_token,
            overhead_s=OVERHEAD_S,
        )
        if cut.blocks < len(tiers):
            now, slow = self._clock(), int(tiers[cut.blocks])
            if now - self._probed[slow] > PROBE_EVERY_S and now - self.links[slow, "load"].measured_at > PROBE_EVERY_S:
                self._probed[slow] = now
                return Cut(blocks=cut.blocks + 1, load_s=cut.load_s, recompute_s=cut.recompute_s)
        return cut

    def refused(self, blocks: int) -> None:
        """To be called once for each request whose load was cut: so many blocks are computed although a tier has
        them."""
        self.counters.refused_loads += 1
        self.counters.refused_tokens += blocks * self._block_tokens

    def prepare_load(self, keys: Sequence[bytes], *, tokens: int) -> Job:
        """Makes the job that loads these blocks, in this order. All must be in a tier. They stand for `tokens`
        tokens."""
        places = self.index.prepare_load(keys)
        counts = np.bincount(places.tiers, minlength=len(self._tiers))
        self._queued += counts * float(self._tiers[0].slot_bytes)
        for tier, count in enumerate(counts.tolist()):
            self.counters.tiers[tier].hit_tokens += tokens * count // len(keys)
        return self._job("load", places, tokens=tokens)

    # ------------------------------------------------------------------ the engine has blocks

    def hold(self) -> None:
        """Begins no store and no load until `resume`, because blocks are about to move."""
        self._held = True

    def resume(self) -> None:
        self._held = False

    @property
    def held(self) -> bool:
        return self._held

    @property
    def busy(self) -> bool:
        """Whether a job is under way that reads or writes blocks of the engine."""
        return bool(self._open or self._dropped)

    def prepare_store(self, keys: Sequence[bytes], depths: IntArray) -> tuple[IntArray, Job] | None:
        """Chooses which of these blocks are written.

        Returns their positions, rising, and the job, whose blocks they are; None when nothing is written.
        """
        self.reuse.computed(keys)
        for spiller in self._spillers:
            spiller.computed(keys, self._clock())
        if self._held or not self.reuse.open:
            self.counters.unwritten_blocks += len(keys)
            return None
        places = self.index.prepare_store(keys, depths, self._clock())
        if not len(places.positions):
            return None
        positions, blocks = np.unique(places.positions, return_inverse=True)
        return positions, self._job("store", places, blocks=blocks)

    def plan_spills(self) -> Job | None:
        """The next job that writes a tier from another one. It touches no block of the engine. To be called in every
        step until it returns None. Every rank reports such a job like any other."""
        for spiller in self._spillers if not self._held else ():
            job = spiller.plan(self._next, self._clock())
            if job is not None:
                self._next += 1
                return job
        return None

    @property
    def spilling(self) -> bool:
        """Whether `plan_spills` will have something to do, or to wait for, although no request comes."""
        return any(spiller.busy for spiller in self._spillers)

    def _job(self, direction: Direction, places: Places, *, tokens: int = 0, blocks: IntArray | None = None) -> Job:
        number, self._next = self._next, self._next + 1
        self._open[number] = _Open(direction=direction, places=places, tokens=tokens, began=self._clock())
        ids = self.index.ids[places.entries]
        blocks = np.arange(len(places)) if blocks is None else blocks
        parts = []
        for tier, slots in enumerate(self._tiers):
            mine = np.flatnonzero(places.tiers == tier)
            for chosen, lent in slots.locate(places.slots[mine]):
                rows = mine[chosen]
                slots_ = places.slots[rows]
                parts.append(Part(tier=tier, rows=rows, blocks=blocks[rows], slots=slots_, ids=ids[rows], lent=lent))
        return Job(number=number, direction=direction, parts=tuple(parts))

    # ------------------------------------------------------------------ the workers report

    def report(self, finished: JobResult) -> bool:
        """Takes one rank's result of a job. Returns whether the job is a load that failed on this rank."""
        job = self._open.get(finished.number)
        now = self._clock()
        for spiller in self._spillers:
            if job is not None or spiller.owns(finished.number):
                spiller.notice(finished)
            if spiller.owns(finished.number):
                spiller.report(finished, now)
        if finished.number in self._dropped:
            self._dropped[finished.number] += 1
            if self._dropped[finished.number] == self._ranks:
                del self._dropped[finished.number]
        if job is None:
            return False  # a spill, or a job from before everything was dropped
        for tier, (size, seconds) in finished.moved.items():
            self.links[tier, job.direction].observe(size, seconds, now)
            self.counters.moved(tier, job.direction, size, seconds)
        for row, reason in finished.failed.items():
            self.counters.failed(int(job.places.tiers[row]), job.direction, reason)
        job.failed = {**(job.failed or {}), **finished.failed}
        job.acks += 1
        if job.acks == self._ranks:
            self._close(finished.number, job, now)
        return job.direction == "load" and bool(finished.failed)

    def _close(self, number: int, job: _Open, now: float) -> None:
        del self._open[number]
        failed = sorted(job.failed or ())
        if job.direction == "store":
            self.index.complete_store(job.places, failed)
            self.counters.stored_blocks += len(job.places)
            for spiller in self._spillers:
                spiller.moved(job.places)
            return
        np.subtract.at(self._queued, job.places.tiers, float(self._tiers[0].slot_bytes))
        self.index.complete_load(job.places, failed)
        for spiller in self._spillers:
            spiller.moved(job.places)
        elapsed = now - job.began
        self.counters.load_wait_seconds += elapsed
        if failed:
            self.counters.failed_loads += 1
            return
        computing = self.prefill.seconds(job.tokens) or 0.0
        self.counters.saved_prefill_seconds += computing
        if computing and elapsed > computing:
            self.counters.late_loads += 1
            self.counters.late_tokens += job.tokens

    def drop_all(self) -> None:
        """Forgets everything, jobs under way included. The next `plan_spills` empties the disks. Nothing is written to
        them any more in this run, because their namespace may not name the weights any longer; `unseal` says that it
        still does."""
        self._dropped |= {number: job.acks for number, job in self._open.items()}
        self._open.clear()
        self._queued[:] = 0
        self.index.drop_all()
        self.seal()

    def seal(self) -> None:
        """Empties the disks and writes nothing to them from now on."""
        for spiller in self._spillers:
            spiller.drop_all()

    def unseal(self) -> None:
        """The weights are those that the disks' namespace names, although everything was dropped."""
        for spiller in self._spillers:
            spiller.unseal()

    def stats(self) -> dict[str, float]:
        """All counters and gauges, by the names in polder/metrics.py."""
        self.counters.unread_bytes = self.index.evicted_unread * self._tiers[0].slot_bytes
        gauges = {}
        for tier, slots in enumerate(self._tiers):
            state, rate = slots.stats(), self.links[tier, "load"].bytes_per_s
            gauges[f"tier_{slots.name}_used_bytes"] = float(state.used * state.slot_bytes)
            gauges[f"tier_{slots.name}_size_bytes"] = float(state.slots * state.slot_bytes)
            gauges[f"tier_{slots.name}_load_bytes_per_second"] = rate or 0.0
        gauges["tier_prefill_seconds_per_token"] = self.prefill.seconds_per_token or 0.0
        gauges["tier_writing_pays"] = float(self.reuse.open)
        for spiller in self._spillers:
            gauges |= spiller.stats(self._clock())
        return self.counters.stats() | gauges

    def check_integrity(self) -> None:
        self.index.check_integrity()

    def close(self) -> None:
        for tier in self._tiers:
            tier.close()

    def loadable_or_pending(self, keys: Sequence[bytes]) -> IntArray:
        """The tiers of the leading blocks, up to the first that is in none; PENDING for blocks that are still being
        written."""
        tiers = self.find(keys)
        stop = np.flatnonzero(tiers == ABSENT)
        return tiers[: int(stop[0])] if len(stop) else tiers
