"""What lies in a disk's directory, and how many bytes each file may take, so that together they never exceed the limit.

    meta.json     format, device id, namespace and sizes
    slab          the pages, slot after slot; allocated as a whole when it is created
    index.db      SQLite: which page is in which slot; it has all its rows from the start and never grows
    index.db-wal  SQLite's log; a checkpoint empties it before it exceeds WAL_BYTES

`du` of the directory counts more than the lengths of the files: the slab's extents, the directory itself, partly filled
blocks. A share of the limit is set aside for that.
"""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from polder.diskstore.io import ALIGNMENT_BYTES
from polder.errors import BudgetError, ConfigError, EnvironmentFault
from polder.units import format_bytes

__all__ = [
    *("FORMAT", "INDEX", "LEAST_PAGE_BYTES", "Layout", "META", "Meta", "SLAB", "SQLITE_PAGE_BYTES"),
    *(
        "WAL_BYTES",
        "index_pages",
        "plan_layout",
        "preallocate",
        "read_meta",
        "records_per_row",
        "usage_bytes",
        "write_meta",
    ),
]

FORMAT = 1
META, SLAB, INDEX = "meta.json", "slab", "index.db"
LEAST_PAGE_BYTES = 64 << 10
SQLITE_PAGE_BYTES = 4096
WAL_BYTES = 1 << 20
_FIXED_BYTES = 2 * WAL_BYTES + (128 << 10)
"""Twice the log, because some file systems allocate ahead, and the directory with meta.json and its next version."""
_EXTENTS = 1024
"""One byte is set aside for this many bytes of the slab, for its extents. The worst case is 24 bytes for each 64 KiB.
"""
_ROW_BYTES = 4000
"""The most bytes of records in one row of the index, so that a row fills one SQLite page."""
_RECORD_BYTES, _DIGEST_BYTES = 32, 8
"""A record has one digest for each part of its page."""
_MOST_PARTS = (_ROW_BYTES - _RECORD_BYTES) // _DIGEST_BYTES


@dataclass(frozen=True, kw_only=True)
class Layout:
    page_bytes: int
    parts: int
    """Number of equal parts in which a page can be read."""
    limit_bytes: int
    slots: int

    @property
    def slab_bytes(self) -> int:
        return self.slots * self.page_bytes


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """The content of meta.json."""

    format: int
    device: str
    """32 hexadecimal digits, chosen when the directory is made."""
    namespace: str
    page_bytes: int
    limit_bytes: int
    slots: int
    parts: int = 1
    """Older directories, from before pages had parts, do not have this field."""

    @classmethod
    def new(cls, layout: Layout, namespace: str, device: str = "") -> Meta:
        return cls(format=FORMAT, device=device or uuid.uuid4().hex, namespace=namespace, **asdict(layout))


def records_per_row(parts: int) -> int:
    """How many slots one row of the index describes: 100 where a page is one part."""
    return _ROW_BYTES // (_RECORD_BYTES + _DIGEST_BYTES * parts)


def index_pages(slots: int, parts: int) -> int:
    """The most SQLite pages that index.db has: one for each row, inner nodes with at least 300 children, and the
    schema."""
    rows = -(-slots // records_per_row(parts))
    return rows + rows // 300 + 8


def _needed_bytes(slots: int, page_bytes: int, parts: int) -> int:
    slab = slots * page_bytes
    return slab + slab // _EXTENTS + index_pages(slots, parts) * SQLITE_PAGE_BYTES + _FIXED_BYTES


def plan_layout(limit_bytes: int, page_bytes: int, parts: int = 1) -> Layout:
    """Plans as many slots as the limit allows.

    Raises ConfigError for bad sizes of pages or parts, and BudgetError when not even one slot fits.
    """
    bad = _bad_page(page_bytes, parts)
    if bad:
        raise ConfigError(bad)
    least = _needed_bytes(1, page_bytes, parts)
    if limit_bytes < least:
        raise BudgetError(
            f"a disk store of {format_bytes(limit_bytes)}: {format_bytes(least)} is the least for one page"
        )
    slots = limit_bytes // page_bytes
    while (over := _needed_bytes(slots, page_bytes, parts) - limit_bytes) > 0:
        slots -= max(1, over // (2 * page_bytes))
    return Layout(page_bytes=page_bytes, parts=parts, limit_bytes=limit_bytes, slots=slots)


def _bad_page(page_bytes: int, parts: int) -> str:
    """Why pages of this size are impossible; "" if they are possible."""
    if page_bytes < LEAST_PAGE_BYTES or page_bytes % ALIGNMENT_BYTES:
        return f"pages of {page_bytes} bytes: disks need a multiple of {ALIGNMENT_BYTES}, {LEAST_PAGE_BYTES} at least"
    if parts < 1 or page_bytes % (parts * ALIGNMENT_BYTES):
        return (
            f"pages of {page_bytes} bytes in {parts} parts: a part has to be a multiple of {ALIGNMENT_BYTES} bytes: "
            "choose another number of parts, or another size of pages"
        )
    if parts > _MOST_PARTS:
        return f"pages in {parts} parts: {_MOST_PARTS} are the most: choose larger parts or smaller pages"
    return ""


def read_meta(directory: Path) -> Meta | None:
    """Reads meta.json; None when there is none. Raises ConfigError when it is invalid, OSError when it cannot be
    read."""
    path = directory / META
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        version = json.loads(text)["format"]
        if version != FORMAT:
            raise ConfigError(
                f"{path}: format {version}, this Polder knows {FORMAT}: empty the directory or use that Polder"
            )
        meta = msgspec.json.decode(text, type=Meta)
    except (ValueError, TypeError, KeyError, msgspec.MsgspecError) as error:
        raise ConfigError(f"{path}: cannot be understood ({error}): empty the directory to start over") from None
    bad = _bad_page(meta.page_bytes, meta.parts) or ("no slots" if meta.slots < 1 else "")
    if bad:
        raise ConfigError(f"{path}: {bad}: empty the directory to start over")
    return meta


def write_meta(directory: Path, meta: Meta) -> None:
    """Replaces meta.json atomically. Raises OSError."""
    fresh = directory / (META + ".new")
    with open(fresh, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(meta)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(directory / META)


def preallocate(path: Path, size_bytes: int) -> None:
    """Makes the file exactly this long, fully allocated. Raises EnvironmentFault when the disk is too full, and
    OSError."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        before = os.fstat(fd).st_size
        if before > size_bytes:
            os.ftruncate(fd, size_bytes)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, min(before, size_bytes))  # the part that was allocated is of no use
            free = os.fstatvfs(fd)
            raise EnvironmentFault(
                f"{path}: {format_bytes(size_bytes)} cannot be allocated ({error.strerror}); "
                f"{format_bytes(free.f_bavail * free.f_frsize)} is free: lower the limit or make room"
            ) from None
    finally:
        os.close(fd)


def usage_bytes(directory: Path) -> int:
    """What `du` reports for the directory. Raises OSError."""
    total = directory.stat().st_blocks
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # SQLite removed its log
                total += entry.stat(follow_symlinks=False).st_blocks
    return total * 512
