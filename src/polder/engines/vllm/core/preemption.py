"""Preemption between two steps, of requests that vLLM's own scheduler would preempt within one."""

from __future__ import annotations

import time
from typing import Any

__all__ = ["free_deferred", "last_running", "preempt"]


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


def free_deferred(scheduler: Any) -> None:
    """As Scheduler._drain_deferred_frees does, when no step is under way."""
    while scheduler.deferred_frees:
        _, blocks = scheduler.deferred_frees.popleft()
        scheduler.kv_cache_manager.block_pool.free_blocks(reversed(blocks))
