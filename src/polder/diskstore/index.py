"""index.db of one disk: an SQLite table with up to 100 slots a row. All rows exist from the start and never change
their size.

So the file has its final size when it is created, its tree never changes, and a batch of adjacent pages changes one
row. A transaction stores a batch as a whole, even when the process is killed. Nothing is synchronised to the disk:
after a power loss each row is an old or a new one, and a page whose slot holds other bytes than its old row says does
not verify.

The log (WAL) is copied into the file before it outgrows its share. The file is locked while it is open, so SQLite needs
no shared-memory file.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polder.diskstore.layout import SQLITE_PAGE_BYTES, WAL_BYTES, Meta, index_pages, records_per_row
from polder.errors import EnvironmentFault

__all__ = ["Records", "SlotIndex", "create_index", "empty_records", "per_row", "remove_index", "row_bytes"]

Records = npt.NDArray[np.void]
"""[slots] with the fields "key" (2 words), "generation" (0 in an empty slot), "digest" (one for each part) and "used"
(orders the pages by their last use)."""

_ROWS_AT_ONCE = 96
_FRAME_BYTES = SQLITE_PAGE_BYTES + 24


def empty_records(slots: int, parts: int) -> Records:
    fields = [("key", "<u8", (2,)), ("generation", "<u8"), ("digest", "<u8", (parts,)), ("used", "<i8")]
    return np.zeros(slots, dtype=fields)


def per_row(records: Records) -> int:
    """How many of these records one row of the index holds."""
    return records_per_row(records["digest"].shape[1])


def create_index(path: Path, records: Records, device: str) -> None:
    """Creates index.db anew, completely or not at all. Raises EnvironmentFault."""
    fresh = path.with_name(path.name + ".new")
    try:
        fresh.unlink(missing_ok=True)
        remove_index(path)
        with contextlib.closing(sqlite3.connect(fresh, isolation_level=None)) as db:
            for pragma in (f"page_size={SQLITE_PAGE_BYTES}", "journal_mode=OFF", "synchronous=OFF"):
                db.execute(f"PRAGMA {pragma}")
            db.execute(f"PRAGMA application_id={_identity(device)}")
            db.execute("CREATE TABLE slots (number INTEGER PRIMARY KEY, records BLOB NOT NULL)")
            db.execute("BEGIN")
            rows = range(-(-len(records) // per_row(records)))
            db.executemany("INSERT INTO slots VALUES (?, ?)", ((row, row_bytes(records, row)) for row in rows))
            db.execute("COMMIT")
        fd = os.open(fresh, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        fresh.rename(path)
    except (sqlite3.Error, OSError) as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise EnvironmentFault(f"{path}: cannot be made: {error}") from None


def remove_index(path: Path) -> None:
    """Removes index.db and its log. Raises OSError."""
    for suffix in ("-wal", "-shm", "-journal", ""):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def row_bytes(records: Records, row: int) -> bytes:
    width = per_row(records)
    part = records[row * width : (row + 1) * width].tobytes()
    return part.ljust(width * records.itemsize, b"\0")


class SlotIndex:
    """An open index.db. `store` and `close` may be called from any thread, one call at a time."""

    def __init__(self, path: Path, meta: Meta) -> None:
        """Opens a file that `create_index` made. Raises EnvironmentFault when it is damaged, missing, in use, or
        another disk's."""
        self._path, self._slots, self._parts = path, meta.slots, meta.parts
        self._wal = path.with_name(path.name + "-wal")
        try:
            os.stat(path)
            self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=0)
        except (sqlite3.Error, OSError) as error:
            raise EnvironmentFault(f"{path}: cannot be opened: {error}") from None
        try:
            for pragma in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=OFF", "temp_store=MEMORY"):
                self._db.execute(f"PRAGMA {pragma}").fetchall()
            self._db.execute(f"PRAGMA max_page_count={index_pages(meta.slots, meta.parts)}")
            self._db.execute("PRAGMA wal_autocheckpoint=0")
            identity = self._db.execute("PRAGMA application_id").fetchone()[0]
            self._db.execute("BEGIN IMMEDIATE")  # takes the lock until the file is closed
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            self._db.close()
            raise EnvironmentFault(f"{path}: {error}") from None
        if identity != _identity(meta.device):
            self._db.close()
            raise EnvironmentFault(f"{path}: is the index of another disk")

    def load(self) -> tuple[Records, bool]:
        """The records of all slots, and whether all could be read; records that cannot be read are empty."""
        width = records_per_row(self._parts)
        count = -(-self._slots // width)
        try:
            rows = self._db.execute("SELECT number, records FROM slots ORDER BY number").fetchall()
        except sqlite3.Error:
            rows = self._salvage(count)
        records = empty_records(count * width, self._parts)
        whole = len(rows) == count
        for number, data in rows:
            if 0 <= number < count and isinstance(data, bytes) and len(data) == width * records.itemsize:
                records[number * width : (number + 1) * width] = np.frombuffer(data, dtype=records.dtype)
            else:
                whole = False
        return records[: self._slots].copy(), whole

    def _salvage(self, count: int) -> list[tuple[int, bytes]]:
        """Reads row by row: a damaged page of the file holds only one row."""
        rows = []
        for number in range(count):
            with contextlib.suppress(sqlite3.Error):
                rows += self._db.execute("SELECT number, records FROM slots WHERE number = ?", (number,)).fetchall()
        return rows

    def damage(self) -> str:
        """What SQLite finds wrong with the file; "" if nothing."""
        try:
            found = [str(row[0]) for row in self._db.execute("PRAGMA quick_check")]
        except sqlite3.Error as error:
            found = [str(error)]
        return "" if found == ["ok"] else "; ".join(found)

    def store(self, rows: dict[int, bytes]) -> None:
        """Stores rows, given by number (see `row_bytes`), in transactions of 96.

        Raises EnvironmentFault when a transaction fails; earlier ones are stored.
        """
        items = [(data, number) for number, data in rows.items()]
        try:
            for at in range(0, len(items), _ROWS_AT_ONCE):
                part = items[at : at + _ROWS_AT_ONCE]
                self._make_room(len(part))
                self._db.execute("BEGIN")
                self._db.executemany("UPDATE slots SET records = ? WHERE number = ?", part)
                self._db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            with contextlib.suppress(sqlite3.Error):
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
            raise EnvironmentFault(f"{self._path}: {error}") from None

    def close(self) -> None:
        """Copies the log into the file and closes it. Never raises."""
        with contextlib.suppress(sqlite3.Error):
            self._db.close()

    def _make_room(self, rows: int) -> None:
        """Empties the log if these rows might exceed its share."""
        with contextlib.suppress(FileNotFoundError):
            if os.stat(self._wal).st_size + (rows + 8) * _FRAME_BYTES > WAL_BYTES:
                busy, _, _ = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
                if busy:
                    raise EnvironmentFault(f"{self._path}: its log cannot be emptied")


def _identity(device: str) -> int:
    return int(device[:7], 16)  # SQLite keeps 31 bits
