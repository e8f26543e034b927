"""A borrower in another process, on the real table and on shared pages; see test_lending.py.

    python -m tests.tiers.lending_processes ROLE TABLE_FD PAGES_FD [NUMBER [SEED [SECONDS]]]

The pages are one page a lot. Each role writes a line when it is where the test wants it, and lives on until it is killed.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import struct
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np

from polder.tiers.peer.lending import LendingTable

PAGE = 4096
BODY = PAGE - 12


def page_of(owner: int, serial: int) -> bytes:
    """A block: who wrote it, its number, the checksum of all of it."""
    head = struct.pack("<II", owner, serial)
    body = random.Random(owner << 32 | serial).randbytes(64) * (BODY // 64 + 1)
    return head + struct.pack("<I", zlib.crc32(head + body[:BODY])) + body[:BODY]


def owner_of(page: bytes) -> tuple[int, int] | None:
    """(owner, serial), or None when it is not one whole block."""
    owner, serial, _ = struct.unpack_from("<III", page)
    return (owner, serial) if page == page_of(owner, serial) else None


def say(word: object) -> None:
    print(word, flush=True)


def hang() -> None:
    while True:
        signal.pause()


def write_half_and_hang(table: LendingTable, pages: mmap.mmap) -> None:
    """In the middle of a write, for ever; writes on and on, so that a byte after its death would be seen."""
    lots, epochs = table.claim(os.getpid(), 1)
    with table.writing(os.getpid(), lots.tolist(), epochs.tolist()) as ours:
        assert ours
        say(lots[0])
        at = int(lots[0]) * PAGE
        while True:
            pages[at : at + PAGE // 2] = os.urandom(PAGE // 2)


def claim_and_hang(table: LendingTable, pages: mmap.mmap) -> None:
    """Has the lock, and no mark."""
    lots, _ = table.claim(os.getpid(), 1)
    assert table._try_lock(int(lots[0]))
    say(lots[0])
    hang()


def die_slowly(table: LendingTable, pages: mmap.mmap) -> None:
    """Dies in mid-write as a process with a GPU does: its file is closed, its lock gone, and its copy still lands. Ends when it
    is told to.

    The main thread is dead then, and another one lives on.
    """
    lots, epochs = table.claim(os.getpid(), 1)
    at = int(lots[0]) * PAGE

    def remains() -> None:
        while "Z" not in Path("/proc/self/stat").read_text().rpartition(")")[2].split()[0]:
            time.sleep(0.001)
        table._unlock(int(lots[0]))
        say(lots[0])
        sys.stdin.readline()
        pages[at : at + PAGE] = os.urandom(PAGE)
        os._exit(0)

    with table.writing(os.getpid(), lots.tolist(), epochs.tolist()) as ours:
        assert ours
        threading.Thread(target=remains).start()
        ctypes.CDLL(None).syscall(60, 0)  # exit(2), of this thread alone


def lend(table: LendingTable, pages: mmap.mmap) -> None:
    table.offer(np.arange(table.geometry.blocks))
    say("offered")
    hang()


def claim_all(table: LendingTable, pages: mmap.mmap) -> None:
    """Claims one lot after the other until none is left, beginning when it is told to."""
    say("ready")
    sys.stdin.readline()
    mine: list[int] = []
    while True:
        lots, _ = table.claim(os.getpid(), 1)
        mine += lots.tolist()
        if not len(lots) and not ((table.epoch % 2 == 1) & (table.holder == 0)).any():
            break
    say(mine)


def live(table: LendingTable, pages: mmap.mmap, number: int, seed: int, seconds: float) -> None:
    """Random claims, writes, reads and releases. Says how many of its validated reads gave wrong bytes, and how many were right."""
    draw = random.Random(seed)
    mine: dict[int, int] = {}
    holds: dict[int, int] = {}  # lot -> the serial that was written there
    serial = wrong = right = invalid = written = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        for lot in [lot for lot, epoch in mine.items() if int(table.epoch[lot]) != epoch]:
            del mine[lot]
            holds.pop(lot, None)
        what = draw.random()
        if what < 0.2 or not mine:
            lots, epochs = table.claim(number, draw.randint(1, 3))
            for lot, epoch in zip(lots.tolist(), epochs.tolist(), strict=True):
                mine[lot] = epoch
                holds.pop(lot, None)
        elif what < 0.22:
            lot = draw.choice(sorted(mine))
            table.release(number, np.array([lot]))
            del mine[lot]
            holds.pop(lot, None)
        elif what < 0.6 or not holds:
            chosen = sorted(draw.sample(sorted(mine), min(len(mine), draw.randint(1, 2))))
            serial += 1
            with table.writing(number, chosen, [mine[lot] for lot in chosen]) as ours:
                if ours:
                    page = page_of(number, serial)
                    for lot in chosen:
                        for half in (0, PAGE // 2):
                            pages[lot * PAGE + half : lot * PAGE + half + PAGE // 2] = page[half : half + PAGE // 2]
                        holds[lot] = serial
                    written += 1
        else:
            lot = draw.choice(sorted(holds))
            page = pages[lot * PAGE : lot * PAGE + PAGE]
            if not table.valid(np.array([lot]), np.array([mine[lot]])):
                invalid += 1
            elif owner_of(page) == (number, holds[lot]):
                right += 1
            else:
                wrong += 1
    say([wrong, right, invalid, written])


def main() -> None:
    role, table_fd, pages_fd, *numbers = sys.argv[1:]
    table = LendingTable(int(table_fd))
    pages = mmap.mmap(int(pages_fd), 0)
    if role == "live":
        live(table, pages, int(numbers[0]), int(numbers[1]), float(numbers[2]))
    else:
        globals()[role](table, pages)


if __name__ == "__main__":
    main()
