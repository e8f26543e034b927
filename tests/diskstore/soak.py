"""A disk store for minutes: pages written, read and forgotten at random, killed every few seconds, with faults part of the time.

    python -m tests.diskstore.soak --minutes 10 [--disks 4] [--limit 64MiB]

A child does it on several directories, in two threads, and is ended with kill -9; the next one goes on where it was. The parent
compares `du` of every directory with its limit meanwhile. Every page tells its key and its version, so a child knows what it must
be: the version that it has written itself, or, of a page that a former child left, any version of that key. At the end every page
is read once more, and fsck reads all again. Prints one JSON object; ends with 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.diskstore.aio import AioEngine
from polder.diskstore.config import DiskConfig, StoreConfig
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.fsck import check_directory, locked
from polder.diskstore.io import Arena, IoEngine, OpenFile, open_page_file
from polder.diskstore.keys import Keys, key_array
from polder.diskstore.layout import plan_layout, usage_bytes
from polder.diskstore.model import DiskModel
from polder.diskstore.store import DiskStore
from polder.emulation.disks import DiskFaults, EmulatedDisk
from polder.errors import EnvironmentFault, PolderError
from polder.units import parse_bytes
from tests.emulation.files import emulated_files

__all__ = ["SoakReport", "soak"]


PAGE_BYTES = 64 << 10
BATCH = 32
THREADS = 2
SAMPLE_S = 0.02
LIVES_S = (0.5, 4.0)
"""A child lives so long once its store is open."""
FAULTS = ("", "eio", "", "full", "", "dies")
"""Of one child after the other."""
FAST = DiskModel(bytes_per_s=1e12, latency_s=0.0)
_ANY, _GONE = -1, -2
_COUNTS = ("written", "read", "former", "forgotten", "wrong", "misplaced", "opened", "not_ok")


@dataclass(kw_only=True)
class SoakReport:
    minutes: float
    disks: int
    limit_bytes: int
    pages_written: int = 0
    pages_read: int = 0
    """Every one compared with what it must be."""
    pages_read_of_former_runs: int = 0
    pages_forgotten: int = 0
    wrong: int = 0
    """Pages that the store vouched for though they were something else."""
    kills: int = 0
    kills_while_opening: int = 0
    runs_with_faults: int = 0
    du_samples: int = 0
    highest_du_over_limit: float = 0.0
    pages_at_the_end: int = 0
    problems: list[str] = field(default_factory=list)

    @property
    def good(self) -> bool:
        return not self.wrong and self.highest_du_over_limit <= 1.0 and not self.problems


def soak(
    folder: Path, *, seconds: float, disks: int = 4, limit_bytes: int = 64 << 20, seed: int | None = None
) -> SoakReport:
    """In `folder`, which is empty. Raises BudgetError when the limit is too small for one page."""
    chance = random.Random(seed)
    report = SoakReport(minutes=seconds / 60, disks=disks, limit_bytes=limit_bytes)
    directories = [folder / f"disk{number}" for number in range(disks)]
    plan_layout(limit_bytes, PAGE_BYTES)
    for directory in directories:
        directory.mkdir()
    counts_file = folder / "counts"
    counts = np.memmap(counts_file, np.int64, "w+", shape=(THREADS, len(_COUNTS)))
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(directories, report, over))
    watcher.start()
    began, life = time.monotonic(), 0
    try:
        while time.monotonic() < began + seconds and not report.problems:
            _life(life, directories, counts_file, counts, report, chance)
            life += 1
        _last_look(directories, report)
    finally:
        over.set()
        watcher.join()
    done = dict(zip(_COUNTS, counts.sum(axis=0).tolist(), strict=True))
    report.pages_written, report.pages_forgotten = done["written"], done["forgotten"]
    report.pages_read += done["read"]
    report.pages_read_of_former_runs = done["former"]
    report.wrong += done["wrong"]
    if done["misplaced"]:
        report.problems.append(f"{done['misplaced']} pages found that were forgotten")
    if done["not_ok"]:
        report.problems.append(f"{done['not_ok']} times a sound disk could not be opened")
    report.minutes = (time.monotonic() - began) / 60
    return report


def _watch(directories: Sequence[Path], report: SoakReport, over: threading.Event) -> None:
    while not over.wait(SAMPLE_S):
        most = max(usage_bytes(directory) for directory in directories)
        report.du_samples += 1
        report.highest_du_over_limit = max(report.highest_du_over_limit, most / report.limit_bytes)


def _life(
    number: int,
    directories: Sequence[Path],
    counts_file: Path,
    counts: npt.NDArray[np.int64],
    report: SoakReport,
    chance: random.Random,
) -> None:
    """One child, from its start to its kill."""
    faults = FAULTS[number % len(FAULTS)]
    opened = _COUNTS.index("opened")
    counts[0, opened] = 0
    words = ("--child", str(counts_file), "--faults", faults or "none", "--seed", str(number))
    limit = ("--limit", str(report.limit_bytes))
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.diskstore.soak", *words, *limit, *map(str, directories)],
            stdin=subprocess.DEVNULL,
            stdout=errors,
            stderr=errors,
        )
        try:
            if number % 5 == 4:  # in the middle of opening, mostly
                until = time.monotonic() + chance.uniform(0.1, 1.5)
            else:
                patience = time.monotonic() + 60
                while not counts[0, opened] and child.poll() is None and time.monotonic() < patience:
                    time.sleep(0.005)
                until = time.monotonic() + chance.uniform(*LIVES_S)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, until - time.monotonic()))
        finally:
            ended = child.poll()
            child.kill()
            child.wait()
        if ended is not None:
            errors.seek(0)
            text = errors.read().decode(errors="replace")[-2000:]
            report.problems.append(f"run {number} ended by itself with {ended}: {text}")
            return
    report.kills += 1
    report.kills_while_opening += not counts[0, opened]
    report.runs_with_faults += bool(faults)


def _last_look(directories: Sequence[Path], report: SoakReport) -> None:
    """Opens the store once more, reads every page of every disk, and lets fsck do the same."""
    store = DiskStore(_config(directories, report.limit_bytes))
    try:
        arena = Arena(BATCH, PAGE_BYTES)
        for disk, state in enumerate(store.states):
            if state != "ok":
                report.problems.append(f"{directories[disk]}: {store.stats()[disk].reason}")
            keys = store.by_recency(disk)
            for at in range(0, len(keys), BATCH):
                part = keys[at : at + BATCH]
                ok = store.read(store.lookup(part), arena.addresses[: len(part)], np.full(len(part), disk))
                report.pages_at_the_end += int(ok.sum())
                report.pages_read += int(ok.sum())
                for row in np.flatnonzero(ok):
                    report.wrong += _version_of(arena.bytes[row], _number_of(part[row])) is None
        store.check_integrity()
    except PolderError as error:
        report.problems.append(str(error))
    finally:
        store.close()
    for directory in directories:
        with locked(directory):
            report.problems += [f"{directory}: fsck: {problem}" for problem in check_directory(directory)[0].problems]


# ---------------------------------------------------------------- pages


def _names(numbers: IntArray) -> Keys:
    return key_array([b"page%12d" % number for number in numbers.tolist()])


def _number_of(key: npt.NDArray[np.uint64]) -> int:
    return int(key.astype("<u8").tobytes()[4:])


def _fill(page: npt.NDArray[np.uint8], number: int, version: int) -> None:
    page[:] = np.random.default_rng([number, version]).integers(0, 256, PAGE_BYTES, dtype=np.uint8)
    page[:16].view(np.int64)[:] = number, version


def _version_of(page: npt.NDArray[np.uint8], number: int) -> int | None:
    """None when the page is no page of this number."""
    there, version = page[:16].view(np.int64).tolist()
    if there != number or version < 0:
        return None
    whole = np.empty(PAGE_BYTES, dtype=np.uint8)
    _fill(whole, number, version)
    return version if np.array_equal(whole, page) else None


# ---------------------------------------------------------------- the child


def _config(directories: Sequence[Path], limit_bytes: int) -> StoreConfig:
    disks = tuple(DiskConfig(directory=directory, limit_bytes=limit_bytes) for directory in directories)
    return StoreConfig(disks=disks, page_bytes=PAGE_BYTES, namespace="soak", timeout_s=30.0)


class _Worker:
    """One thread's pages: no other thread has the same numbers, but they share slots, which evict each other."""

    def __init__(self, store: DiskStore, numbers: IntArray, seed: int, counts: npt.NDArray[np.int64]) -> None:
        self._store, self._numbers, self._counts = store, numbers, counts
        self._chance = np.random.default_rng(seed)
        self._versions = dict.fromkeys(numbers.tolist(), _ANY)
        self._arena = Arena(BATCH, PAGE_BYTES)

    def run(self) -> None:
        while True:
            count = int(self._chance.integers(1, BATCH + 1))
            numbers = self._chance.choice(self._numbers, count, replace=False)
            do = self._chance.random()
            if do < 0.45:
                self._write(numbers)
            elif do < 0.95:
                self._read(numbers)
            else:
                self._forget(numbers)

    def _count(self, name: str, by: int) -> None:
        self._counts[_COUNTS.index(name)] += by

    def _write(self, numbers: IntArray) -> None:
        keys = _names(numbers)
        absent = ~self._store.lookup(keys).present.any(axis=1)  # nobody else adds any of them
        numbers, keys = numbers[absent], keys[absent]
        versions = self._chance.integers(0, 1 << 40, len(numbers)).tolist()
        for row, (number, version) in enumerate(zip(numbers.tolist(), versions, strict=True)):
            _fill(self._arena.bytes[row], number, version)
        accepted = self._store.write(keys, self._arena.addresses[: len(numbers)])
        # One that was evicted again already is not accepted, and must not be found later.
        self._versions |= {n: v if ok else _GONE for n, v, ok in zip(numbers.tolist(), versions, accepted, strict=True)}
        self._count("written", int(accepted.sum()))

    def _read(self, numbers: IntArray) -> None:
        self._arena.bytes[: len(numbers)] = 0
        ok = self._store.read(self._store.lookup(_names(numbers)), self._arena.addresses[: len(numbers)])
        for row in np.flatnonzero(ok).tolist():
            number = int(numbers[row])
            known, version = self._versions[number], _version_of(self._arena.bytes[row], number)
            self._count("read", 1)
            self._count("former", known == _ANY)
            self._count("misplaced", known == _GONE)
            self._count("wrong", version is None or (known >= 0 and version != known))

    def _forget(self, numbers: IntArray) -> None:
        self._count("forgotten", self._store.forget(_names(numbers)))
        self._versions |= dict.fromkeys(numbers.tolist(), _GONE)


def _child(directories: Sequence[Path], limit_bytes: int, counts_file: Path, faults: str, seed: int) -> None:
    parent, chance = os.getppid(), random.Random(seed)
    disks = {
        directory: EmulatedDisk(FAST, DiskFaults(fail=0.002, seed=seed + number) if faults == "eio" else None)
        for number, directory in enumerate(directories)
    }
    opener: OpenFile = open_page_file if faults == "none" else emulated_files(disks)
    engine: IoEngine = ThreadEngine()
    if seed % 4 == 0:
        with contextlib.suppress(EnvironmentFault):
            engine = AioEngine(ThreadEngine())
    counts = np.memmap(counts_file, np.int64, "r+", shape=(THREADS, len(_COUNTS)))
    store = DiskStore(_config(directories, limit_bytes), engine=engine, open_file=opener)
    counts[0, _COUNTS.index("not_ok")] += sum(state != "ok" for state in store.states)
    slots = len(directories) * plan_layout(limit_bytes, PAGE_BYTES).slots
    numbers = np.arange(slots + slots // 2)
    for thread in range(THREADS):
        worker = _Worker(store, numbers[thread::THREADS], THREADS * seed + thread, counts[thread])
        threading.Thread(target=_or_end, args=(worker,), daemon=True).start()
    counts[0, _COUNTS.index("opened")] = 1
    fails_s = time.monotonic() + chance.uniform(0.2, 1.5)
    while os.getppid() == parent:
        time.sleep(0.05)
        if faults in ("full", "dies") and time.monotonic() > fails_s:
            victim = disks[chance.choice(directories)]
            victim.die() if faults == "dies" else victim.refuse_writes(errno.ENOSPC)
            fails_s = float("inf")
    os._exit(0)


def _or_end(worker: _Worker) -> None:
    try:
        worker.run()
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.diskstore.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--disks", type=int, default=4)
    parser.add_argument("--limit", default="64MiB", help="of each disk's directory (default: 64MiB)")
    parser.add_argument(
        "--folder", type=Path, help="where the directories are made (default: the system's temporary one)"
    )
    parser.add_argument("--seed", type=int)
    for hidden in ("--child", "--faults"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("directories", nargs="*", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    try:
        limit_bytes = parse_bytes(given.limit, what="--limit")
        if given.child:
            _child(given.directories, limit_bytes, Path(given.child), given.faults, given.seed)
        if given.disks < 1 or given.minutes <= 0 or given.directories:
            parser.error("write --minutes above 0 and --disks of 1 or more, and no other arguments")
        with tempfile.TemporaryDirectory(prefix="polder-soak-", dir=given.folder) as folder:
            report = soak(
                Path(folder), seconds=60 * given.minutes, disks=given.disks, limit_bytes=limit_bytes, seed=given.seed
            )
    except PolderError as error:
        parser.error(str(error))
    print(json.dumps(asdict(report), indent=2))
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
