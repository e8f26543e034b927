"""Emulated disks: requests take as long as on a disk of a given speed, and may fail on purpose.

A disk serves its requests one after another in virtual time. A request starts when it has arrived and the one before is
over, takes `max(bytes / bytes_per_s, 1 / requests_per_s)`, and is reported `latency_s` later. The bytes are really
read, from any file; then the caller sleeps until the virtual time of its last request. These times are absolute, so
errors do not add up. The modelled time is exact at any load of the machine. The wall time follows it as long as the
real I/O is faster; `Step.late_s` says if it was not.

`EmulatedDisk` is the model alone, for simulators. `EmulatedEngine` emulates the disks of a whole store, batch by batch;
it is the one to measure with.
"""

from __future__ import annotations

import errno
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from polder.arrays import ErrorArray, FloatArray, IntArray
from polder.diskstore.engine import side_by_side
from polder.diskstore.io import IoEngine, Outcome, Transfer
from polder.diskstore.model import DiskModel

__all__ = [
    *("Clock", "DiskFaults", "EmulatedDisk", "EmulatedEngine", "RealClock", "Step"),
    *("VirtualClock"),
]


class Clock(Protocol):
    def now(self) -> float:
        """Seconds."""

    def sleep_until(self, moment_s: float) -> None: ...


class RealClock:
    def now(self) -> float:
        return time.perf_counter()

    def sleep_until(self, moment_s: float) -> None:
        wait = moment_s - time.perf_counter()
        if wait > 0:
            time.sleep(wait)


class VirtualClock:
    """A clock that moves only when somebody sleeps, so nobody really waits."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep_until(self, moment_s: float) -> None:
        self._now = max(self._now, moment_s)


@dataclass(frozen=True, kw_only=True)
class DiskFaults:
    fail: float = 0.0
    """Share of requests that end with EIO."""
    stall: float = 0.0
    """Share of requests that take `stall_s` longer, without delaying others."""
    stall_s: float = 0.0
    dies_at_s: float = float("inf")
    """Seconds after its creation, from when on every request of the disk ends with EIO."""
    hangs_at_s: float = float("inf")
    """Likewise, from when on no request ends."""
    seed: int = 0


class EmulatedDisk:
    """The model of one disk with its faults. Thread-safe."""

    def __init__(self, model: DiskModel, faults: DiskFaults | None = None, clock: Clock | None = None) -> None:
        self.model, self.clock = model, clock or RealClock()
        self.requests = self.served_bytes = 0
        self._faults = faults or DiskFaults()
        self._random = random.Random(self._faults.seed)
        self._started = self.clock.now()
        self._busy_until = self._started
        self._lock = threading.Lock()
        self._answers = threading.Event()
        self._answers.set()
        self._dead = False
        self._refusal = 0

    def serve(self, sizes_bytes: IntArray, arrival_s: float) -> tuple[FloatArray, ErrorArray]:
        """Serves requests that arrive together. Returns when each is over (inf: never), and its errno. Does not
        wait."""
        model, faults, count = self.model, self._faults, len(sizes_bytes)
        took = np.maximum(sizes_bytes / model.bytes_per_s, 1 / model.requests_per_s)
        with self._lock:
            over = max(arrival_s, self._busy_until) + np.cumsum(took)
            self._busy_until = float(over[-1]) if count else self._busy_until
            self.requests += count
            self.served_bytes += int(sizes_bytes.sum())
            failed = np.array([self._random.random() < faults.fail for _ in range(count)], dtype=np.bool_)
            stalled = np.array([self._random.random() < faults.stall for _ in range(count)], dtype=np.bool_)
        done: FloatArray = over + model.latency_s + stalled * faults.stall_s
        failed |= self._dead | (done >= self._started + faults.dies_at_s)
        done[done >= self._started + faults.hangs_at_s] = np.inf
        if np.isinf(done).any():
            self.hang()
        elif not self._answers.is_set():
            done[:] = np.inf
        return done, np.where(failed, errno.EIO, 0).astype(np.int32)

    def die(self) -> None:
        """Makes every request end with EIO from now on."""
        self._dead = True

    def hang(self) -> None:
        """Makes no request end from now on."""
        self._answers.clear()

    def refuse_writes(self, number: int) -> None:
        """Makes every write end with this errno from now on, e.g. ENOSPC; 0 for none."""
        self._refusal = number

    def recover(self) -> None:
        """Serves requests again; requests that wait go on."""
        self._dead, self._refusal = False, 0
        self._answers.set()

    @property
    def refusal(self) -> int:
        return self._refusal

    def wait(self) -> None:
        """Returns when the disk does not hang (any more)."""
        self._answers.wait()


@dataclass(frozen=True, kw_only=True)
class Step:
    """The times of one batch on all disks."""

    wall_s: float
    modelled_s: float
    late_s: float
    """By how much the real I/O took longer than the model. Above 0 the wall time is meaningless."""


class EmulatedEngine:
    """An I/O engine over emulated disks. Transfers of disk n are served by `disks[n]`. All disks share one clock."""

    def __init__(self, inner: IoEngine, disks: Sequence[EmulatedDisk]) -> None:
        self.steps: list[Step] = []
        """All batches since the start, in order."""
        self._inner, self._disks = inner, tuple(disks)
        self._clock = disks[0].clock

    def read(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        started = self._clock.now()
        return self._pace(transfers, self._inner.read(transfers, timeout_s), started, timeout_s)

    def write(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        started = self._clock.now()
        paced = self._pace(transfers, self._inner.write(transfers, timeout_s), started, timeout_s)
        for transfer, outcome in zip(transfers, paced, strict=True):
            outcome.errors[outcome.errors == 0] = self._disks[transfer.disk].refusal
        return paced

    def unsettled(self) -> IntArray:
        return self._inner.unsettled()

    def close(self) -> None:
        self._inner.close()

    def _pace(
        self, transfers: Sequence[Transfer], outcomes: Sequence[Outcome], started: float, timeout_s: float
    ) -> list[Outcome]:
        over, paced = started, []
        for transfer, outcome in zip(transfers, outcomes, strict=True):
            disk = self._disks[transfer.disk]
            order = np.argsort(transfer.offsets, kind="stable")
            runs = np.array(side_by_side(transfer.offsets[order].tolist(), transfer.piece_bytes, 1)).reshape(-1, 2)
            lengths = runs[:, 1] - runs[:, 0]
            done, failed = disk.serve(lengths * transfer.piece_bytes, started)
            late = done > started + timeout_s
            errors = np.where(late, errno.ETIMEDOUT, failed)
            of_pieces = np.empty(len(order), dtype=np.int32)
            of_pieces[order] = np.repeat(errors, lengths)
            mine = min(float(done.max(initial=started)), started + timeout_s)
            errors = np.where(outcome.errors, outcome.errors, of_pieces)
            paced.append(Outcome(errors=errors, digests=outcome.digests, seconds=mine - started))
            over = max(over, mine)
        late_s = max(0.0, self._clock.now() - over)
        self._clock.sleep_until(over)
        self.steps.append(Step(wall_s=self._clock.now() - started, modelled_s=over - started, late_s=late_s))
        return paced
