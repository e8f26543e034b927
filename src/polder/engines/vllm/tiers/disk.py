"""The disk tier's part of an engine: what core and workers agree on, and the store that each worker opens.

    worker   opens its store and says what it holds (`found`)          before the scheduler exists
    core     takes what all ranks hold, and tells them (`adopt`)       when vLLM asks for its manager
    worker   carries out loads and spills from then on

Every rank has a store of its own in each directory, so that a page is one rank's part of one block.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polder.diskstore.config import DiskConfig, StoreConfig
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.io import ALIGNMENT_BYTES, Arena, IoEngine
from polder.diskstore.keys import Keys
from polder.diskstore.layout import META
from polder.diskstore.store import DiskStore
from polder.emulation.factory import Emulation
from polder.engines.vllm.plans import DiskPlan
from polder.engines.vllm.process import here, present
from polder.engines.vllm.settings import EngineSettings
from polder.errors import ConfigError, EnvironmentFault
from polder.tiers.disk.memory import DiskMemory
from polder.tiers.disk.mirror import common_inventory, disk_capacity, inventory
from polder.tiers.disk.slots import DiskSlots

__all__ = ["OpenDisks", "adopt", "agree_on_slots", "disk_plan", "found", "staged_pages"]

logger = logging.getLogger("polder.engine")

LEAST_PAGE_BYTES = 64 << 10
LEAST_STAGED_PAGES, MOST_STAGED_PAGES, STAGED_BYTES = 24, 768, 96 << 20
"""Memory of each rank for pages on their way, beside the host tier: every batch costs the host 2 ms, however short it
is (docs/log.md)."""


def disk_plan(settings: EngineSettings, *, shard_bytes: int, namespace: int, ranks: int) -> DiskPlan | None:
    """None for an engine without the tier."""
    if not settings.disks:
        return None
    page_bytes = max(LEAST_PAGE_BYTES, -(-shard_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
    return DiskPlan(
        disks=settings.disks,
        page_bytes=page_bytes,
        staged_pages=staged_pages(page_bytes),
        namespace=f"{namespace:016x}, {shard_bytes} bytes a block",
        ranks=ranks,
        io=settings.disk_io,
    )


def staged_pages(page_bytes: int) -> int:
    return min(MOST_STAGED_PAGES, max(LEAST_STAGED_PAGES, STAGED_BYTES // page_bytes))


class OpenDisks:
    """One rank's store. Raises ConfigError or BudgetError when a directory or a size cannot be meant; a disk that fails
    is out."""

    def __init__(self, plan: DiskPlan, rank: int, emulation: Emulation) -> None:
        disks = tuple(
            DiskConfig(directory=_directory(Path(path), plan.ranks, rank), limit_bytes=limit // plan.ranks)
            for path, limit in plan.disks
        )
        namespace = f"{plan.namespace}, rank {rank} of {plan.ranks}"
        config = StoreConfig(disks=disks, page_bytes=plan.page_bytes, namespace=namespace)
        self.store = DiskStore(config, engine=emulation.disk_engine(_io_engine(plan), disks=len(plan.disks)))
        self.capacity = disk_capacity(self.store)
        self.inventory = inventory(self.store, self.capacity)
        self._arena = Arena(plan.staged_pages, plan.page_bytes)

    def memory(self, capacity: int, kept: Keys, host_address: int, host_slot_bytes: int) -> DiskMemory:
        return DiskMemory(
            self.store,
            self._arena,
            host_address=host_address,
            host_slot_bytes=host_slot_bytes,
            capacity=capacity,
            inventory=kept,
        )

    def close(self) -> None:
        self.store.close()


def _directory(path: Path, ranks: int, rank: int) -> Path:
    """Made for a rank below `path`; `path` itself must be there, for only its owner knows which disk it lies on. Where
    it cannot be made the store finds the disk "out", as every disk that cannot be used."""
    if ranks == 1:
        return path
    mine = path / f"rank{rank}"
    try:
        if (path / META).exists():
            raise ConfigError(f"{path} has the pages of an engine with one rank: empty it, or name another directory")
        if path.is_dir():
            mine.mkdir(exist_ok=True)
    except OSError as error:
        logger.warning("%s: %s", mine, error.strerror)
    return mine


def _io_engine(plan: DiskPlan) -> IoEngine:
    if plan.io == "aio":
        from polder.diskstore.aio import AioEngine

        try:
            return AioEngine(ThreadEngine())
        except EnvironmentFault as error:
            logger.warning("%s", error)
    return ThreadEngine()


# ---------------------------------------------------------------- called by the core, in every worker


def found(worker_: Any) -> tuple[int, Keys]:
    """(slots, keys of the pages that can be read) of this rank."""
    disks = present(present(here.tiers).disks)
    return disks.capacity, disks.inventory


def adopt(worker_: Any, capacity: int, kept: Keys) -> None:
    """From now on jobs of this rank may name the disk."""
    present(here.tiers).start(capacity, kept)


def agree_on_slots(rpc: Callable[..., list[Any]], plan: DiskPlan) -> DiskSlots:
    """The core's side: what every rank has room for, with what every rank has kept."""
    ranks = rpc(found)
    capacity = min(slots for slots, _ in ranks)
    kept = common_inventory([keys for _, keys in ranks])[:capacity]
    rpc(adopt, capacity, kept)
    logger.info("disk tier: %d blocks, %d of them kept from a former run", capacity, len(kept))
    return DiskSlots(name="disk", capacity=capacity, slot_bytes=plan.page_bytes * plan.ranks, inventory=kept)
