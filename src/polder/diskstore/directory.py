"""Opens a disk's directory: takes its lock, compares it with what is asked for, and creates, resizes or mends its
files."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from polder.diskstore.index import Records, SlotIndex, create_index, empty_records, remove_index
from polder.diskstore.io import OpenFile, PageFile
from polder.diskstore.layout import INDEX, META, SLAB, Layout, Meta, preallocate, read_meta, write_meta
from polder.errors import ConfigError, EnvironmentFault

__all__ = ["OpenDirectory", "lock_directory", "open_directory", "rebuild"]

logger = logging.getLogger("polder.diskstore")

OURS = frozenset(
    (META, SLAB, INDEX, f"{META}.new", f"{INDEX}.new", f"{INDEX}-wal", f"{INDEX}-shm", f"{INDEX}-journal", "lost+found")
)


@dataclass(frozen=True, kw_only=True)
class OpenDirectory:
    lock_fd: int
    meta: Meta
    file: PageFile
    index: SlotIndex
    records: Records


def lock_directory(directory: Path) -> int:
    """Locks the directory until the returned descriptor is closed or the process ends.

    Raises EnvironmentFault when the directory is missing or in use.
    """
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        # It is not created here: if its disk is not mounted, it would be created on the disk below, and fill that one.
        raise EnvironmentFault(
            f"{directory}: {error.strerror}: make it on the disk that is to be used, and see that it is mounted"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        raise EnvironmentFault(f"{directory}: is used by another process") from None
    return fd


def open_directory(directory: Path, layout: Layout, namespace: str, open_file: OpenFile) -> OpenDirectory:
    """Opens a disk's directory. An empty one is initialised, one of another size is resized.

    Raises ConfigError when it holds something else, or pages of another namespace, page size or number of parts. Raises
    EnvironmentFault and OSError when it cannot be used now.
    """
    with contextlib.ExitStack() as undo:
        lock_fd = lock_directory(directory)
        undo.callback(os.close, lock_fd)
        meta = read_meta(directory)
        if meta is None:
            meta = _make(directory, layout, namespace)
        else:
            _compare(directory, meta, layout, namespace)
        index, records = _open_index(directory, meta)
        if (meta.slots, meta.limit_bytes) != (layout.slots, layout.limit_bytes):
            index.close()
            meta = Meta.new(layout, namespace, meta.device)
            records = rebuild(directory, meta, records)
            index = SlotIndex(directory / INDEX, meta)
        undo.callback(index.close)
        preallocate(directory / SLAB, layout.slab_bytes)
        file = open_file(directory / SLAB)
        undo.pop_all()
    return OpenDirectory(lock_fd=lock_fd, meta=meta, file=file, index=index, records=records)


def rebuild(directory: Path, meta: Meta, records: Records) -> Records:
    """Gives the directory the size that `meta` says, and a new index with the records that fit. Returns these
    records."""
    kept = empty_records(meta.slots, meta.parts)
    count = min(len(kept), len(records))
    kept[:count] = records[:count]
    slab, size = directory / SLAB, meta.slots * meta.page_bytes
    growing = not slab.exists() or slab.stat().st_size < size
    if growing:  # to grow, the slab comes before the index; to shrink, after it
        preallocate(slab, size)
    create_index(directory / INDEX, kept, meta.device)
    write_meta(directory, meta)
    if not growing:
        preallocate(slab, size)
    return kept


def _make(directory: Path, layout: Layout, namespace: str) -> Meta:
    """meta.json is written last: files without it were never used."""
    strange = sorted(set(os.listdir(directory)) - OURS)
    if strange:
        raise ConfigError(f"{directory}: is not a Polder disk and holds {strange[0]!r}: name an empty directory")
    remove_index(directory / INDEX)
    (directory / SLAB).unlink(missing_ok=True)
    meta = Meta.new(layout, namespace)
    rebuild(directory, meta, empty_records(meta.slots, meta.parts))
    return meta


def _compare(directory: Path, meta: Meta, layout: Layout, namespace: str) -> None:
    for what, there, asked in (
        ("namespace", meta.namespace, namespace),
        ("pages of bytes", meta.page_bytes, layout.page_bytes),
        ("parts a page", meta.parts, layout.parts),
    ):
        if there != asked:
            raise ConfigError(
                f"{directory}: made for {what} {there!r}, asked for {asked!r}: "
                "name another directory, or empty this one to start over"
            )


def _open_index(directory: Path, meta: Meta) -> tuple[SlotIndex, Records]:
    """Opens the index. Readable rows of a damaged one are kept: a page with a wrong row does not verify."""
    path = directory / INDEX
    try:
        index = SlotIndex(path, meta)
    except EnvironmentFault as error:
        logger.warning("%s; it starts empty", error)
        records = rebuild(directory, meta, empty_records(meta.slots, meta.parts))
        return SlotIndex(path, meta), records
    records, whole = index.load()
    if not whole:
        index.close()
        logger.warning("%s: damaged; what can be read of it is kept", path)
        records = rebuild(directory, meta, records)
        index = SlotIndex(path, meta)
    return index, records
