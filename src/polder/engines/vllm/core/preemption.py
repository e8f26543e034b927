"""Preemption between two steps: of requests that run, as vLLM's own scheduler does within a step, and of requests that
wait with KV from a tier.

vLLM never preempts the latter. When it begins a load it makes sure that the rest of the request will fit, too; a shrink
can take that room away. Then requests may wait for ever, each for blocks that the others hold.
"""

from __future__ import annotations

import time
from typing import Any

__all__ = ["free_deferred", "last_loaded", "last_running", "preempt", "unload"]


def last_running(scheduler: Any) -> Any:
    """The request that vLLM would preempt next."""
    if scheduler.policy.name == "PRIORITY":
        return max(scheduler.running, key=lambda request: (request.priority, request.arrival_time))
    return scheduler.running[-1]


def preempt(scheduler: Any, request: Any) -> None:
    """Takes a running request's blocks; it goes back to the queue.

    Output of a step still in flight belongs to KV that is gone. It is dropped, or tokens could come twice.
    """
    scheduler.running.remove(request)
    scheduler._preempt_request(request, time.monotonic(), drop_stale_output=True)
    scheduler.prev_step_scheduled_req_ids.discard(request.request_id)


def last_loaded(scheduler: Any) -> Any:
    """The last in the queue that has its KV from a tier and waits for room for the rest. None: no request does."""
    for request in reversed(list(scheduler.kv_holding_waiting)):
        if request.num_computed_tokens and (
            request.status.name in ("WAITING", "PREEMPTED")
            or request.request_id in scheduler.finished_recving_kv_req_ids
        ):
            return request
    return None


def unload(scheduler: Any, request: Any) -> None:
    """Takes the blocks of a request that `last_loaded` has named. It looks for a prefix again when its turn comes."""
    if request.request_id in scheduler.finished_recving_kv_req_ids:
        scheduler._handle_blocked_waiting_request(request)  # its blocks enter the prefix cache
    scheduler.kv_holding_waiting.remove_request(request)
    scheduler.deferred_waiting.discard(request)
    scheduler._inflight_prefills.discard(request)
    scheduler._free_request_blocks(request)
    request.num_computed_tokens = 0
    scheduler.waiting.prepend_request(request)


def free_deferred(scheduler: Any) -> None:
    """As Scheduler._drain_deferred_frees does, when no step is under way."""
    while scheduler.deferred_frees:
        _, blocks = scheduler.deferred_frees.popleft()
        scheduler.kv_cache_manager.block_pool.free_blocks(reversed(blocks))
