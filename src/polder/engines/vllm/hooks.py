"""Everything that Polder replaces in vLLM: one table, and the only functions that do it.

A tap with a `wrap` is put on a class or a module of vLLM, in every process of an engine, when vLLM loads the plugin. Then
additional-config is not known yet. So each wrapper looks up when it is called whether its engine is elastic, and does what vLLM
does if it is not.
A tap without a `wrap` is put on one object by the module that needs it, when that object is there, with `replace`.

`wrap` is called with what vLLM has there, and returns what takes its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from polder.errors import InternalError

__all__ = ["TAPS", "Tap", "install", "replace", "table"]


@dataclass(frozen=True, kw_only=True)
class Tap:
    module: str
    """vLLM's module."""
    name: str
    """Dotted name in that module, as in compat.SEAMS."""
    process: Literal["core", "worker"]
    asked_by: str
    """Module of polder.engines.vllm that needs it."""
    wrap: str = ""
    """Function of the module `asked_by`. Empty: the tap is put on one object."""
    why: str


_CORE, _SCHEDULER, _CACHE = "vllm.v1.engine.core", "vllm.v1.core.sched.scheduler", "vllm.v1.core.kv_cache_utils"
_WORKER, _IMPL = "vllm.v1.worker.gpu_worker", "vllm.v1.attention.backend"
_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"


def _core(module: str, name: str, asked_by: str, why: str, wrap: str = "") -> Tap:
    return Tap(module=module, name=name, process="core", asked_by=asked_by, wrap=wrap, why=why)


def _rank(module: str, name: str, asked_by: str, why: str, wrap: str = "") -> Tap:
    return Tap(module=module, name=name, process="worker", asked_by=asked_by, wrap=wrap, why=why)


_STALE = "elastic weights: refused, the host copy would keep the old weights; a disk tier takes nothing more"
_ABSENT = "elastic weights: refused, some of the weights may not be in memory"

TAPS: tuple[Tap, ...] = (
    # The start of an engine core.
    _core(
        "vllm.v1.executor.abstract",
        "Executor.__init__",
        "start.taps",
        "a window: graphs are piecewise",
        "init_executor",
    ),
    _core(
        _CORE, "EngineCore._initialize_kv_caches", "start.taps", "notes the core that starts", "initialize_kv_caches"
    ),
    _core(
        *(_CORE, "get_kv_cache_configs", "start.taps"),
        *("the cache's virtual size: whole units up to the ceiling", "get_kv_cache_configs"),
    ),
    _core(
        *(_CORE, "EngineCore._initialize_effective_attention_block_size", "start.taps"),
        "the first call after the scheduler exists: __init__ itself runs before plugins are loaded",
        "scheduler_is_ready",
    ),
    _core(_CACHE, "_gen_lora_extra_hash_keys", "start.taps", "tiers: an adapter loaded again has other hashes"),
    # The core's loop.
    _core(
        *(_CORE, "EngineCoreProc._handle_client_request", "core.taps"),
        *(
            "WAKEUP: grants and recalls, between two steps. ADD: a sleeping model asks for its weights",
            "handle_client_request",
        ),
    ),
    _core(
        *(_CORE, "EngineCoreProc._process_engine_step", "core.taps"),
        *("what is due after each step; the demand", "process_engine_step"),
    ),
    _core(_CORE, "EngineCore.shutdown", "core.taps", "closes the connection to the broker", "shutdown"),
    _core(
        *(_CORE, "EngineCore.reset_prefix_cache", "core.taps"),
        *("tiers forget what the engine's own cache is told to forget", "reset_prefix_cache"),
    ),
    _core(_CORE, "EngineCore.add_lora", "core.taps", "tiers: an adapter loaded again has other hashes", "add_lora"),
    # One scheduler, when it exists.
    _core(_SCHEDULER, "Scheduler.schedule", "core.scheduler_events", "before and after each schedule"),
    _core(_SCHEDULER, "Scheduler.update_from_output", "core.scheduler_events", "before and after each step's output"),
    _core(_SCHEDULER, "Scheduler.add_request", "core.scheduler_events", "tiers: loads begin when a request arrives"),
    _core(_SCHEDULER, "Scheduler._preempt_request", "core.scheduler_events", "counts preemptions"),
    _core(
        *("vllm.v1.core.kv_cache_manager", "KVCacheManager.record_prefix_cache_stats", "core.scheduler_events"),
        "admissions and their prefix hits, for the reuse curve",
    ),
    _core(_SCHEDULER, "Scheduler.set_pause_state", "weights.core", "a model without weights stays paused"),
    _core(_SCHEDULER, "Scheduler.has_requests", "weights.core", "no empty steps while the weights are away"),
    _core(
        *("vllm.v1.core.block_pool", "BlockPool.free_block_queue", "core.blocks"),
        "a window: regular blocks are handed out before windowed ones",
    ),
    _core(
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
        *("OffloadingConnector.connector_scheduler.__class__", "tiers.connector"),
        "tiers: whole prefixes are looked up at once, and blocks that move get new ids",
    ),
    # Workers.
    _rank(_V1, "allocate_kv_cache", "rank.taps", "the KV cache is a span with pages under it", "allocate_kv_cache"),
    _rank(
        *("vllm.v1.worker.gpu.attn_utils", "allocate_kv_cache", "rank.taps"),
        *("the KV cache is a span with pages under it", "allocate_kv_cache"),
    ),
    _rank(
        *(_WORKER, "request_memory", "rank.taps"),
        *("the second engine on a device gets what is free, not an error", "request_memory"),
    ),
    _rank(
        _V1,
        "create_offloader",
        "weights.taps",
        "elastic weights: layers over pages that come and go",
        "create_offloader",
    ),
    _rank(
        _V2,
        "create_offloader",
        "weights.taps",
        "elastic weights: layers over pages that come and go",
        "create_offloader",
    ),
    _rank(
        *("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", "weights.taps"),
        *("calls the offloader's post_init, as the GPU runners do", "load_model"),
    ),
    _rank(_WORKER, "Worker.reload_weights", "weights.taps", _STALE, "update_weights"),
    _rank(_WORKER, "Worker.start_weight_update", "weights.taps", _STALE, "update_weights"),
    _rank(_WORKER, "Worker.update_weights", "weights.taps", _STALE, "update_weights"),
    _rank(_WORKER, "Worker.reset_weights", "weights.taps", _STALE, "update_weights"),
    _rank(_WORKER, "Worker.compute_weight_checksums", "weights.taps", _ABSENT, "read_weights"),
    _rank(_WORKER, "Worker.save_sharded_state", "weights.taps", _ABSENT, "read_weights"),
    _rank(_WORKER, "Worker.save_tensorized_model", "weights.taps", _ABSENT, "read_weights"),
    # A worker's own objects.
    _rank(
        *("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", "weights.cpu_linear"),
        "elastic weights: packed weights are tensors, which can move",
    ),
    _rank("torch.nn.modules.module", "Module.forward", "weights.offloader", "waits for a decoder layer's weights"),
    _rank(_V1, "GPUModelRunner._model_forward", "window.runner", "a window: its pass begins with the forward"),
    _rank(_V2, "GPUModelRunner.prepare_attn", "window.runner", "a window: its pass begins with the forward"),
    _rank(
        *("vllm.v1.worker.gpu.block_table", "BlockTables.append_block_ids", "rank.block_rows"),
        "a window: a copy of the block table on the host",
    ),
    _rank(_V1, "GPUModelRunner.sample_tokens", "window.runner", "a window: the core hears of lost blocks"),
    _rank(_V2, "GPUModelRunner.sample_tokens", "window.runner", "a window: the core hears of lost blocks"),
    _rank(
        _IMPL, "AttentionImpl.forward", "window.worker", "a window: a layer's blocks are fetched before, stored after"
    ),
    _rank(_IMPL, "AttentionImpl.do_kv_cache_update", "window.worker", "a window: a layer's blocks are fetched before"),
    _rank(_IMPL, "AttentionImpl.do_rope_and_kv_cache_update", "window.worker", "as do_kv_cache_update"),
    _rank(_IMPL, "AttentionImpl.do_qk_norm_rope_kvcache_update", "window.worker", "as do_kv_cache_update"),
    _rank(_IMPL, "AttentionImpl.do_qk_norm_mrope_kvcache_update", "window.worker", "as do_kv_cache_update"),
)
"""In the order in which they are put."""


def install() -> None:
    """Puts all taps of classes and modules, in this process."""
    for tap in TAPS:
        if tap.wrap:
            wrap = getattr(import_module(f"polder.engines.vllm.{tap.asked_by}"), tap.wrap)
            *owners, attribute = tap.name.split(".")
            owner: Any = import_module(tap.module)
            for name in owners:
                owner = getattr(owner, name)
            replace(owner, attribute, wrap)
    for utility in import_module("polder.engines.vllm.core.taps").UTILITIES:
        setattr(import_module(_CORE).EngineCore, utility.__name__, utility)


def replace(owner: Any, attribute: str, wrap: Callable[[Any], Any]) -> None:
    """`wrap(stock)` takes the place of an object's attribute `stock`. Raises InternalError for one that is not in the table."""
    if not any(tap.name.split(".")[-1] == attribute for tap in TAPS):
        raise InternalError(f"hooks.TAPS has no {attribute}")
    setattr(owner, attribute, wrap(getattr(owner, attribute)))


def table() -> str:
    """The taps as a Markdown table."""
    rows = ["| replaced | process | on | asked by | why |", "|---|---|---|---|---|"]
    rows += [
        f"| `{tap.name}` | {tap.process} | {'class or module' if tap.wrap else 'one object'} | {tap.asked_by} | {tap.why} |"
        for tap in TAPS
    ]
    return "".join(f"{row}\n" for row in rows)
