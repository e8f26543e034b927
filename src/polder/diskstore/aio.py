"""An I/O engine over Linux kernel AIO. For single pages it takes half the CPU time of threads. It is optional (disk_io
= "aio").

One thread submits many requests at once and computes the checksums as they complete, without a thread switch and a
contended GIL for each. Unlike io_uring, the usual container profiles allow it. Its weakness: a submission may block
without a time limit, when the file system has to look up where the file lies. `ThreadEngine` keeps its time limit on
any disk.

Files without O_DIRECT and memory that is not aligned are left to a `ThreadEngine`.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import xxhash

from polder.arrays import IntArray
from polder.diskstore.engine import ThreadEngine, side_by_side
from polder.diskstore.io import ALIGNMENT_BYTES, DirectFile, Outcome, Transfer
from polder.errors import EnvironmentFault
from polder.memory.addresses import bytes_at

__all__ = ["AioEngine"]

_DEPTH = 32
"""Requests of one disk that are submitted at a time."""
_EVENTS = 256
_MACHINE = platform.machine()
_CALLS = {"x86_64": (206, 209, 208, 207), "aarch64": (0, 2, 4, 1)}
"""System call numbers of io_setup, io_submit, io_getevents and io_destroy."""
_PREADV, _PWRITEV = 7, 8
_IOCB = np.dtype(
    [
        *(("data", "<u8"), ("key", "<u4"), ("flags_of_rw", "<i4"), ("opcode", "<u2"), ("priority", "<i2")),
        *(("fd", "<u4"), ("buffers", "<u8"), ("count", "<u8"), ("offset", "<i8"), ("reserved", "<u8")),
        *(("flags", "<u4"), ("eventfd", "<u4")),
    ]
)
_EVENT = np.dtype([("data", "<u8"), ("iocb", "<u8"), ("result", "<i8"), ("result_too", "<i8")])
_IOVEC = np.dtype([("address", "<u8"), ("bytes", "<u8")])

_Move = Callable[[Sequence[Transfer], float], list[Outcome]]

_c = ctypes.CDLL(None, use_errno=True)  # its functions release the GIL
_c.syscall.restype = ctypes.c_long
_c.syscall.argtypes = (ctypes.c_long, *[ctypes.c_void_p] * 5)


class AioEngine:
    """Moves batches of pieces by kernel AIO. An IoEngine."""

    def __init__(self, threads: ThreadEngine | None = None) -> None:
        """`threads` does what AIO cannot, and is closed with this engine. Raises EnvironmentFault where AIO is not
        available."""
        self._threads = threads or ThreadEngine()
        self._lock = threading.Lock()
        self._idle = [_open_context()]
        self._hung: list[_Call] = []

    def read(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        return self._move(transfers, timeout_s, _PREADV, self._threads.read)

    def write(self, transfers: Sequence[Transfer], timeout_s: float) -> list[Outcome]:
        return self._move(transfers, timeout_s, _PWRITEV, self._threads.write)

    def unsettled(self) -> IntArray:
        with self._lock:
            for call in self._hung:
                call.reap(0, 0.0)
            self._idle += [call.context for call in self._hung if not call.flying]
            self._hung = [call for call in self._hung if call.flying]
            held = [call.memory_in_flight() for call in self._hung]
        return np.unique(np.concatenate([self._threads.unsettled(), *held]))

    def close(self) -> None:
        """A context in which a request hangs is left to the end of the process, because destroying it would wait."""
        self.unsettled()
        with self._lock:
            for context in self._idle:
                _c.syscall(_CALLS[_MACHINE][3], context, None, None, None, None)
            self._idle.clear()
        self._threads.close()

    def _move(self, transfers: Sequence[Transfer], timeout_s: float, opcode: int, otherwise: _Move) -> list[Outcome]:
        if not transfers or not all(map(_fits, transfers)):
            return otherwise(transfers, timeout_s)
        until = time.monotonic() + timeout_s
        try:
            with self._lock:
                context = self._idle.pop() if self._idle else _open_context()
        except EnvironmentFault:  # no more contexts
            return otherwise(transfers, timeout_s)
        call = _Call(context, transfers, opcode)
        while call.submit() and (wait := until - time.monotonic()) > 0:
            call.reap(1, wait)
        call.abandoned = True
        outcomes = call.outcomes()
        with self._lock:
            if call.flying:
                self._hung.append(call)
            else:
                self._idle.append(call.context)
        for transfer, outcome in zip(transfers, outcomes, strict=True):
            rows = np.flatnonzero(~np.isin(outcome.errors, (0, errno.ETIMEDOUT)))
            if len(rows):  # AIO reports one error for a whole run: the threads find out which piece is bad
                again = otherwise([_part(transfer, rows)], timeout_s)[0]
                outcome.errors[rows], outcome.digests[rows] = again.errors, again.digests
        return outcomes


class _Call:
    """The requests of one batch: those to submit, those in flight, and the results.

    Pieces are numbered over all transfers, within each in the order of its offsets. A request is a run of pieces.
    """

    def __init__(self, context: int, transfers: Sequence[Transfer], opcode: int) -> None:
        self.context, self.flying, self.abandoned = context, 0, False
        self._started = time.monotonic()
        self._ended = [self._started] * len(transfers)
        self._orders = [np.argsort(transfer.offsets, kind="stable") for transfer in transfers]
        self._transfers, self._piece_bytes = transfers, transfers[0].piece_bytes
        offsets = [t.offsets[order].tolist() for t, order in zip(transfers, self._orders, strict=True)]
        addresses = _flat([t.addresses for t in transfers], self._orders)
        self._places: list[int] = addresses.tolist()
        self._seeds: list[int] = _flat([t.seeds for t in transfers], self._orders).tolist()
        self._errors, self._digests = [errno.ETIMEDOUT] * len(self._seeds), [0] * len(self._seeds)
        self._reading = opcode == _PREADV
        runs, starts, files = list[tuple[int, int]](), list[int](), list[int]()
        self._disks, self._limits = list[int](), list[list[int]]()
        first_piece = 0
        for number, (transfer, mine) in enumerate(zip(transfers, offsets, strict=True)):
            cut = side_by_side(mine, self._piece_bytes, _DEPTH)
            self._limits.append([len(runs), len(runs) + len(cut)])
            runs += [(first_piece + first, first_piece + end) for first, end in cut]
            starts += [mine[first] for first, _ in cut]
            files += [_descriptor(transfer)] * len(cut)
            self._disks += [number] * len(cut)
            first_piece += len(mine)
        self._runs, self._in_flight = runs, [0] * len(transfers)
        self._sent, self._over = set[int](), set[int]()
        self._vectors = np.empty(len(self._seeds), dtype=_IOVEC)  # the kernel reads these two arrays
        self._vectors["address"], self._vectors["bytes"] = addresses, self._piece_bytes
        self._requests = np.zeros(len(runs), dtype=_IOCB)
        spans = np.array(runs, dtype=np.int64).reshape(-1, 2)
        self._requests["data"], self._requests["opcode"] = np.arange(len(runs)), opcode
        self._requests["fd"], self._requests["offset"] = files, starts
        self._requests["buffers"] = self._vectors.ctypes.data + _IOVEC.itemsize * spans[:, 0]
        self._requests["count"] = spans[:, 1] - spans[:, 0]
        self._pointers = self._requests.ctypes.data + _IOCB.itemsize * np.arange(len(runs), dtype=np.int64)
        self._events = np.zeros(_EVENTS, dtype=_EVENT)
        self._depth = max(1, min(_DEPTH, _EVENTS // len(transfers)))
        if not self._reading:
            for piece in range(len(self._seeds)):
                self._sum(piece)

    def submit(self) -> bool:
        """Submits what fits into the disks' queues. False when nothing is left to wait for."""
        for disk, limits in enumerate(self._limits):
            count = min(self._depth - self._in_flight[disk], limits[1] - limits[0])
            if count <= 0:
                continue
            taken = _c.syscall(
                _CALLS[_MACHINE][1], self.context, count, self._pointers.ctypes.data + 8 * limits[0], None, None
            )
            if taken > 0:
                self._sent.update(range(limits[0], limits[0] + taken))
                limits[0] += taken
                self._in_flight[disk] += taken
                self.flying += taken
            elif ctypes.get_errno() != errno.EAGAIN or not self.flying:
                self._finish(limits[0], -(ctypes.get_errno() or errno.EIO))
                limits[0] += 1
        return self.flying > 0 or any(at < end for at, end in self._limits)

    def reap(self, least: int, wait_s: float) -> None:
        """Waits for `least` requests to complete, for `wait_s` at most."""
        until = np.array([int(wait_s), int(wait_s % 1 * 1e9)], dtype=np.int64)
        least = min(least, self.flying)
        count = _c.syscall(
            _CALLS[_MACHINE][2], self.context, least, _EVENTS, self._events.ctypes.data, until.ctypes.data
        )
        if count > 0:
            self.flying -= count
            data, results = self._events["data"][:count].tolist(), self._events["result"][:count].tolist()
            now = time.monotonic()
            for run, result in zip(data, results, strict=True):
                self._in_flight[self._disks[run]] -= 1
                self._ended[self._disks[run]] = now
                self._finish(run, result)

    def outcomes(self) -> list[Outcome]:
        found, at = [], 0
        for order, ended in zip(self._orders, self._ended, strict=True):
            errors, digests = np.empty(len(order), dtype=np.int32), np.empty(len(order), dtype=np.uint64)
            errors[order] = self._errors[at : at + len(order)]
            digests[order] = np.array(self._digests[at : at + len(order)], dtype=np.uint64)
            found.append(Outcome(errors=errors, digests=digests, seconds=ended - self._started))
            at += len(order)
        return found

    def memory_in_flight(self) -> IntArray:
        pieces = [piece for run in self._sent - self._over for piece in range(*self._runs[run])]
        memory: IntArray = _flat([t.memory for t in self._transfers], self._orders).astype(np.int64)
        return memory[np.array(pieces, dtype=np.int64)]

    def _finish(self, run: int, result: int) -> None:
        self._over.add(run)
        if self.abandoned:
            return
        first, end = self._runs[run]
        whole = result == (end - first) * self._piece_bytes
        for piece in range(first, end):
            if whole and self._reading:
                self._sum(piece)
            self._errors[piece] = 0 if whole else -min(0, result) or errno.EIO

    def _sum(self, piece: int) -> None:
        self._digests[piece] = xxhash.xxh3_64_intdigest(
            bytes_at(self._places[piece], self._piece_bytes), self._seeds[piece]
        )


def _open_context() -> int:
    """Raises EnvironmentFault."""
    if _MACHINE not in _CALLS:
        raise EnvironmentFault(f"kernel AIO: not known on {_MACHINE}: use the engine of threads")
    context = ctypes.c_ulong(0)
    if _c.syscall(_CALLS[_MACHINE][0], _EVENTS, ctypes.addressof(context), None, None, None) != 0:
        raise EnvironmentFault(f"kernel AIO: {os.strerror(ctypes.get_errno())}: use the engine of threads")
    return context.value


def _fits(transfer: Transfer) -> bool:
    file = transfer.file
    aligned = not (transfer.addresses % ALIGNMENT_BYTES).any()
    return isinstance(file, DirectFile) and file.alignment_bytes > 1 and aligned


def _descriptor(transfer: Transfer) -> int:
    assert isinstance(transfer.file, DirectFile)
    return transfer.file.fd


def _part(transfer: Transfer, rows: IntArray) -> Transfer:
    return replace(
        transfer,
        offsets=transfer.offsets[rows],
        addresses=transfer.addresses[rows],
        memory=transfer.memory[rows],
        seeds=transfer.seeds[rows],
    )


def _flat(arrays: Sequence[npt.NDArray[np.generic]], orders: Sequence[IntArray]) -> npt.NDArray[np.generic]:
    return np.concatenate([array[order] for array, order in zip(arrays, orders, strict=True)])
