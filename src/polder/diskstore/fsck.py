"""Checks a disk's directory that no store uses: sizes, index, and the checksum of every page. Repairs what can be
repaired."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from polder.diskstore.directory import lock_directory, rebuild
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.index import Records, SlotIndex, empty_records
from polder.diskstore.io import Arena, OpenFile, open_page_file
from polder.diskstore.keys import distinct
from polder.diskstore.layout import INDEX, META, SLAB, Meta, read_meta, usage_bytes
from polder.diskstore.pieces import PageFormat, verify
from polder.errors import ConfigError, EnvironmentFault

__all__ = ["Report", "check_directory", "locked", "repair_directory"]

_BATCH_PAGES = 64
_TIMEOUT_S = 60.0


@dataclass(kw_only=True)
class Report:
    directory: str
    device: str = ""
    namespace: str = ""
    slots: int = 0
    pages: int = 0
    """Pages in the index."""
    corrupt_pages: int = 0
    """Pages whose bytes do not verify."""
    unreadable_pages: int = 0
    doubled_pages: int = 0
    """Pages that are in two slots; the older copy is of no use."""
    limit_bytes: int = 0
    disk_bytes: int = 0
    problems: list[str]
    """A sentence for each thing that is wrong."""
    repaired: bool = False
    """Whether a repair has removed all problems."""


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keeps stores from opening the directory. Raises EnvironmentFault when it is missing or in use."""
    fd = lock_directory(directory)
    try:
        yield
    finally:
        os.close(fd)


def check_directory(directory: Path, open_file: OpenFile = open_page_file) -> tuple[Report, Records]:
    """Reads everything and changes nothing. Also returns the records of the pages that verify.

    The directory must be `locked`. Raises ConfigError when it is not a Polder disk, EnvironmentFault when it cannot be
    read.
    """
    meta = _meta(directory)
    report = Report(
        directory=str(directory),
        device=meta.device,
        namespace=meta.namespace,
        slots=meta.slots,
        limit_bytes=meta.limit_bytes,
        problems=[],
    )
    records = _check_index(directory, meta, report)
    records = _check_pages(directory, meta, records, report, open_file)
    _check_sizes(directory, meta, report)
    return report, records


def repair_directory(directory: Path, report: Report, good: Records) -> None:
    """Makes a new index of the good pages and gives the slab its right size. The directory must still be `locked`.

    Raises EnvironmentFault when that fails.
    """
    try:
        (directory / f"{META}.new").unlink(missing_ok=True)
        rebuild(directory, _meta(directory), good)
        report.disk_bytes = usage_bytes(directory)
    except OSError as error:
        raise EnvironmentFault(f"{directory}: cannot be repaired: {error}") from None
    report.repaired = report.disk_bytes <= report.limit_bytes


def _meta(directory: Path) -> Meta:
    try:
        meta = read_meta(directory)
    except OSError as error:
        raise EnvironmentFault(f"{directory / META}: {error.strerror}") from None
    if meta is None:
        raise ConfigError(f"{directory}: is not a Polder disk: it has no {META}")
    return meta


def _check_index(directory: Path, meta: Meta, report: Report) -> Records:
    try:
        index = SlotIndex(directory / INDEX, meta)
    except EnvironmentFault as error:
        report.problems.append(f"the index is lost, and all pages with it: {error}")
        return empty_records(meta.slots, meta.parts)
    try:
        damage = index.damage()
        records, whole = index.load()
    finally:
        index.close()
    if damage:
        report.problems.append(f"the index is damaged: {damage}")
    elif not whole:
        report.problems.append("the index lacks rows")
    report.pages = int((records["generation"] != 0).sum())
    used = np.flatnonzero(records["generation"])
    newest_first = used[np.argsort(records["generation"][used])[::-1]]
    older = np.setdiff1d(used, newest_first[distinct(records["key"][newest_first])])
    report.doubled_pages = len(older)
    if len(older):
        report.problems.append(f"{len(older)} pages are in two slots")
    records[older] = empty_records(1, meta.parts)
    return records


def _check_pages(directory: Path, meta: Meta, records: Records, report: Report, open_file: OpenFile) -> Records:
    used = np.flatnonzero(records["generation"])
    if not len(used):
        return records
    try:
        file = open_file(directory / SLAB)
    except OSError as error:
        raise EnvironmentFault(f"{directory / SLAB}: {error.strerror}") from None
    engine, arena = ThreadEngine(), Arena(_BATCH_PAGES, meta.page_bytes)
    namespace = xxhash.xxh3_64_intdigest(meta.namespace.encode())
    pages = PageFormat(page_bytes=meta.page_bytes, parts=meta.parts, namespace=namespace)
    bad: list[npt.NDArray[np.int64]] = []
    for at in range(0, len(used), _BATCH_PAGES):
        slots = used[at : at + _BATCH_PAGES]
        some = records[slots]
        transfer = pages.transfer(0, file, slots, some["key"], some["generation"], arena.addresses[: len(slots)])
        errors, torn = verify(engine.read([transfer], _TIMEOUT_S)[0], some["digest"])
        report.unreadable_pages += int((errors != 0).sum())
        report.corrupt_pages += int(torn.sum())
        bad.append(slots[(errors != 0) | torn])
    engine.close()
    if not len(engine.unsettled()):
        file.close()
    if report.unreadable_pages:
        report.problems.append(f"{report.unreadable_pages} pages cannot be read")
    if report.corrupt_pages:
        report.problems.append(f"{report.corrupt_pages} pages do not verify")
    records[np.concatenate(bad)] = empty_records(1, meta.parts)
    return records


def _check_sizes(directory: Path, meta: Meta, report: Report) -> None:
    slab = directory / SLAB
    size = slab.stat().st_size if slab.exists() else 0
    if size != meta.slots * meta.page_bytes:
        report.problems.append(f"the slab has {size} bytes instead of {meta.slots * meta.page_bytes}")
    report.problems += [
        f"{name} is left over" for name in (f"{META}.new", f"{INDEX}.new") if (directory / name).exists()
    ]
    report.disk_bytes = usage_bytes(directory)
    if report.disk_bytes > meta.limit_bytes:
        report.problems.append(f"the directory takes {report.disk_bytes} bytes, the limit is {meta.limit_bytes}")
