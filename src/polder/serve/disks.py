"""The disks of a fleet: which directory of each is a model's, and how many bytes of it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from polder.engines.vllm.settings import parse_disks
from polder.errors import BudgetError, ConfigError
from polder.serve.schema import MemoryTable, ModelTable
from polder.swarm.layout import LEAST_PAGE_BYTES, plan_layout
from polder.units import format_bytes

__all__ = ["Disks", "disk_parts", "folder_of", "make_folders"]

Disks = tuple[tuple[str, int], ...]
"""Directory and limit in bytes of each."""


def disk_parts(memory: MemoryTable, models: Sequence[ModelTable]) -> dict[str, Disks]:
    """By name of the model: equal parts of every disk for all with that tier. Raises ConfigError or BudgetError."""
    users = [model for model in models if "disk" in model.tiers]
    for model in models:
        if model in users and "host" not in model.tiers:
            raise ConfigError(
                f'model {model.name}: the tier "disk" is written from the tier "host": add "host" to its tiers, '
                'and memory.host, e.g. "64GiB"'
            )
        for key, given in (("disk_writes", model.disk_writes is not None), ("disk_io", model.disk_io != "threads")):
            if given and model not in users:
                raise ConfigError(
                    f'model {model.name}: {key} is given, but its tiers are {model.tiers}: add "disk" to them'
                )
    if users and not memory.disks:
        raise ConfigError(
            f'model {users[0].name}: the tier "disk" needs memory.disks, a directory on each disk and its size: '
            'add a line disks = ["/mnt/nvme0:400GiB"]'
        )
    if memory.disks and not users:
        raise ConfigError('memory.disks is given, but no model uses it: add "disk" to the tiers of a model')
    disks = [disk for text in memory.disks for disk in parse_disks(text, what="memory.disks")]
    _check_paths([path for path, _ in disks])
    for path, size in disks:
        part = size // len(users)
        try:
            plan_layout(part, LEAST_PAGE_BYTES)
        except BudgetError as error:
            raise BudgetError(
                f"memory.disks: {path}: {format_bytes(size)} in {len(users)} equal parts: {error}; write a larger size"
            ) from None
    return {
        model.name: tuple((str(Path(path) / folder_of(model.name)), size // len(users)) for path, size in disks)
        for model in users
    }


def _check_paths(paths: Sequence[str]) -> None:
    seen: dict[str, str] = {}
    for path in paths:
        if not os.path.isdir(path):
            raise ConfigError(
                f"memory.disks: there is no directory {path}: mount the disk, or make the directory on it; "
                "what is in it is made by Polder"
            )
        real = os.path.realpath(path)
        if real in seen:
            other = "" if seen[real] == path else f" as {seen[real]}"
            raise ConfigError(f"memory.disks: {path} is given twice{other}: name each disk once")
        seen[real] = path


def folder_of(name: str) -> str:
    """One folder's name for a model's: another one for each. "/" and ":" are written as %2F and %3A."""
    return quote(name, safe="")


def make_folders(disks: Iterable[Disks]) -> None:
    """The models' directories, where they are missing. Raises ConfigError when one cannot be made."""
    for path, _ in (disk for part in disks for disk in part):
        try:
            Path(path).mkdir(exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"memory.disks: cannot make {path}: {error.strerror}; give its parent to the user that runs this, "
                "or take this disk out of memory.disks"
            ) from error
