"""The health of a disk: counters, its measured speed, and the rule by which it is used no more."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from polder.arrays import ErrorArray

__all__ = ["DiskHealth", "DiskStats", "State"]

logger = logging.getLogger("polder.diskstore")

State = Literal["ok", "read-only", "out"]

_FORGIVEN_AFTER = 1000
"""After so many good pages in a row a disk's errors are forgotten."""
_SPEED_MEMORY_S = 2.0
"""The measured speed is an average over so much time spent reading."""


@dataclass(frozen=True, kw_only=True)
class DiskStats:
    """One disk, and what happened since it was opened."""

    device: str
    state: State
    """ "read-only": pages are read but not written. "out": all pages are misses."""
    reason: str
    """Why the state is not "ok"."""
    slots: int
    used: int
    evicted_pages: int
    read_pages: int
    """A page counts once in each batch, however many of its parts were read. So it does in the counters below."""
    corrupt_pages: int
    """Pages that did not verify and were dropped."""
    failed_reads: int
    """Pages that could not be read, timeouts included. `failed_writes` likewise."""
    failed_writes: int
    timeouts: int


class DiskHealth:
    """Not thread-safe: the caller holds the disk's lock."""

    def __init__(self, directory: Path, errors_allowed: int) -> None:
        self.state: State = "ok"
        self.reason = ""
        self.read_pages = self.corrupt_pages = 0
        self.failed_reads = self.failed_writes = self.timeouts = 0
        self._directory, self._allowed = directory, errors_allowed
        self._reads, self._writes = _Streak(), _Streak()
        self._pages = self._seconds = 0.0

    def did_read(self, errors: ErrorArray, good: int) -> None:
        """Counts a batch that was read: the errno of each page, and how many verified."""
        self.read_pages += good
        self.corrupt_pages += int((errors == 0).sum()) - good
        self.failed_reads += self._reads.count(errors)
        self.timeouts += int((errors == errno.ETIMEDOUT).sum())
        if self._reads.bad >= self._allowed:
            self.stop("out", f"reading: {_name(errors)}")

    def took(self, pages: float, seconds: float) -> None:
        """Notes the time of a batch. `pages`: good pages, where a part of a page counts as a fraction."""
        if pages and seconds > 0:
            keep = max(0.0, 1.0 - seconds / _SPEED_MEMORY_S)
            self._pages, self._seconds = keep * self._pages + pages, keep * self._seconds + seconds

    @property
    def pages_per_s(self) -> float:
        """The measured speed; 0 before the first read."""
        return self._pages / self._seconds if self._seconds else 0.0

    def did_write(self, errors: ErrorArray, index_failure: str) -> None:
        """Counts a batch that was written: the errno of each page, and why the index refused it ("" if it did not)."""
        if index_failure:
            errors = np.where(errors == 0, errno.EIO, errors).astype(np.int32)
        self.failed_writes += self._writes.count(errors)
        self.timeouts += int((errors == errno.ETIMEDOUT).sum())
        if self._writes.bad >= self._allowed:
            self.stop("read-only", index_failure or f"writing: {_name(errors)}")

    def stop(self, state: State, reason: str) -> None:
        """Sets the state until the disk is opened again. Logged once."""
        if state != self.state and self.state != "out":
            self.state, self.reason = state, reason
            logger.warning("%s: %s: %s", self._directory, state, reason)


class _Streak:
    """Counts errors since the last thousand good pages in a row."""

    def __init__(self) -> None:
        self.bad = self._good = 0

    def count(self, errors: ErrorArray) -> int:
        bad = int((errors != 0).sum())
        self._good = 0 if bad else self._good + len(errors)
        self.bad = 0 if self._good >= _FORGIVEN_AFTER else self.bad + bad
        return bad


def _name(errors: ErrorArray) -> str:
    bad = errors[errors != 0]
    return os.strerror(int(bad[0])) if len(bad) else "too many errors"
