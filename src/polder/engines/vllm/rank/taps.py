"""What takes the place of vLLM's functions that give a worker its memory. hooks.py has the table."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from vllm.config import get_current_vllm_config_or_none

from polder.engines.vllm.rank.memory import allocate_kv_cache
from polder.engines.vllm.settings import settings_of

__all__ = ["allocate_kv_cache", "request_memory"]


def request_memory(
    stock: Callable[..., Any], init_snapshot: Any, cache_config: Any, external_weight_memory: int = 0
) -> int:
    """Bytes of the device that this engine may use. vLLM refuses to start unless its part of the whole device is free;
    beside engines that share the device it gets what is free, for its KV cache is the broker's."""
    vllm_config = get_current_vllm_config_or_none()
    if vllm_config is None or settings_of(vllm_config) is None:
        return int(stock(init_snapshot, cache_config, external_weight_memory))
    alone = copy.copy(init_snapshot)
    alone.free_memory = init_snapshot.total_memory
    return min(int(stock(alone, cache_config, external_weight_memory)), int(init_snapshot.free_memory))
