"""Puts emulated links, disks and faults around the real parts of an engine, as its settings say."""

from __future__ import annotations

from typing import cast

from polder.diskstore.io import IoEngine
from polder.diskstore.model import DiskModel
from polder.emulation.backends import FaultyBackend, PacedBackend, seeded_faults
from polder.emulation.disks import DiskFaults, EmulatedDisk, EmulatedEngine
from polder.emulation.links import EmulatedLink
from polder.emulation.memories import FaultyMemory, PacedBatch, PacedMemory
from polder.emulation.options import parse_faults, parse_links
from polder.memory.backend import Backend
from polder.tiers.jobs import BatchMemory, Direction, TierMemory

__all__ = ["Emulation"]

_FAULTY_CALLS = 100_000
_DISK_LATENCY_S = 80e-6


class Emulation:
    """What one process of an engine emulates. Each method returns its argument unchanged where nothing is to be
    emulated.

    All parts that name the same link and direction share that link's bandwidth.
    """

    def __init__(self, *, links: str, faults: str) -> None:
        """`links`, `faults`: POLDER_LINKS and POLDER_FAULTS. Raises ConfigError."""
        self._rates, self._faults = parse_links(links), parse_faults(faults)
        self._links: dict[tuple[str, Direction], EmulatedLink] = {}

    def weights_backend(self, backend: Backend) -> Backend:
        """The backend that streams weights."""
        rate = self._rates.get("weights")
        return backend if rate is None else PacedBackend(backend, rate)

    def window_backend(self, backend: Backend, *, rank: int) -> Backend:
        """The backend that moves windowed blocks of this rank."""
        if (rate := self._rates.get("window")) is not None:
            backend = PacedBackend(backend, rate)
        if self._faults.fail:
            failing = seeded_faults(self._faults.seed + rank, {"copy": self._faults.fail}, calls=_FAULTY_CALLS)
            backend = FaultyBackend(backend, failing)
        return backend

    def tier_memory(self, memory: TierMemory, tier: str, direction: Direction) -> TierMemory:
        """The memory of one lane: one tier ("peer" or "host"), one direction."""
        if (link := self._link(tier, direction)) is not None:
            memory = cast(TierMemory, PacedMemory(memory, link))
        if self._faults.fail or self._faults.corrupt:
            memory = cast(TierMemory, FaultyMemory(memory, self._faults))
        return memory

    def disk_memory(self, memory: BatchMemory) -> BatchMemory:
        """The disk tier: its pages reach the engine over the link of the host tier."""
        link = self._link("host", "load")
        return memory if link is None else cast(BatchMemory, PacedBatch(memory, link))

    def disk_engine(self, engine: IoEngine, *, disks: int) -> IoEngine:
        """The I/O engine under the disk tier's store."""
        rate, faults = self._rates.get("disk"), self._faults
        if rate is None and not faults.fail:
            return engine
        model = DiskModel(bytes_per_s=rate or float("inf"), latency_s=_DISK_LATENCY_S if rate else 0.0)
        return EmulatedEngine(
            engine, [EmulatedDisk(model, DiskFaults(fail=faults.fail, seed=faults.seed + n)) for n in range(disks)]
        )

    def _link(self, name: str, direction: Direction) -> EmulatedLink | None:
        rate = self._rates.get(name)
        if rate is None:
            return None
        return self._links.setdefault((name, direction), EmulatedLink(rate))
