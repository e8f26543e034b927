"""What lies in a disk's directory, and how many bytes each part may take, so that together they never exceed the limit.

    meta.json    what the directory is: format, device, namespace, sizes
    slab         the pages, nothing else, slot after slot; allocated as a whole when it is made
    index.db     SQLite: which page is in which slot; all its rows are there from the start and never grow
    index.db-wal its log: bounded by a checkpoint after so many bytes

`du` of the directory counts more than the files' lengths: extents of the slab, the directory itself, blocks not filled. A share is
set aside for that.
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
    *(
        "FORMAT",
        "INDEX",
        "LEAST_PAGE_BYTES",
        "META",
        "SLAB",
        "SQLITE_PAGE_BYTES",
        "WAL_BYTES",
        "Layout",
    ),
    *("Meta", "index_pages", "plan_layout", "preallocate", "read_meta", "records_per_row", "usage_bytes", "write_meta"),
]

FORMAT = 1
META, SLAB, INDEX = "meta.json", "slab", "index.db"
LEAST_PAGE_BYTES = 64 << 10
SQLITE_PAGE_BYTES = 4096
WAL_BYTES = 1 << 20
_FIXED_BYTES = 2 * WAL_BYTES + (128 << 10)
"""The log twice (some file systems allocate ahead), and the directory, meta.json and its successor."""
_EXTENTS = 1024
"""Of this many bytes of the slab one is set aside for its extents; 24 bytes for each 64 KiB are the worst case."""
_ROW_BYTES = 4000
"""Of records, at most: so a row of the index fills one page of SQLite's."""
_RECORD_BYTES, _DIGEST_BYTES = 32, 8
"""A record has a digest for each part of its page."""
_MOST_PARTS = (_ROW_BYTES - _RECORD_BYTES) // _DIGEST_BYTES


@dataclass(frozen=True, kw_only=True)
class Layout:
    page_bytes: int
    parts: int
    """Of equal size, that a page is read in."""
    limit_bytes: int
    slots: int

    @property
    def slab_bytes(self) -> int:
        return self.slots * self.page_bytes


class Meta(msgspec.Struct, frozen=True, kw_only=True):
    """meta.json."""

    format: int
    device: str
    """32 hexadecimal digits, made with the directory."""
    namespace: str
    page_bytes: int
    limit_bytes: int
    slots: int
    parts: int = 1
    """Directories of before there were parts do not say it."""

    @classmethod
    def new(cls, layout: Layout, namespace: str, device: str = "") -> Meta:
        return cls(format=FORMAT, device=device or uuid.uuid4().hex, namespace=namespace, **asdict(layout))


def records_per_row(parts: int) -> int:
    """How many slots a row of the index is about: 100 where a page is one part."""
    return _ROW_BYTES // (_RECORD_BYTES + _DIGEST_BYTES * parts)


def index_pages(slots: int, parts: int) -> int:
    """The most pages that index.db has: one a row, inner nodes of at least 300 children, the schema."""
    rows = -(-slots // records_per_row(parts))
    return rows + rows // 300 + 8


def _needed_bytes(slots: int, page_bytes: int, parts: int) -> int:
    slab = slots * page_bytes
    return slab + slab // _EXTENTS + index_pages(slots, parts) * SQLITE_PAGE_BYTES + _FIXED_BYTES


def plan_layout(limit_bytes: int, page_bytes: int, parts: int = 1) -> Layout:
    """As many slots as the limit allows. Raises ConfigError for bad sizes of pages or parts, BudgetError when not one slot fits."""
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
    """Why there can be no such pages, "" if there can."""
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
    """None when there is none. Raises ConfigError when it cannot be understood, OSError when it cannot be read."""
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
    """Atomically. Raises OSError."""
    fresh = directory / (META + ".new")
    with open(fresh, "wb") as file:
        file.write(msgspec.json.format(msgspec.json.encode(meta)) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    fresh.rename(directory / META)


def preallocate(path: Path, size_bytes: int) -> None:
    """Makes the file exactly so long, all of it allocated. Raises EnvironmentFault when the disk is too full, other OSErrors."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        before = os.fstat(fd).st_size
        if before > size_bytes:
            os.ftruncate(fd, size_bytes)
        try:
            os.posix_fallocate(fd, 0, size_bytes)
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(fd, min(before, size_bytes))  # what was got of it is of no use
            free = os.fstatvfs(fd)
            raise EnvironmentFault(
                f"{path}: {format_bytes(size_bytes)} cannot be allocated ({error.strerror}); "
                f"{format_bytes(free.f_bavail * free.f_frsize)} is free: lower the limit or make room"
            ) from None
    finally:
        os.close(fd)


def usage_bytes(directory: Path) -> int:
    """What `du` says of the directory. Raises OSError."""
    total = directory.stat().st_blocks
    with os.scandir(directory) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):  # SQLite removed its log
                total += entry.stat(follow_symlinks=False).st_blocks
    return total * 512
