"""The disks of a fleet: each model's directory on them, and its limit in bytes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from polder.diskstore.layout import LEAST_PAGE_BYTES, plan_layout
from polder.engines.vllm.settings import EngineSettings
from polder.errors import BudgetError, ConfigError
from polder.serve.schema import MemoryTable
from polder.units import format_bytes

__all__ = ["Disks", "disk_parts", "folder_of", "make_folders"]

Disks = tuple[tuple[str, int], ...]
"""Directory and limit in bytes of each."""


def disk_parts(memory: MemoryTable, models: Sequence[EngineSettings]) -> dict[str, Disks]:
    """By model: equal parts of every disk for all models with that tier. Raises ConfigError or BudgetError."""
    users = [model.engine for model in models if "disk" in model.tiers]
    if users and not memory.disks:
        raise ConfigError(
            f'model {users[0]}: the tier "disk" needs memory.disks, a directory on each disk and its size: '
            'add a line disks = ["/mnt/nvme0:400GiB"]'
        )
    if memory.disks and not users:
        raise ConfigError('memory.disks is given, but no model uses it: add "disk" to the tiers of a model')
    _check_paths([path for path, _ in memory.disks])
    for path, size in memory.disks:
        try:
            plan_layout(size // len(users), LEAST_PAGE_BYTES)
        except BudgetError as error:
            raise BudgetError(
                f"memory.disks: {path}: {format_bytes(size)} in {len(users)} equal parts: {error}; write a larger size"
            ) from None
    parts = {
        name: tuple((str(Path(path) / folder_of(name)), size // len(users)) for path, size in memory.disks)
        for name in users
    }
    _check_apart([path for disks in parts.values() for path, _ in disks])
    return parts


def _check_paths(paths: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        if not os.path.isdir(path):
            raise ConfigError(
                f"memory.disks: there is no directory {path}: mount the disk, or make the directory on it; "
                "Polder makes what is in it"
            )
        real = os.path.realpath(path)
        if real in seen:
            other = "" if seen[real] == path else f" as {seen[real]}"
            raise ConfigError(f"memory.disks: {path} is given twice{other}: name each disk once")
        for before, theirs in seen.items():
            outer, inner = sorted((Path(real), Path(before)))
            if outer in inner.parents and os.stat(outer).st_dev == os.stat(inner).st_dev:
                raise ConfigError(f"memory.disks: {path} and {theirs}: one lies inside the other: name each disk once")
        seen[real] = path


def _check_apart(folders: Sequence[str]) -> None:
    """Raises ConfigError when one of the models' directories is another one, by a link, or lies inside it."""
    real = {folder: Path(os.path.realpath(folder)) for folder in folders}
    for folder, place in real.items():
        for other, theirs in real.items():
            if folder != other and (place == theirs or theirs in place.parents):
                how = "is the same directory as" if place == theirs else "lies inside"
                raise ConfigError(
                    f"memory.disks: {folder} {how} {other}: give each disk a directory of its own, without links"
                )


def folder_of(name: str) -> str:
    """A folder name for a model's name, unique for each. "/" and ":" are written as %2F and %3A."""
    return quote(name, safe="")


def make_folders(disks: Iterable[Disks]) -> None:
    """Makes the models' directories where they are missing. Raises ConfigError when one cannot be made."""
    for path, _ in (disk for part in disks for disk in part):
        try:
            Path(path).mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"memory.disks: cannot make {path}: {error.strerror}; give its parent to the user that runs this, "
                "or take this disk out of memory.disks"
            ) from error
