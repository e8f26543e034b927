"""What takes the place of calls of vLLM's engine core when it starts. hooks.py has the table."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vllm.v1.core.kv_cache_utils as kv_cache_utils
from vllm.v1.engine import EngineCoreRequestType

from polder.broker.client import request
from polder.broker.wire import Stock
from polder.engines.vllm import hooks
from polder.engines.vllm.compat import check_seams, check_version, installed_version
from polder.engines.vllm.core.elastic import ElasticCore
from polder.engines.vllm.process import here
from polder.engines.vllm.settings import EngineSettings, settings_of
from polder.engines.vllm.start.negotiate import negotiate
from polder.engines.vllm.tiers.adapters import AdapterEpochs
from polder.engines.vllm.window.limits import limit_graphs
from polder.errors import ConfigError

__all__ = [
    "get_kv_cache_configs",
    "init_executor",
    "initialize_kv_caches",
    "refuse_unsupported",
    "rendezvous",
    "scheduler_is_ready",
]

logger = logging.getLogger("polder.engine")


def init_executor(stock: Callable[..., None], executor: Any, vllm_config: Any) -> None:
    settings = settings_of(vllm_config)
    if settings is not None and settings.window_bytes:
        limit_graphs(vllm_config)
    stock(executor, vllm_config)


def rendezvous(stock: Callable[[], str]) -> str:
    """The address of the file in which the ranks of an engine find each other: in the folder of vLLM's own sockets,
    if one is set."""
    folder = os.environ.get("VLLM_RPC_BASE_PATH")
    return f"file://{folder}/{Path(stock()).name}" if folder else stock()


def initialize_kv_caches(stock: Callable[..., Any], core: Any, vllm_config: Any) -> Any:
    here.starting = core
    try:
        return stock(core, vllm_config)
    finally:
        here.starting = None


def refuse_unsupported(stock: Callable[..., Any], core: Any, vllm_config: Any) -> Any:
    """In place of all other taps, where this vLLM was never tested."""
    if settings_of(vllm_config) is not None:
        check_version(installed_version())
        check_seams()
    return stock(core, vllm_config)


def get_kv_cache_configs(
    stock: Callable[..., Any], vllm_config: Any, kv_cache_specs: Any, available_memory: Any, *groups: Any
) -> Any:
    """`groups`: since vLLM 0.33 those of all ranks together; they are the same for any amount of memory."""
    core = here.starting
    settings = settings_of(vllm_config) if core is not None else None
    if settings is None:
        return stock(vllm_config, kv_cache_specs, available_memory, *groups)
    if not any(kv_cache_specs):
        _serve_as_stock(settings)
        return stock(vllm_config, kv_cache_specs, available_memory, *groups)
    if not hasattr(core, "input_queue"):
        raise ConfigError("elastic KV needs the engine core in its own process: unset VLLM_ENABLE_V1_MULTIPROCESSING=0")

    def configs_for(vllm_config: Any, kv_cache_specs: Any, available_memory: Any) -> Any:
        return stock(vllm_config, kv_cache_specs, available_memory, *groups)

    configs, core.polder_agreement = negotiate(core, settings, configs_for, vllm_config, kv_cache_specs)
    return configs


def scheduler_is_ready(stock: Callable[[Any], None], core: Any) -> None:
    stock(core)
    agreement = getattr(core, "polder_agreement", None)
    if agreement is None:
        return
    wakeup = EngineCoreRequestType.WAKEUP, None
    core.polder = ElasticCore(core, agreement, wake=lambda: core.input_queue.put_nowait(wakeup))
    if core.polder.tiers is not None:
        core.polder_adapters = AdapterEpochs()
        hooks.replace(kv_cache_utils, "_gen_lora_extra_hash_keys", core.polder_adapters.hash_keys)


def _serve_as_stock(settings: EngineSettings) -> None:
    """A model without a KV cache, such as BERT, needs nothing from the broker; engines that wait for it there are told.

    Raises ConfigError when more than its KV cache was to be elastic, and BrokerUnavailable.
    """
    wanted = {
        "POLDER_TIERS": settings.tiers,
        "POLDER_WINDOW": settings.window_bytes,
        "POLDER_SPARSE": settings.sparse_bytes,
        "POLDER_WEIGHTS=elastic": settings.weights == "elastic",
    }
    for name, value in wanted.items():
        if value:
            raise ConfigError(f"this model has no KV cache, so {name} does nothing for it: remove it")
    logger.warning("%s: this model has no KV cache: it is served as by stock vLLM", settings.engine)
    if settings.broker is not None:
        request(settings.broker, Stock(engine=settings.engine, reason="this model has no KV cache"))
