"""The tiers' half in the engine core: vLLM's OffloadingManager and OffloadingSpec over polder.tiers.tierset."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import (
    CanonicalKVCaches,
    LoadStoreSpec,
    LookupResult,
    OffloadingCounterMetadata,
    OffloadingGaugeMetadata,
    OffloadingManager,
    OffloadingMetricMetadata,
    OffloadingSpec,
    OffloadingWorker,
    OffloadKey,
    OffloadPolicy,
    PrepareStoreOutput,
    ReqContext,
    RequestOffloadingContext,
    get_offload_block_hash,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from polder import metrics
from polder.broker.client import fetch_table
from polder.broker.wire import FetchTable, Neighbours
from polder.engines.vllm.plans import TierPlan
from polder.engines.vllm.process import here
from polder.engines.vllm.tiers.disk import agree_on_slots
from polder.engines.vllm.tiers.lenders import Lenders
from polder.engines.vllm.tiers.worker import TierJob, open_worker
from polder.errors import ConfigError
from polder.tiers.disk.spill import SpillConfig
from polder.tiers.eviction.density import HitDensity
from polder.tiers.host import HostSlots
from polder.tiers.index import PENDING
from polder.tiers.jobs import Job
from polder.tiers.peer.borrowing import PeerSlots
from polder.tiers.peer.lending import LendingTable, open_table
from polder.tiers.slots import Slots
from polder.tiers.tierset import TierSet

__all__ = ["PolderOffloadingSpec", "TierAgreement", "TierManager"]

logger = logging.getLogger("polder.engine")

STATISTICS_EVERY_S = 0.25
GHOSTS_PER_SLOT = 4.0
MANY_SLOTS = 1 << 18
"""With a disk of a million pages, four ghosts a slot would take 200 MB."""

_SOURCES = {"peer": CacheHitSource.P2P, "host": CacheHitSource.HOST, "disk": CacheHitSource.DISK}


@dataclass(frozen=True, kw_only=True)
class TierAgreement:
    """What this engine's core agreed on with the broker, for the manager that vLLM makes later."""

    plan: TierPlan
    engine: str
    broker: Path
    ranks: int
    block_tokens: int
    rpc: Callable[..., list[Any]]
    """Calls a function in all workers."""
    disk_writes_bytes: int | None = None


class TierManager(OffloadingManager):  # type: ignore[misc]
    """Answers vLLM's scheduler. The blocks' keys are vLLM's: block hash and KV cache group."""

    def __init__(self, agreement: TierAgreement) -> None:
        self._agreement = agreement
        plan = agreement.plan
        slot_bytes = plan.shard_bytes * agreement.ranks
        self.peers: PeerSlots | None = None
        slots: list[Slots] = []
        for name, capacity in zip(plan.tiers, plan.capacities, strict=True):
            if name == "peer":
                self.peers = PeerSlots(
                    name=name,
                    number=plan.number,
                    shard_bytes=plan.shard_bytes,
                    ranks=agreement.ranks,
                    capacity=capacity,
                )
                slots.append(self.peers)
            elif name == "disk":
                assert plan.disk is not None
                slots.append(agree_on_slots(agreement.rpc, plan.disk))
            else:
                slots.append(HostSlots(name=name, size_bytes=capacity * slot_bytes, slot_bytes=slot_bytes))
        capacity = sum(tier.capacity for tier in slots)
        policy = HitDensity(capacity, ghosts_per_slot=GHOSTS_PER_SLOT if capacity < MANY_SLOTS else 1.0)
        self.tiers = TierSet(
            slots,
            policy,
            ranks=agreement.ranks,
            block_tokens=agreement.block_tokens,
            spilling=SpillConfig(written_bytes_per_day=agreement.disk_writes_bytes),
        )
        self._more_to_spill = False
        self._lenders: Lenders | None = None
        if self.peers is not None:
            self._lenders = Lenders(self.peers, agreement.engine, self._fetch_table)
        self._sent: dict[str, float] = {}
        self._sent_at = float("-inf")

    # ------------------------------------------------------------------ vLLM asks

    def lookup(self, key: OffloadKey, req_context: ReqContext) -> LookupResult:
        found = int(self.tiers.find([key])[0])
        if self.tiers.held:
            return LookupResult.RETRY
        return LookupResult.HIT if found >= 0 else LookupResult.HIT_PENDING if found == PENDING else LookupResult.MISS

    def get_load_source(self, key: OffloadKey, req_context: ReqContext) -> CacheHitSource:
        found = int(self.tiers.find([key])[0])
        return _SOURCES[self._agreement.plan.tiers[found]] if found >= 0 else CacheHitSource.EXTERNAL_UNSPECIFIED

    def prepare_load(self, keys: Collection[OffloadKey], req_context: ReqContext) -> TierJob:
        ordered = list(keys)
        positions = len({get_offload_block_hash(key) for key in ordered})  # groups of a hybrid model share them
        return TierJob(self.tiers.prepare_load(ordered, tokens=positions * self._agreement.block_tokens))

    def prepare_store(self, keys: Collection[OffloadKey], req_context: ReqContext) -> PrepareStoreOutput:
        ordered = list(keys)
        size = self._agreement.block_tokens
        depths = np.array(
            [(req_context.get_offload_key_position(key) or size) // size - 1 for key in ordered], dtype=np.int64
        )
        prepared = self.tiers.prepare_store(ordered, depths)
        if prepared is None:
            return PrepareStoreOutput(keys_to_store=[], store_spec=LoadStoreSpec(), evicted_keys=[])
        positions, job = prepared
        return PrepareStoreOutput(
            keys_to_store=[ordered[i] for i in positions.tolist()], store_spec=TierJob(job), evicted_keys=[]
        )

    def plan_spills(self) -> list[Job]:
        """In every step: jobs that vLLM does not know, for the workers to carry out behind its back."""
        jobs = []
        while (job := self.tiers.plan_spills()) is not None:
            jobs.append(job)
        self._more_to_spill = bool(jobs) or self.tiers.spilling
        return jobs

    def has_pending_work(self) -> bool:
        # vLLM makes empty steps meanwhile: what the last request left reaches the disk although no other one comes, and jobs that
        # a reset made vLLM forget are seen to end, for blocks must not move before.
        return self._more_to_spill or self.tiers.busy

    def on_new_request(self, req_context: ReqContext) -> RequestOffloadingContext:
        # All blocks of the request, those that were found included: a block that came from a slow tier may now move to a fast one.
        return RequestOffloadingContext(policy=OffloadPolicy.REQUEST_LEVEL)

    def reset_cache(self) -> None:
        self.tiers.drop_all()
        self.tiers.unseal()  # new weights stop the disks in the workers (weights/taps.py), so the namespace still holds

    def seal_disks(self) -> None:
        """After `reset_cache`, when it is not known whether the weights are still those that the disks' namespace
        names: nothing is written to them any more in this run."""
        self.tiers.seal()

    def get_stats(self) -> OffloadingConnectorStats | None:
        """What changed since it was last asked, a few times a second: it is called in every step, and costs as much as
        a look-up."""
        now = time.monotonic()
        if now - self._sent_at < STATISTICS_EVERY_S:
            return None
        self._sent_at = now
        stats = OffloadingConnectorStats()
        for name, value in self.tiers.stats().items():
            published, labels, metric = _METRICS[name]
            if metric.kind == "gauge":
                stats.set_gauge(published, value, labels)
            elif value != self._sent.get(name, 0.0):
                stats.increase_counter(published, value - self._sent.get(name, 0.0), labels)
                self._sent[name] = value
        return stats

    def shutdown(self) -> None:
        if self._lenders is not None:
            self._lenders.close()
        self.tiers.close()

    # ------------------------------------------------------------------ the neighbours

    def on_neighbours(self, message: Neighbours) -> None:
        """Engines came or went: borrows from those that lend, and forgets those that do no more."""
        if self._lenders is not None:
            self._lenders.on_neighbours(message)

    def retry_lenders(self, now: float) -> None:
        """Between two steps: lenders whose tables have come, or are still to be asked for."""
        if self._lenders is not None:
            self._lenders.look(now)

    def _fetch_table(self, lender: str) -> LendingTable:
        request = FetchTable(engine=self._agreement.engine, lender=lender)
        return open_table(fetch_table(self._agreement.broker, request))


class PolderOffloadingSpec(OffloadingSpec):  # type: ignore[misc]
    """vLLM's way to a manager and a worker of ours."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        # What the next turn of a conversation begins with is mostly what was generated in this one.
        self.offload_prompt_only = bool(self.extra_config.get("offload_prompt_only", False))
        if self.blocks_per_chunk != 1:
            raise ConfigError("PolderConnector stores block by block: remove block_size from kv_connector_extra_config")
        self._manager: TierManager | None = None

    @classmethod
    def build_metric_definitions(cls, extra_config: Mapping[str, Any]) -> dict[str, OffloadingMetricMetadata]:
        definitions: dict[str, OffloadingMetricMetadata] = {}
        for name, _, metric in _METRICS.values():
            kind = OffloadingGaugeMetadata if metric.kind == "gauge" else OffloadingCounterMetadata
            definitions[name] = kind(documentation=f"Polder: {metric.help}", labelnames=metric.labels)
        return definitions

    def get_manager(self) -> TierManager:
        if self._manager is None:
            if here.tier_agreement is None:
                raise ConfigError(
                    "PolderConnector needs an engine with tiers: set POLDER_TIERS, and POLDER_BROKER or POLDER_KV_BUDGET"
                )
            self._manager = TierManager(here.tier_agreement)
        return self._manager

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        memory = here.memory
        if memory is None or memory.plan.tiers is None:
            raise ConfigError("PolderConnector needs an engine with tiers: set POLDER_TIERS")
        return open_worker(memory, memory.plan.tiers, kv_caches)


_METRICS = {
    key: (f"vllm:polder_{metric.name.removesuffix('_total')}", values, metric)
    for metric in (*metrics.TIERS, *metrics.DISKS)
    for key, values in metric.series
}
"""Key in `TierSet.stats` -> vLLM's name, label values, declaration. The client library appends "_total" itself. vLLM
forgets the metrics of a former engine in the process by the prefix."""
