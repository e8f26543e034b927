"""PolderConnector: vLLM's OffloadingConnector with Polder's tiers behind it, and with the defects of 0.32 worked round.

| defect of vLLM 0.32                                | work-around here                                                     |
|----------------------------------------------------|----------------------------------------------------------------------|
| a failed load is an assertion: the engine ends     | jobs always end well for vLLM; failed loads go by `failed_recving`   |
| a failed request looks the same blocks up for ever | what failed is dropped from the index; the request loads no more     |
| kv_load_failure_policy is "fail" by default        | set to "recompute" before the scheduler reads it                     |
| metrics of a class given by module path fail       | class and spec are registered by name, by the plugin, everywhere     |
| a prefix is looked up key by key, in every step    | one batch look-up, in `TierScheduler`                                |
| generated tokens are not kept                      | `offload_prompt_only` is false by default                            |
| the scheduler half keeps block ids of its own      | `renumber_blocks` corrects them when blocks move (holders.py)        |
| a request that is preempted between two steps and  | it is not told as preempted any more; stores that it still has are   |
|  loads in the next is an assertion                 | flushed                                                              |

tests/engines/test_tier_defects.py shows the stock behaviour beside ours, for the first four and the last. 0.33 has
mended the last only.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorRole, KVConnectorTransferResults
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector

from polder.engines.vllm import hooks
from polder.engines.vllm.core.holders import NewIds
from polder.engines.vllm.tiers.agreement import SPEC
from polder.engines.vllm.tiers.manager import TierManager
from polder.engines.vllm.tiers.worker import PolderWorker
from polder.errors import IntegrityError
from polder.tiers.index import PENDING
from polder.tiers.jobs import Job, JobResult

__all__ = ["PolderConnector", "complete_config"]


@dataclass
class TierWorkerMetadata(OffloadingWorkerMetadata):  # type: ignore[misc]
    """What the workers report up, with the outcome of each job."""

    reports: list[JobResult] = field(default_factory=list)

    def aggregate(self, other: Any) -> TierWorkerMetadata:
        merged = super().aggregate(other)
        return TierWorkerMetadata(
            completed_jobs=merged.completed_jobs,
            transfer_stats=merged.transfer_stats,
            reports=[*self.reports, *getattr(other, "reports", ())],
        )


@dataclass
class TierMetadata(OffloadingConnectorMetadata):  # type: ignore[misc]
    """What the scheduler sends down, with the disk's own jobs."""

    own_jobs: list[Job] = field(default_factory=list)


class TierScheduler(OffloadingConnectorScheduler):  # type: ignore[misc]
    """The stock scheduler half with look-ups in one batch."""

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        # Polder preempts between two steps (core/blocks.py, window/core.py), so the next one may load what was preempted.
        preempted = scheduler_output.preempted_req_ids or set()
        again = {name for name in preempted if self._loads_of(name)}
        for name in again:
            loads = self._loads_of(name)
            self._current_batch_jobs_to_flush.update(self._req_status[name].transfer_jobs - loads)
        scheduler_output.preempted_req_ids = preempted - again
        try:
            meta = super().build_connector_meta(scheduler_output)
        finally:
            scheduler_output.preempted_req_ids = preempted
        own_jobs = self.manager.plan_spills()
        self.manager.tiers.refresh()
        return TierMetadata(meta.load_jobs, meta.store_jobs, meta.jobs_to_flush, own_jobs)

    def renumber_blocks(self, new: NewIds) -> None:
        """Corrects the ids that blocks not stored yet will be stored from. 0 is vLLM's own mark for a block that is not
        there any more: it is not stored. All other ids that this half keeps belong to jobs under way.

        Raises IntegrityError when a job under way reads or writes a block that moves: its worker has the old id.
        """
        changed = set(np.flatnonzero(new != np.arange(len(new))).tolist())
        if not changed.isdisjoint(self.blocks_in_transfer()):
            raise IntegrityError("blocks move while the tiers copy them")
        for status in self._req_status.values():
            for group in status.group_states:
                if not changed.isdisjoint(group.block_ids):
                    group.block_ids[:] = new[group.block_ids].tolist()

    def blocks_in_transfer(self) -> set[int]:
        """Blocks that stores under way read. Those that loads write belong to a request that waits, and are in use."""
        jobs = self._jobs.values()
        lists = [ids for job in jobs for ids in (job.deferred_fence_block_ids, job.fenced_block_ids) if ids]
        return {block for ids in lists for block in ids}

    def _loads_of(self, request_id: str) -> set[int]:
        status = self._req_status.get(request_id)
        return {job for job in status.transfer_jobs if not self._jobs[job].is_store} if status is not None else set()

    def _maximal_prefix_lookup(
        self, keys: Iterable[Any], req_context: Any, req: Any, group_config: Any, start_chunk_idx: int
    ) -> int | None:
        manager: TierManager = self.manager
        wanted = list(keys)
        if manager.tiers.held:
            return None
        tiers = manager.tiers.loadable_or_pending(wanted)
        for at in range(len(tiers)) if self._events_tracker.self_describing_enabled else ():
            self._events_tracker.record_lookup(req, group_config, start_chunk_idx + at, wanted[at])
        return None if (tiers == PENDING).any() else len(tiers)


class PolderConnector(OffloadingConnector):  # type: ignore[misc]
    """Registered by the plugin as "PolderConnector". Loads are asynchronous only."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        complete_config(vllm_config)
        super().__init__(vllm_config, role, kv_cache_config)
        self._asked: set[str] = set()
        self._refused: set[str] = set()
        if self.connector_scheduler is not None:
            hooks.put(self.connector_scheduler, "__class__", TierScheduler)

    @property
    def manager(self) -> TierManager:
        manager: TierManager = self.scheduler.manager
        return manager

    # ------------------------------------------------------------------ scheduler's half

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        found, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        state = self.scheduler._req_status[request.request_id]
        if found is None:
            return None, False
        self._note_asked(request.request_id, state, num_computed_tokens)
        group = self.scheduler.config.kv_group_configs[self.scheduler._lookup_groups[0]]
        if not found or group.sliding_window_size_in_chunks is not None:
            return found, is_async
        size = group.tokens_per_chunk
        first, last = num_computed_tokens // size, (num_computed_tokens + found) // size
        keys = state.group_states[self.scheduler._lookup_groups[0]].offload_keys[first:last]
        tiers = self.manager.tiers.find(keys)
        cut = self.manager.tiers.plan_load(tiers)
        if cut.blocks == len(keys):
            return found, is_async
        if request.request_id not in self._refused:
            self._refused.add(request.request_id)
            self.manager.tiers.refused(len(keys) - cut.blocks)
        if not cut.blocks:
            state.update_num_hit_chunks(num_computed_tokens)
            return 0, False
        most, state.max_load_tokens = state.max_load_tokens, cut.blocks * size
        found, is_async = super().get_num_new_matched_tokens(request, num_computed_tokens)
        state.max_load_tokens = most
        return found, is_async

    def renumber_blocks(self, new: NewIds) -> None:
        self.scheduler.renumber_blocks(new)

    def blocks_in_transfer(self) -> set[int]:
        found: set[int] = self.scheduler.blocks_in_transfer()
        return found

    def _note_asked(self, request_id: str, state: Any, num_computed_tokens: int) -> None:
        """The first time that a request is looked up: what its engine's own cache has not."""
        if request_id in self._asked:
            return
        self._asked.add(request_id)
        tokens = 0
        for config, group in zip(self.scheduler.config.kv_group_configs, state.group_states, strict=True):
            keys = group.offload_keys[num_computed_tokens // config.tokens_per_chunk :]
            more = max(0, len(keys) * config.tokens_per_chunk - tokens)
            tokens += more
            if keys:
                self.manager.tiers.asked(keys, tokens=more)

    def update_connector_output(self, connector_output: Any) -> None:
        for finished in getattr(connector_output.kv_connector_worker_meta, "reports", ()):
            self.manager.tiers.report(finished)
        self.manager.tiers.refresh()
        for request_id in connector_output.failed_recving or ():
            state = self.scheduler._req_status.get(request_id)
            if state is not None:
                state.max_load_tokens = 0  # it computes now, whatever is found: no request may load and fail for ever
        super().update_connector_output(connector_output)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        self._forget(request.request_id)
        return super().request_finished(request, block_ids)  # type: ignore[no-any-return]

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        self._forget(request.request_id)
        return super().request_finished_all_groups(request, block_ids)  # type: ignore[no-any-return]

    def _forget(self, request_id: str) -> None:
        self._asked.discard(request_id)
        self._refused.discard(request_id)

    # ------------------------------------------------------------------ worker's half

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        super().start_load_kv(forward_context, **kwargs)
        assert self.connector_worker is not None
        worker: PolderWorker = self.connector_worker.worker
        worker.submit_own(self._connector_metadata.own_jobs)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        assert self.connector_worker is not None
        requests = dict(self.connector_worker._load_jobs)
        sent, received = self.get_finished(finished_req_ids)
        worker: PolderWorker = self.connector_worker.worker
        failed = {requests[job] for job in worker.failed_loads if job in requests}
        worker.failed_loads.clear()
        return KVConnectorTransferResults(set(sent or ()), set(received or ()), failed)

    def build_connector_worker_meta(self) -> OffloadingWorkerMetadata | None:
        if self.connector_worker is None:
            return None
        meta = self.connector_worker.build_connector_worker_meta()
        reports = self.connector_worker.worker.take_reports()
        if meta is None and not reports:
            return None
        meta = meta or OffloadingWorkerMetadata()
        return TierWorkerMetadata(
            completed_jobs=meta.completed_jobs, transfer_stats=meta.transfer_stats, reports=reports
        )

    # ------------------------------------------------------------------ metrics, in the API server

    @classmethod
    def build_prom_metrics(cls, vllm_config: Any, *args: Any) -> Any:
        complete_config(vllm_config)
        return super().build_prom_metrics(vllm_config, *args)


def complete_config(vllm_config: Any) -> None:
    """Fills in what a user need not write: our spec, and that failed loads are recomputed."""
    transfer = vllm_config.kv_transfer_config
    transfer.kv_load_failure_policy = "recompute"
    transfer.kv_connector_extra_config.setdefault("spec_name", SPEC)
