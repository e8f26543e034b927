"""Emulated disks: each request takes as long as on a disk of the given speed, and not less; and it may fail on purpose.

A disk serves its requests one after another in virtual time: a request starts when it has arrived and the one before is
over, takes `max(bytes / bandwidth, 1 / requests per second)`, and is reported `latency` later. The bytes are really
read, from any file; then the caller sleeps until the virtual time of its last request. Moments are absolute, so nothing
adds up; the modelled time is exact at any load of the machine, and the wall time follows it as long as the real I/O is
faster (`Step.late_s` says if it was not).

`EmulatedDisk` alone is the model, for simulators. `EmulatedEngine` puts disks beneath a whole store, a batch at a time;
measure with it. `EmulatedFile` is one disk's file, call by call, for the faults that only real threads meet.
"""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from polder.arrays import ErrorArray, FloatArray, IntArray
from polder.diskstore.engine import side_by_side
from polder.diskstore.io import IoEngine, OpenFile, Outcome, PageFile, Transfer, open_page_file
from polder.diskstore.model import DiskModel

__all__ = [
    *("Clock", "DiskFaults", "EmulatedDisk", "EmulatedEngine", "EmulatedFile", "RealClock", "Step"),
    *("VirtualClock", "emulated_files"),
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
    """Stands still but for those who sleep: nobody waits."""

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
    """Share of requests that take `stall_s` longer, without keeping others up."""
    stall_s: float = 0.0
    dies_at_s: float = float("inf")
    """Seconds after the disk was made from when on every request ends with EIO."""
    hangs_at_s: float = float("inf")
    """From when on no request ends."""
    seed: int = 0


class EmulatedDisk:
    """The model of one disk, and its faults. Thread-safe."""

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
        """Requests that arrive together -> when each is over (inf: never), and its errno. Waits for nothing."""
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
        """Every request ends with EIO from now on."""
        self._dead = True

    def hang(self) -> None:
        """No request ends from now on."""
        self._answers.clear()

    def refuse_writes(self, number: int) -> None:
        """Every write ends with this errno from now on: ENOSPC, EROFS, EACCES; 0: none does."""
        self._refusal = number

    def recover(self) -> None:
        """Requests are served again; those of an EmulatedFile that hung go on."""
        self._dead, self._refusal = False, 0
        self._answers.set()

    @property
    def refusal(self) -> int:
        return self._refusal

    def wait(self) -> None:
        """Returns when the disk answers."""
        self._answers.wait()


@dataclass(frozen=True, kw_only=True)
class Step:
    """One batch on all disks."""

    wall_s: float
    modelled_s: float
    late_s: float
    """By how much the real I/O took longer than the model: if it did, the wall time says nothing."""


class EmulatedEngine:
    """Any engine, over emulated disks: transfer `disk` n is served by `disks[n]`. They share one clock."""

    def __init__(self, inner: IoEngine, disks: Sequence[EmulatedDisk]) -> None:
        self.steps: list[Step] = []
        """Of every batch since the start, in order."""
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


class EmulatedFile:
    """A file on an emulated disk: every call is one request, and the calling thread waits for it."""

    def __init__(self, inner: PageFile, disk: EmulatedDisk) -> None:
        self.alignment_bytes = inner.alignment_bytes
        self._inner, self._disk = inner, disk

    def preadv(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        self._request(buffers)
        return self._inner.preadv(buffers, offset)

    def pwritev(self, buffers: Sequence[memoryview], offset: int, /) -> int:
        if self._disk.refusal:
            raise OSError(self._disk.refusal, os.strerror(self._disk.refusal))
        self._request(buffers)
        return self._inner.pwritev(buffers, offset)

    def close(self) -> None:
        self._inner.close()

    def _request(self, buffers: Sequence[memoryview]) -> None:
        size = np.array([sum(len(buffer) for buffer in buffers)], dtype=np.int64)
        done, errors = self._disk.serve(size, self._disk.clock.now())
        if np.isinf(done[0]):
            self._disk.wait()  # as in the kernel: it goes on when the disk does, however late
        else:
            self._disk.clock.sleep_until(float(done[0]))
        if errors[0]:
            raise OSError(int(errors[0]), os.strerror(int(errors[0])))


def emulated_files(disks: Mapping[Path, EmulatedDisk]) -> OpenFile:
    """For a store: its slabs lie on these disks, by directory; those of other directories as they are."""

    def open_file(path: Path) -> PageFile:
        inner = open_page_file(path)
        return EmulatedFile(inner, disks[path.parent]) if path.parent in disks else inner

    return open_file
