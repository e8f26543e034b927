"""How fast a disk is, in the numbers of its data sheet. Used to schedule reads and to emulate disks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from polder.arrays import FloatArray
from polder.errors import ConfigError

__all__ = ["PM9A3", "DiskModel", "page_speeds"]


@dataclass(frozen=True, kw_only=True)
class DiskModel:
    """A request takes max(bytes / bytes_per_s, 1 / requests_per_s) of the disk's time, and is reported `latency_s`
    later.

    Raises ConfigError for a speed that is not above 0.
    """

    bytes_per_s: float
    requests_per_s: float = float("inf")
    latency_s: float = 80e-6

    def __post_init__(self) -> None:
        if min(self.bytes_per_s, self.requests_per_s) <= 0:
            raise ConfigError(
                f"disk: {self.bytes_per_s} bytes/s, {self.requests_per_s} requests/s; write numbers above 0"
            )

    def slowed(self, share: float) -> DiskModel:
        """The same disk at this share of both speeds."""
        return replace(self, bytes_per_s=share * self.bytes_per_s, requests_per_s=share * self.requests_per_s)


PM9A3 = DiskModel(bytes_per_s=6.9e9, requests_per_s=1.1e6)
"""The faster of the two disks in the Swarm paper (section 8), as published."""


def page_speeds(disks: Sequence[DiskModel], page_bytes: int) -> FloatArray:
    """[disks] pages a second, each read by a request of its own."""
    return np.array([min(disk.requests_per_s, disk.bytes_per_s / page_bytes) for disk in disks])
