"""The workers' half of the tiers: copies blocks between the engine's KV cache and the tiers.

A job is a list of blocks to store into slots or to load from slots. It consists of one part for each tier. Each tier
has one lane for each direction: a queue and a thread. So a load never waits behind stores, nor a fast tier behind a
slow one. The jobs of a lane are carried out in their order. No exception leaves a lane: every row of a job either
succeeds or is reported as failed, with the reason.

A job comes with a mark on the engine's compute stream (polder.memory.backend). GPU steps are asynchronous: steps
launched before the mark may still write the blocks that are to be stored, or use the blocks that are to be loaded for
their previous owner. The lane's thread waits for the mark before it touches a block, takes a lock or starts the clock.
The copy stream itself does not wait, because other lanes use it too.

    store   lock the lent blocks (peer) -> copy the engine's block into the slot -> note the checksum of the engine's bytes
    load    copy the slot into the engine's block -> compare epochs (peer) -> compare the checksum of what arrived

The checksum (64 bits, seeded with the block's id and the namespace) is computed on the engine's side both times. So it
detects a torn copy, a slot that another block was written to, memory that its owner reused, and a flipped bit. Whatever
does not verify is a miss (law 5 in docs/structures.md).

The disk tier carries out whole parts at once, so that all its disks work together, and it has jobs that touch no block
of the engine: see BatchMemory and disk/spill.py.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from polder.memory.backend import Mark
from polder.memory.cores import leave_bound_core
from polder.tiers.jobs import (
    BatchMemory,
    Direction,
    HostRows,
    Job,
    JobResult,
    Mover,
    Part,
    PartResult,
    Pieces,
    Reason,
    TierMemory,
    TierState,
)

__all__ = ["TierWorker"]

logger = logging.getLogger("polder.tiers")

_PATIENCE_S = 1.0
"""`wait` waits so long; then the rows that are not begun fail instead. The engine makes no step meanwhile."""
_CLOSE_S = 15.0
"""`close` waits so long for threads that a disk keeps."""


class _Work:
    """A job under way: the parts that are left, and the result so far."""

    def __init__(self, job: Job, blocks: Sequence[Pieces], after: Mark | None) -> None:
        self.job, self.blocks, self.after = job, blocks, after
        self.left = len(job.parts)
        self.queued = set(range(len(job.parts)))
        """The parts that no lane has begun."""
        self.cut_short = False
        """Whether the rows that are not begun fail."""
        self.finished = JobResult(number=job.number)


class TierWorker:
    """Carries out the jobs of one rank. `submit`, `poll` and `wait` are called by one thread."""

    def __init__(
        self,
        memories: Mapping[tuple[int, Direction], TierMemory],
        mover: Mover,
        *,
        seed: int,
        capacities: Mapping[int, int],
        batches: Mapping[int, BatchMemory] | None = None,
        host: int | None = None,
    ) -> None:
        """`memories`: one for each lane. `seed`: the namespace's digest. `capacities`: the slots of each tier.
        `batches`: the tiers that carry out whole parts. `host`: the tier that these are written from."""
        self._memories, self._mover, self._seed = memories, mover, np.uint64(seed & (2**64 - 1))
        self._sums = {tier: np.zeros(count, dtype=np.uint64) for tier, count in capacities.items()}
        self._batches, self._host = dict(batches or {}), host
        self._sizes: list[tuple[int, ...]] = [
            ()
        ]  # sizes of a block's pieces; there is one tuple for each KV cache group
        self._sizes_of = np.zeros(
            capacities[host] if host is not None else 0, dtype=np.int16
        )  # [host slots] an index into `_sizes`
        self._lanes: dict[tuple[int, Direction], queue.SimpleQueue[tuple[_Work, int] | None]] = {}
        self._threads: dict[int, list[threading.Thread]] = {}  # by tier
        self._changed = threading.Condition()
        self._open: dict[int, _Work] = {}
        self._done: list[JobResult] = []

    def submit(self, job: Job, blocks: Sequence[Pieces], after: Mark | None = None) -> None:
        """Begins a job. `blocks[i]` is where the engine has the job's i-th block; this memory must stay until the job
        has ended. `after`: no block is touched before this mark is reached."""
        work = _Work(job, blocks, after)
        with self._changed:
            if not job.parts:
                self._done.append(work.finished)
                return
            self._open[job.number] = work
        for at, part in enumerate(job.parts):
            lane = job.direction if job.direction in ("load", "store") else "spill"
            self._lane(part.tier, lane).put((work, at))

    def poll(self) -> list[JobResult]:
        """The results of the jobs that ended since the last call."""
        with self._changed:
            done, self._done = self._done, []
        return done

    def wait(self, numbers: Iterable[int]) -> None:
        """Returns when these jobs have ended; unknown ones count as ended. After `_PATIENCE_S` their rows that are not
        begun fail, so that only the rows being copied at that moment are waited for."""
        wanted = set(numbers)
        with self._changed:
            if self._changed.wait_for(lambda: self._open.keys().isdisjoint(wanted), _PATIENCE_S):
                return
            for number in wanted & self._open.keys():
                self._cut_short(self._open[number])
            self._changed.wait_for(lambda: self._open.keys().isdisjoint(wanted))

    def wait_all(self) -> None:
        """Returns when all jobs have ended."""
        with self._changed:
            self._changed.wait_for(lambda: not self._open)

    def close(self) -> None:
        """Ends the threads after what is queued, and closes the memories. What is queued for a disk fails. A thread
        that a disk keeps is left to the end of the process."""
        for batch in self._batches.values():
            batch.stop()
        for lane in self._lanes.values():
            lane.put(None)
        until = time.monotonic() + _CLOSE_S
        for tier, threads in self._threads.items():
            for thread in threads:
                thread.join(max(0.0, until - time.monotonic()) if tier in self._batches else None)
                if thread.is_alive():
                    logger.warning("%s: a disk does not answer: it is left behind", thread.name)
        for memory in self._memories.values():
            memory.close()
        for batch in self._batches.values():
            batch.close()
        self._lanes, self._threads = {}, {}

    # ------------------------------------------------------------------ inside

    def _lane(self, tier: int, direction: Direction) -> queue.SimpleQueue[tuple[_Work, int] | None]:
        lane = self._lanes.get((tier, direction))
        if lane is None:
            lane = self._lanes[tier, direction] = queue.SimpleQueue()
            name = f"polder-tier{tier}-{direction}"
            thread = threading.Thread(target=self._run, args=(lane,), name=name, daemon=True)
            self._threads.setdefault(tier, []).append(thread)
            thread.start()
        return lane

    def _run(self, lane: queue.SimpleQueue[tuple[_Work, int] | None]) -> None:
        leave_bound_core()
        while (item := lane.get()) is not None:
            work, number = item
            part = work.job.parts[number]
            ordered = _wait_for(work.after)
            with self._changed:
                if number not in work.queued:
                    continue  # cut short
                work.queued.discard(number)
            started = time.perf_counter()
            failed: dict[int, Reason] = {}
            size = 0
            state: TierState | None = None
            if not ordered:
                failed = dict.fromkeys(part.rows.tolist(), "error")
            elif part.tier in self._batches:
                carried, state = self._batch(work, part)
                size, failed = carried.size_bytes, {int(part.rows[at]): why for at, why in carried.failed.items()}
            else:
                for at, row in enumerate(part.rows.tolist()):
                    reason, moved = ("error", 0) if work.cut_short else self._row(work, part, at)
                    size += moved
                    if reason is not None:
                        failed[row] = reason
                self._memories[part.tier, work.job.direction].finish(size, started)
            seconds = time.perf_counter() - started
            with self._changed:
                finished = work.finished
                if state is not None:
                    finished.lost[part.tier], finished.room[part.tier] = state.lost, state.room
                    finished.gauges |= state.gauges
                before = finished.moved.get(part.tier, (0, 0.0))
                finished.moved[part.tier] = before[0] + size, before[1] + seconds
                self._end_part(work, failed)

    def _cut_short(self, work: _Work) -> None:
        """Makes the parts and rows that no lane has begun fail. The caller holds `_changed`."""
        work.cut_short = True
        for number in sorted(work.queued):
            self._end_part(work, dict.fromkeys(work.job.parts[number].rows.tolist(), "error"))
        work.queued.clear()

    def _end_part(self, work: _Work, failed: Mapping[int, Reason]) -> None:
        """The caller holds `_changed`."""
        work.finished.failed |= failed
        work.left -= 1
        if not work.left:
            del self._open[work.job.number]
            self._done.append(work.finished)
            self._changed.notify_all()

    def _batch(self, work: _Work, part: Part) -> tuple[PartResult, TierState | None]:
        memory, direction = self._batches[part.tier], work.job.direction
        try:
            if direction == "load":
                carried = memory.load_part(part, [work.blocks[at] for at in part.blocks.tolist()], self._mover)
            elif direction == "spill":
                carried = memory.spill_part(part, self._host_rows(part), self._mover)
            else:
                carried = memory.replicate(work.job.copies) if direction == "replicate" else memory.drop()
        except Exception:  # a miss, as for a row
            logger.exception("tier %d: a part failed; its blocks are misses", part.tier)
            carried = PartResult(failed=dict.fromkeys(range(len(part.rows)), "error"), size_bytes=0)
        try:
            return carried, memory.state()
        except Exception:
            logger.exception("tier %d: how it fares is not known", part.tier)
            return carried, None

    def _host_rows(self, part: Part) -> HostRows:
        assert self._host is not None
        return HostRows(
            seeds=(part.ids[:, 0] ^ self._seed).tolist(),
            sums=self._sums[self._host][part.sources].tolist(),
            sizes=[self._sizes[row] for row in self._sizes_of[part.sources].tolist()],
        )

    def _note_sizes(self, slot: int, block: Pieces) -> None:
        sizes = tuple([size for _, size in block])
        if sizes not in self._sizes:
            self._sizes.append(sizes)
        self._sizes_of[slot] = self._sizes.index(sizes)

    def _row(self, work: _Work, part: Part, at: int) -> tuple[Reason | None, int]:
        """Copies one block. Returns why it failed, or None, and the bytes that were copied."""
        block = work.blocks[int(part.blocks[at])]
        memory = self._memories[part.tier, work.job.direction]
        slot, seed = int(part.slots[at]), int(part.ids[at, 0] ^ self._seed)
        size = sum(length for _, length in block)
        try:
            if work.job.direction == "store":
                if not memory.store(part, at, block, self._mover):
                    return "lost", 0
                self._sums[part.tier][slot] = self._mover.checksum(block, seed)
                if part.tier == self._host:
                    self._note_sizes(slot, block)
                return None, size
            if not memory.load(part, at, block, self._mover):
                return "lost", size
            if self._mover.checksum(block, seed) != int(self._sums[part.tier][slot]):
                return "corrupt", size
        except Exception:  # whatever it is, it is a miss
            return "error", 0
        return None, size


def _wait_for(mark: Mark | None) -> bool:
    """Returns when the mark is reached; False when the device has failed."""
    try:
        if mark is not None:
            mark.wait()
    except Exception:
        logger.exception("the device failed before blocks could be copied; they are misses")
        return False
    return True
