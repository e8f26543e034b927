"""Loads begin in the step after a request's arrival, also when the batch is full.

vLLM looks a waiting request up only when its turn in the queue comes and the step has tokens left. A load itself needs
neither, only blocks; while it waits for a turn, a whole step passes that could have carried it. So before each schedule
the requests that arrived since the last one are looked at here, and those with a hit begin to load: the same calls in
the same order as in Scheduler.schedule for an asynchronous load (vllm/v1/core/sched/scheduler.py:954-1341 of 0.32), for
plain requests only.

Guarantees
- A request is tried once, in the order of arrival; one that is not loaded here goes the usual way.
- A load is admitted only where vLLM would: its whole sequence fits beside what requests under way still need, and each
  running request keeps a block to grow into, so nothing is preempted for it.
- No request is overtaken for compute: loads take no tokens of the step.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.sched.interface import PauseState
from vllm.v1.metrics.stats import KV_FETCH_IN_PROGRESS
from vllm.v1.request import RequestStatus

from polder.engines.vllm.core.subsystem import Subsystem
from polder.tiers.counters import TierCounters

__all__ = ["Prefetch"]


class Prefetch(Subsystem):
    """Begins the loads of one scheduler that has a connector."""

    def __init__(self, scheduler: Any, counters: TierCounters) -> None:
        """Counts its loads in `counters.early_loads`."""
        self._scheduler, self._counters = scheduler, counters
        self._arrived: list[Any] = []

    @staticmethod
    def fits(scheduler: Any) -> bool:
        """Whether the scheduler has nothing that vLLM's own path treats apart."""
        return not (
            scheduler.prefix_replay_tokens
            or scheduler.need_mamba_block_aligned_split
            or scheduler.num_lookahead_tokens
            or scheduler.lora_config
            or scheduler.ec_connector is not None
            or scheduler.aux_output_connector is not None
            or getattr(scheduler, "defer_async_loads", False)  # since vLLM 0.33
        )

    def on_arrival(self, request: Any) -> None:
        self._arrived.append(request)

    def before_schedule(self) -> None:
        if not self._arrived or self._scheduler._pause_state != PauseState.UNPAUSED:
            return
        arrived, self._arrived = self._arrived, []
        for request in arrived:
            if request.status != RequestStatus.WAITING or request.num_computed_tokens or request.has_encoder_inputs:
                continue
            if not request.skip_reading_prefix_cache:
                self._begin(request)

    def _begin(self, request: Any) -> None:
        scheduler = self._scheduler
        manager, connector = scheduler.kv_cache_manager, scheduler.connector
        blocks, local, boundary, _ = scheduler._get_local_prefix_cache_hit(request)
        if local % scheduler.block_size:
            return
        found, is_async = connector.get_num_new_matched_tokens(request, local)
        if not found or not is_async:
            return
        request.shared_prefix_boundary = boundary
        reserved = scheduler._inflight_prefill_reserved_blocks() + scheduler._spec_decode_step_blocks
        allocated = manager.allocate_slots(
            request,
            0,
            num_new_computed_tokens=local,
            new_computed_blocks=blocks,
            num_external_computed_tokens=found,
            delay_cache_blocks=True,
            skip_zeroing_group_ids=connector.get_loaded_kv_cache_group_ids(request),
            full_sequence_must_fit=scheduler.scheduler_reserve_full_isl,
            reserved_blocks=reserved + len(scheduler.running),
            has_scheduled_reqs=bool(scheduler.running),
        )
        if allocated is None:
            return
        self._counters.early_loads += 1
        connector.update_state_after_alloc(request, manager.get_blocks(request.request_id), found)
        if scheduler.connector_prefix_cache_stats is not None:
            scheduler.connector_prefix_cache_stats.record(
                num_tokens=request.num_tokens - local,
                num_hits=found,
                preempted=False,
                hits_by_source=connector.get_external_cache_hit_sources(request, found),
            )
        if request.prefill_stats:
            request.prefill_stats.set(
                num_prompt_tokens=request.num_prompt_tokens,
                num_local_cached_tokens=local,
                num_external_cached_tokens=found,
            )
        manager.record_prefix_cache_stats(request, local)
        scheduler.waiting.remove_request(request)
        request.status = RequestStatus.WAITING_FOR_REMOTE_KVS
        request.num_computed_tokens = local + found
        scheduler._inflight_prefills.add(request)
        scheduler._set_kv_fetch_stage(request, KV_FETCH_IN_PROGRESS)
        scheduler._enqueue_waiting_request(request)
