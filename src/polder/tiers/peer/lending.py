"""Lends KV blocks of a running engine to other engines, without asking them and without waiting for them: table and
protocol.

A lender has its KV cache in pages that other processes can map. It offers blocks that it does not need at the moment. A
borrower claims such **lent blocks** and puts data of its own there. When the lender's scheduler needs a block for a
request, it takes it back in the same call, without asking anybody. All they have to agree on is in one memory file, the
table. For each block it has

    epoch     odd while the block is offered or borrowed, even while it is the lender's own; it never decreases, and two
              odd values are two loans
    holder    the number of the borrower that claimed it
    writer    the process that is writing into it now
    foreign   set before a borrower's first byte, until the lender has zeroed the block, whoever let go of it meanwhile
    recalled  set while the lender waits for the block

The protocol guarantees the following, whatever processes do, crashes included (docs/lending.md has every case;
tests/tiers/test_lending_model.py explores all interleavings):

  1. No borrower writes into a block after `take_back` has returned. A borrower writes with the block's lock held,
     after it has compared the epoch under that lock; taking back takes the lock too. It is a lock of the kernel (an
     open-file-description lock on one byte of the table), so it ends with the process that held it: a borrower killed
     while writing leaves nothing locked.
  2. A borrower never takes foreign bytes for its own. Reads take no lock: the epoch is compared after the copy, and a
     block that was taken back meanwhile is a miss. This is as in a seqlock, but a changed epoch is never waited out.
     x86 orders the reads; elsewhere the checksum decides, which is compared as well (worker.py).
  3. Two borrowers never hold the same block: claims are made under its lock.
  4. Taking back waits for at most one copy of a block. A process that locks a recalled block releases it untouched. A
     borrower that holds a lock for longer (stopped or swapped out) is killed, because there is no other way to be
     sure that it will not write; the owner comes first (law 6 in docs/structures.md). Lenders kill, and the broker where
     it takes a dead lender's blocks back; its loop stands still meanwhile. Borrowers do not wait for each other: a claim
     skips a locked block, and a write gives up after half the deadline; both are misses.

There is no deadlock: a borrower that needs several lent blocks locks them in rising order, and a lender never holds
more than one lock.

On a GPU a copy that a dead process launched may still run when its lock is gone: the kernel closes the table's file
before the process has ended, and the GPU's context may go later. A `writer` mark found under the lock means that its
process died while writing. Whoever takes the block back, lender or broker, waits until that process has ended.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import math
import mmap
import os
import select
import signal
import struct
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.errors import ProtocolError

__all__ = ["LendingTable", "LentGeometry", "open_table", "table_bytes"]

logger = logging.getLogger("polder.tiers")


RECALL_DEADLINE_S = 1.0
"""A borrower that keeps a lender waiting for a lock for longer than this is killed."""

_MAGIC = 0x504F4C4445520002
_HEADER_BYTES = 4096
_CHANGES_AT = 480  # offset of a word in the header that only the lender writes
_LOCKS_AT = 1 << 40  # beyond the end of the file, so that no lock covers data
_FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux
_PF_EXITING = 4  # <linux/sched.h>; set before a process's files are closed


@dataclass(frozen=True, kw_only=True)
class LentGeometry:
    """Where the bytes of a lender's blocks are. A block consists of `granules` granules on each of its ranks.

    A granule is the largest piece that lies in one page and divides both the page and the block.
    """

    blocks: int
    ranks: int
    unit_blocks: int
    """Blocks in one unit; their pages come and go together."""
    unit_pages: int
    """Pages in one unit on one rank."""
    page_bytes: int
    granules: int
    """Granules in one block on one rank."""
    granule_bytes: int

    @property
    def units(self) -> int:
        return self.blocks // self.unit_blocks

    @property
    def block_bytes(self) -> int:
        return self.ranks * self.granules * self.granule_bytes


_GEOMETRY_FIELDS = tuple(LentGeometry.__dataclass_fields__)


def _sections(geometry: LentGeometry) -> dict[str, tuple[int, str, tuple[int, ...]]]:
    """Name -> (offset, dtype, shape) of the table's arrays."""
    arrays: list[tuple[str, str, tuple[int, ...]]] = [
        ("epoch", "<u8", (geometry.blocks,)),
        ("holder", "<u8", (geometry.blocks,)),
        ("writer", "<u8", (geometry.blocks,)),
        ("foreign", "<u8", (geometry.blocks,)),
        ("recalled", "<u8", (geometry.blocks,)),
        ("pages", "<i8", (geometry.ranks, geometry.units, geometry.unit_pages)),
        ("granule_page", "<i4", (geometry.unit_blocks, geometry.granules)),
        ("granule_offset", "<i4", (geometry.unit_blocks, geometry.granules)),
    ]
    sections, at = {}, _HEADER_BYTES
    for name, dtype, shape in arrays:
        sections[name] = (at, dtype, shape)
        at += -(-math.prod(shape) * np.dtype(dtype).itemsize // 64) * 64
    sections["end"] = (at, "", ())
    return sections


def table_bytes(geometry: LentGeometry) -> int:
    return _sections(geometry)["end"][0]


class LendingTable:
    """One process's view of a lender's table. Not thread-safe: every thread that locks needs a view of its own."""

    epoch: npt.NDArray[np.uint64]
    holder: npt.NDArray[np.uint64]
    writer: npt.NDArray[np.uint64]
    foreign: npt.NDArray[np.uint64]
    recalled: npt.NDArray[np.uint64]
    pages: IntArray
    """[ranks, units, unit_pages] the page numbers of each unit, -1 while it is not mapped."""
    granule_page: npt.NDArray[np.int32]
    """[unit_blocks, granules] in which page of its unit each granule of each block lies: an index into `pages[rank,
    unit]`."""
    granule_offset: npt.NDArray[np.int32]
    """[unit_blocks, granules] the offset of each granule in that page."""

    def __init__(self, fd: int) -> None:
        """Opens the table that `fd` is of; the fd stays the caller's. Raises ProtocolError when it is none.

        OFD locks belong to an open file, and two views of one open file would not exclude each other. A descriptor that
        was passed shares its open file with the sender: so this opens anew.
        """
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        size = os.fstat(self._fd).st_size
        try:
            if size < _HEADER_BYTES:
                raise ProtocolError(f"a lending table of {size} bytes")
            self._map = mmap.mmap(self._fd, size)
            self._header: npt.NDArray[np.uint64] = np.frombuffer(self._map, "<u8", 64)
            self._changes: npt.NDArray[np.uint64] = np.frombuffer(self._map, "<u8", 1, _CHANGES_AT)
            if int(self._header[0]) != _MAGIC:
                raise ProtocolError("not a lending table of this version of Polder")
            fields = self._header[2 : 2 + len(_GEOMETRY_FIELDS)].tolist()
            self.geometry = LentGeometry(**dict(zip(_GEOMETRY_FIELDS, fields, strict=True)))
            if min(fields) < 1 or self.geometry.blocks % self.geometry.unit_blocks:
                raise ProtocolError(f"a lending table of {self.geometry}")
            sections = _sections(self.geometry)
            if size < sections.pop("end")[0]:
                raise ProtocolError("a lending table that is cut short")
        except BaseException:
            os.close(self._fd)
            raise
        for name, (at, dtype, shape) in sections.items():
            array = np.frombuffer(self._map, dtype, int(np.prod(shape)), at).reshape(shape)
            setattr(self, name, array)

    @classmethod
    def create(cls, fd: int, geometry: LentGeometry) -> LendingTable:
        """Makes the empty file `fd` a table in which nothing is offered and no unit is mapped."""
        os.ftruncate(fd, table_bytes(geometry))
        header = np.zeros(64, dtype="<u8")
        header[0] = _MAGIC
        header[2 : 2 + len(_GEOMETRY_FIELDS)] = [getattr(geometry, name) for name in _GEOMETRY_FIELDS]
        os.pwrite(fd, header.tobytes(), 0)
        table = cls(fd)
        table.pages[:] = -1
        return table

    @property
    def identity(self) -> int:
        """The same for all views of one table, and different from that of every other table that somebody has open. A
        lender that comes back has a new table under its old name."""
        return os.fstat(self._fd).st_ino

    @property
    def changes(self) -> int:
        """Rises whenever a block is taken back, so that a borrower need not look through all of them to see that
        nothing has changed."""
        return int(self._changes[0])

    @property
    def closed(self) -> bool:
        """The lender is gone: nothing here may be used any more."""
        return bool(self._header[1])

    # ------------------------------------------------------------------ the lender

    def offer(self, blocks: IntArray) -> None:
        """These blocks hold nothing the lender needs: their epochs become odd. What is on offer or borrowed already
        stays so."""
        for block in blocks.tolist():
            with self._locked(block):
                if not self.epoch[block] % 2:
                    self.holder[block] = 0
                    self.epoch[block] += np.uint64(1)

    def take_back(self, block: int) -> bool:
        """The lender uses this block from now on. Returns whether a borrower's bytes may be in it: then it zeroes the
        block and clears `foreign`.

        Waits for a copy in flight, at most; a borrower that does not let go within RECALL_DEADLINE_S is killed, and its
        end is waited for, however long the kernel takes: until then it may write.
        """
        self.recalled[block] = (
            1  # a borrower that writes block after block would get the lock before us again and again
        )
        with self._locked(block):
            foreign = bool(self.foreign[block])
            self._bury(int(self.writer[block]), block)
            self.epoch[block] += np.uint64(int(self.epoch[block]) % 2)
            self.holder[block] = 0
            self.recalled[block] = 0
        self._changes += np.uint64(1)
        return foreign

    def reap(self, alive: Sequence[int]) -> int:
        """Puts the blocks of borrowers that are no more on offer again. `alive`: the numbers of those that are. Returns
        how many."""
        held = np.flatnonzero(self.holder)
        orphaned = held[~np.isin(self.holder[held], np.array(list(alive), dtype=np.uint64))]
        for block in orphaned:
            self.take_back(int(block))
            self.offer(block[None])
        return len(orphaned)

    def retire(self) -> None:
        """The lender is going, or gone: takes everything back and marks the table closed."""
        self._header[1] = 1
        for block in np.flatnonzero(self.epoch % 2).tolist():
            self.take_back(block)

    # ------------------------------------------------------------------ the borrower

    def claim(self, number: int, count: int) -> tuple[IntArray, IntArray]:
        """Claims up to `count` blocks on offer that nobody holds, for the borrower with this number. Returns (blocks,
        their epochs)."""
        blocks: list[int] = []
        epochs: list[int] = []
        if not self.closed:
            for block in np.flatnonzero((self.epoch % 2 == 1) & (self.holder == 0)).tolist():
                if len(blocks) == count:
                    break
                if not self._try_lock(block):
                    continue  # somebody else is claiming it, or the lender takes it back
                try:
                    free = self.epoch[block] % 2 and not self.holder[block] and not self.writer[block]
                    if free and not self.recalled[block]:
                        self.holder[block] = number
                        blocks.append(block)
                        epochs.append(int(self.epoch[block]))
                finally:
                    self._unlock(block)
        return np.array(blocks, dtype=np.int64), np.array(epochs, dtype=np.int64)

    def release(self, number: int, blocks: IntArray) -> None:
        """Lets go of blocks that this borrower holds and writes into no more. Reads under way become invalid: the
        epochs are raised.

        A block that is locked now stays held until its lender learns that the borrower is gone (`reap`).
        """
        for block in blocks.tolist():
            if not self._try_lock(block):
                continue
            try:
                if int(self.holder[block]) == number:
                    self.epoch[block] += np.uint64(2)
                    self.holder[block] = 0
            finally:
                self._unlock(block)

    @contextlib.contextmanager
    def writing(self, number: int, blocks: Sequence[int], epochs: Sequence[int]) -> Iterator[bool]:
        """Around one write into `blocks` (rising): True if they are all still ours, and stay ours until the end of the
        block."""
        held: list[int] = []
        marked: list[int] = []
        try:
            for block, epoch in zip(blocks, epochs, strict=True):
                if not self._lock_for_write(block, held):
                    break
                held.append(block)
                ours = not self.closed and int(self.epoch[block]) == epoch and int(self.holder[block]) == number
                # A mark: another rank of ours died in mid-write, and only the lender may bury it.
                if not ours or self.writer[block] or self.recalled[block]:
                    break
                self.foreign[block] = 1
                self.writer[block] = os.getpid()
                marked.append(block)
            else:
                yield True
                return
            self._let_go(held, marked)
            yield False
        finally:
            self._let_go(held, marked)

    def valid(self, blocks: IntArray, epochs: IntArray) -> bool:
        """After a read: none of the blocks was taken back before it ended."""
        return not self.closed and bool((self.epoch[blocks].astype(np.int64) == epochs).all())

    # ------------------------------------------------------------------ both

    def check_integrity(self) -> None:
        """Raises ProtocolError when a block that is the lender's own has a holder."""
        wrong = np.flatnonzero((self.epoch % 2 == 0) & (self.holder != 0))
        if len(wrong):
            raise ProtocolError(f"block {wrong[0]} is its lender's own, yet {int(self.holder[wrong[0]])} holds it")

    def close(self) -> None:
        """Ends this view; the table lives on. May be repeated."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ------------------------------------------------------------------ inside

    @contextlib.contextmanager
    def _locked(self, block: int) -> Iterator[None]:
        self._lock(block)
        try:
            yield
        finally:
            self._unlock(block)

    def _let_go(self, held: list[int], marked: list[int]) -> None:
        while marked:
            self.writer[marked.pop()] = 0
        while held:
            self._unlock(held.pop())

    def _lock(self, block: int) -> None:
        """For the lender: gets the lock, in the end by killing who has it."""
        started = time.monotonic()
        deadline = started + RECALL_DEADLINE_S
        while not self._try_lock(block):
            now = time.monotonic()
            if now > deadline:
                self._kill_holders(block)
                deadline = now + RECALL_DEADLINE_S
            time.sleep(20e-6 if now - started < 0.005 else 0.001)

    def _lock_for_write(self, block: int, held: list[int]) -> bool:
        """For a borrower: gets the lock, or gives up in time for the lender, who may wait for one that is `held`
        already."""
        deadline = time.monotonic() + RECALL_DEADLINE_S / 2
        while not self._try_lock(block):
            if time.monotonic() > deadline or any(self.recalled[other] for other in held):
                return False
            time.sleep(20e-6)
        return True

    def _try_lock(self, block: int) -> bool:
        try:
            fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, 0, _LOCKS_AT + block, 1, 0))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _unlock(self, block: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_UNLCK, 0, _LOCKS_AT + block, 1, 0))

    def _kill_holders(self, block: int) -> None:
        """Ends the process that has held one block's lock for too long. It may have been stopped before it could leave
        its mark."""
        inode = os.fstat(self._fd).st_ino
        for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
            if pid == os.getpid() or not _has_locked(pid, inode, _LOCKS_AT + block):
                continue
            with contextlib.suppress(ProcessLookupError):
                pidfd = os.pidfd_open(pid)
                try:
                    if _has_locked(
                        pid, inode, _LOCKS_AT + block
                    ):  # else it let go just now, or the number is another's
                        logger.error(
                            "process %d holds block %d for over %.1f s: killing it", pid, block, RECALL_DEADLINE_S
                        )
                        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                finally:
                    os.close(pidfd)

    def _bury(self, pid: int, block: int) -> None:
        """The lock is ours and a writer's mark is still there: that process died in mid-write."""
        if pid:
            _wait_for_end(pid)
            self.writer[block] = 0


def _wait_for_end(pid: int) -> None:
    """Returns when a process that is dying has ended, and its GPU contexts with it. One with this number that is not
    dying is another process."""
    while _is_dying(pid):
        try:
            pidfd = os.pidfd_open(pid)
        except OSError as error:
            if error.errno in (errno.ESRCH, errno.ENOENT, errno.EINVAL):  # the last two: a thread has this number now
                return
            raise
        try:
            poll = select.poll()  # select() does not accept descriptors above 1023
            poll.register(pidfd, select.POLLIN)
            if poll.poll(1000):
                return
        finally:
            os.close(pidfd)
        logger.error("process %d died while it wrote into a lent block, and has not ended yet: waiting for it", pid)


def _is_dying(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            flags = int(stat.read().rpartition(")")[2].split()[6])
    except (FileNotFoundError, ProcessLookupError):
        return False
    return bool(flags & _PF_EXITING)


def _has_locked(pid: int, inode: int, at: int) -> bool:
    """Whether a descriptor of this process holds the lock on byte `at` of the file: the kernel tells in fdinfo
    (proc(5))."""
    folder = f"/proc/{pid}/fdinfo"
    try:
        for fd in os.listdir(folder):
            with contextlib.suppress(FileNotFoundError), open(f"{folder}/{fd}") as info:
                for line in info:
                    # lock:	1: OFDLCK ADVISORY  WRITE -1 00:01:46329 1099511627781 1099511627782
                    words = line.split()
                    if words[:1] == ["lock:"] and words[-3].endswith(f":{inode}"):
                        first, last = words[-2:]
                        if int(first) <= at and (last == "EOF" or at <= int(last)):
                            return True
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        pass  # it ended, or is none of ours
    return False


def open_table(fd: int) -> LendingTable:
    """LendingTable of a descriptor that came from elsewhere, which is closed."""
    try:
        return LendingTable(fd)
    finally:
        os.close(fd)
