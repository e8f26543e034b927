"""Asynchronous copies between addresses: submit, get a ticket, wait for it.

**Order.** A copy engine is one queue. Submissions run one after another in the order of their tickets. When a ticket is
done, all earlier ones are, and a later submission may read what an earlier one writes. The pieces of one submission
have no order: no piece may write what another piece of it reads or writes. On CUDA the queue is a stream of its own,
which waits for no other stream by itself. A submission `after` a mark (Backend.mark) starts when the work that was
launched before the mark is over. `hold` lets work that is launched afterwards wait for a submission. Neither blocks the
caller.

**Threads.** Any thread may call any method. Several threads may wait for the same ticket or for different ones, and a
ticket may be waited for again. Ticket 0 stands for no submission and is always done.

**Addresses.** From the submission until its ticket is done, sources must stay mapped and unchanged, destinations must
stay mapped, and nobody may read destinations. This is not checked: unmapping a span under a copy is a crash. Wait for
the tickets before pages are unmapped.

**Errors.** A failed copy leaves its destination undefined; later submissions still run. Its error is raised as
EnvironmentFault by the first `wait` for its own ticket or a later one, by every further `wait` for its own, and by
`close` if nobody waited. Each `wait` raises one error, the oldest that is due. So waiting for the last of several
tickets is enough to learn that one of them failed.

**Cost.** Pieces that are adjacent both at the source and at the destination are merged first. On the CPU a thread
copies with the GIL released (about 10 GB/s). A submission costs microseconds.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.errors import EnvironmentFault, IntegrityError
from polder.memory.backend import Backend, CopyJob, Mark, Stall
from polder.memory.page import Indices, as_indices

__all__ = ["Addresses", "CopyEngine", "CopyStatistics"]

Addresses = npt.NDArray[np.uint64]

_REMEMBERED = 256  # errors already raised that a second wait for their ticket still finds


@dataclass(frozen=True, kw_only=True)
class CopyStatistics:
    submitted: int
    """Tickets given out."""
    pending: int
    """Submissions that are not known to be over."""
    failed: int
    runs: int
    """Pieces carried out, after merging."""
    busy_seconds: float
    """Time that the copying itself took."""


@dataclass(kw_only=True)
class _Failure:
    error: Exception
    raised: bool = False


class CopyEngine:
    """One FIFO of copies on one device; the essay above has its guarantees."""

    def __init__(self, backend: Backend, *, inline_bytes: int = 0) -> None:
        """`inline_bytes`: see Backend.copy_queue. On the CPU the first submission starts a thread: fork before it."""
        self._backend = backend
        self._queue = backend.copy_queue(inline_bytes)
        self._lock = threading.Lock()
        self._closed = False
        self._last = 0
        self._pending: dict[int, CopyJob] = {}  # by ticket, in order
        self._failures: dict[int, _Failure] = {}
        self._runs = self._failed = 0
        self._busy_seconds = 0.0

    def mark(self) -> Mark | None:
        """Backend.mark. To submit `after` it when the calling thread has launched work on the bytes or their
        destination."""
        return self._backend.mark()

    def submit(self, dst: Addresses, src: Addresses, length: int | Indices, after: Mark | None = None) -> int:
        """Copies `length` bytes (one number, or one for each piece) from address `src[i]` to `dst[i]`. Returns a
        ticket.

        Starts when the mark `after` is reached; all later submissions start behind it. Raises IntegrityError when the
        arrays differ in length or the engine is closed.
        """
        dst, src = np.asarray(dst, dtype=np.uint64).reshape(-1), np.asarray(src, dtype=np.uint64).reshape(-1)
        lengths = as_indices(length if isinstance(length, np.ndarray) else np.full(len(dst), length))
        if not len(dst) == len(src) == len(lengths) or (lengths < 0).any():
            raise IntegrityError(
                f"{len(src)} sources, {len(dst)} destinations and {len(lengths)} lengths, or one negative"
            )
        merged_dst, merged_src, merged_lengths = _merge(dst, src, lengths)
        with self._lock:
            if self._closed:
                raise IntegrityError("the copy engine is closed")
            self._reap_done()
            self._last += 1
            self._pending[self._last] = self._queue.put(merged_dst, merged_src, merged_lengths, after)
            self._runs += len(merged_lengths)
            return self._last

    def submit_blocks(
        self,
        dst_base: int,
        dst_stride: int,
        dst_ids: Sequence[int] | Indices,
        src_base: int,
        src_stride: int,
        src_ids: Sequence[int] | Indices,
        block_bytes: int,
    ) -> int:
        """Copies `block_bytes` bytes from block `src_ids[i]` to block `dst_ids[i]`. Block n is at base + n * stride."""
        return self.submit(_blocks(dst_base, dst_stride, dst_ids), _blocks(src_base, src_stride, src_ids), block_bytes)

    def wait(self, ticket: int) -> None:
        """Returns when this submission and all before it are over. Raises as described under Errors above."""
        self._check(ticket)
        while True:
            with self._lock:
                head = next(iter(self._pending), ticket + 1)
                if head > ticket:
                    break
                job = self._pending[head]
            # Without the lock: others may submit, poll, or wait for the same job, which keeps its error for _reap.
            with contextlib.suppress(Exception):
                job.wait()
            with self._lock:
                self._reap(head)
        self._raise_failure(ticket)

    def hold(self, ticket: int) -> Stall | None:
        """Work that the calling thread launches from now on starts after this submission: see CopyJob.hold.

        Raises the errors that `wait` would raise, as far as they are known. Returns None when nothing is left to wait
        for.
        """
        self._check(ticket)
        with self._lock:
            self._reap_done()
            job = self._pending.get(ticket)
        stall = None
        if job is not None:
            try:
                stall = job.hold()
            except Exception:
                self.wait(ticket)
                raise
            with self._lock:
                self._reap_done()
        self._raise_failure(ticket)
        return stall

    def done(self, ticket: int) -> bool:
        """True when `wait` would not block; it may still raise. Never blocks."""
        self._check(ticket)
        with self._lock:
            self._reap_done()
            return next(iter(self._pending), ticket + 1) > ticket

    def statistics(self) -> CopyStatistics:
        with self._lock:
            self._reap_done()
            return CopyStatistics(
                submitted=self._last,
                pending=len(self._pending),
                failed=self._failed,
                runs=self._runs,
                busy_seconds=self._busy_seconds,
            )

    def close(self) -> None:
        """Waits for all copies and frees the thread or stream. Raises an error that no `wait` has raised. May be
        repeated."""
        with self._lock:
            self._closed = True
        self._queue.close()
        with self._lock:
            self._reap_done()
        self._raise_failure(self._last + 1)

    # ------------------------------------------------------------------ inside

    def _check(self, ticket: int) -> None:
        if not 0 <= ticket <= self._last:
            raise IntegrityError(f"ticket {ticket} was never given out, the last one is {self._last}")

    def _reap_done(self) -> None:
        """Books the jobs that are over, oldest first. Called often, with the lock held, so that no job piles up."""
        while self._pending:
            head = next(iter(self._pending))
            if not self._pending[head].done():
                return
            self._reap(head)

    def _reap(self, ticket: int) -> None:
        """Books a job that is over, once. Called with the lock held."""
        job = self._pending.pop(ticket, None)
        if job is None:
            return
        try:
            self._busy_seconds += job.wait()
        except Exception as error:
            self._failed += 1
            self._failures[ticket] = _Failure(error=error)

    def _raise_failure(self, ticket: int) -> None:
        """Raises the oldest error up to `ticket` that was not raised yet, or is `ticket`'s own."""
        with self._lock:
            due = [t for t, f in self._failures.items() if t <= ticket and (t == ticket or not f.raised)]
            if not due:
                return
            first = min(due)
            failure = self._failures[first]
            failure.raised = True
            old = [t for t, f in self._failures.items() if f.raised and t != first]
            for t in old[: max(0, len(old) - _REMEMBERED)]:
                del self._failures[t]
        raise EnvironmentFault(f"copy {first} failed: {failure.error}") from failure.error


def _blocks(base: int, stride: int, ids: Sequence[int] | Indices) -> Addresses:
    return np.uint64(base) + as_indices(ids).astype(np.uint64) * np.uint64(stride)


def _merge(dst: Addresses, src: Addresses, lengths: Indices) -> tuple[list[int], list[int], list[int]]:
    """Joins pieces with their neighbours where both sides go on without a gap, and leaves out empty ones."""
    if len(lengths) == 1 and lengths[0] > 0:  # the usual one, and arrays cost more than such a copy
        return dst.tolist(), src.tolist(), lengths.tolist()
    some = lengths > 0
    dst, src, lengths = dst[some], src[some], lengths[some]
    if len(lengths) == 0:
        return [], [], []
    ends = lengths[:-1].astype(np.uint64)
    breaks = (dst[1:] != dst[:-1] + ends) | (src[1:] != src[:-1] + ends)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1))
    return dst[starts].tolist(), src[starts].tolist(), np.add.reduceat(lengths, starts).tolist()
