"""What a store is opened with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DiskConfig", "StoreConfig"]


@dataclass(frozen=True, kw_only=True)
class DiskConfig:
    directory: Path
    """An existing directory on the disk that is to be used."""
    limit_bytes: int
    """What `du` of the directory may reach."""


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    disks: tuple[DiskConfig, ...]
    page_bytes: int
    """A multiple of 4096, 64 KiB at least."""
    parts: int = 1
    """The number of equal parts that can be read one by one, up to 496. A part is a multiple of 4096 bytes."""
    namespace: str
    """Pages of two namespaces are never mixed up: a directory that was made for another namespace is refused."""
    timeout_s: float = 5.0
    """A batch ends after this time; pages that are missing then are misses."""
    errors_allowed: int = 8
    """After so many failed pages, without a thousand good ones in between, a disk is not used any more in this run."""

    @property
    def part_bytes(self) -> int:
        return self.page_bytes // self.parts
