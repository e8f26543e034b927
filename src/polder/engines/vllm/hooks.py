"""Everything that Polder replaces in vLLM: one table, and the only functions that replace anything.

A tap with a `function` is put on a class or a module of vLLM, in every process of an engine, when vLLM loads the
plugin. At that time additional-config is not known yet. So each of these functions looks up when it is called whether
its engine is elastic, and does what vLLM does if it is not. A tap without a `function` is put on one object, when that
object exists, by the module that asks for it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

from polder.errors import InternalError

__all__ = ["CORE_TAPS", "TAPS", "WORKER_TAPS", "Tap", "around", "install", "put", "replace", "table"]


class Tap(NamedTuple):
    module: str
    """vLLM's module."""
    name: str
    """Dotted name in that module, as in compat.SEAMS."""
    asked_by: str
    """Module of polder.engines.vllm that needs it."""
    why: str
    function: str = ""
    """Function of the module `asked_by` that takes its place, see `replace`. Empty: the tap is put on one object."""


_CORE, _SCHEDULER = "vllm.v1.engine.core", "vllm.v1.core.sched.scheduler"
_WORKER, _IMPL = "vllm.v1.worker.gpu_worker", "vllm.v1.attention.backend"
_V1, _V2 = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
_EXECUTORS = "vllm.v1.executor.uniproc_executor", "vllm.v1.executor.multiproc_executor"
_OFFLOADING = "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler"

_START = "EngineCore._initialize_effective_attention_block_size"
_STARTED = "the first call after the scheduler exists: __init__ itself runs before plugins are loaded"
_RENDEZVOUS = "its file lies with vLLM's sockets: vLLM leaves it in /tmp"
_SIZE = "the cache's virtual size: whole units up to the ceiling"
_WAKEUP = "WAKEUP: grants and recalls, between two steps. ADD: a sleeping model asks for its weights"
_STEP = "what is due after each step; the demand"
_FORGET = "tiers forget what the engine's own cache is told to forget"
_ADAPTER = "tiers: an adapter loaded again has other hashes"
_HITS = "admissions and their prefix hits, for the reuse curve"
_REGIONS = "a window: regular blocks are handed out before windowed ones"
_LOOKUP = "tiers: whole prefixes are looked up at once, and blocks that move get new ids"
_SPAN = "the KV cache is a span with pages under it"
_FREE = "the second engine on a device gets what is free, not an error"
_LAYERS = "elastic weights: layers over pages that come and go"
_LOADED = "calls the offloader's post_init, as the GPU runners do"
_STALE = "elastic weights: refused, the host copy would keep the old weights; a disk tier takes nothing more"
_ABSENT = "elastic weights: refused, some of the weights may not be in memory"
_PACKED = "elastic weights: packed weights are tensors, which can move"
_PASS = "a window: its pass begins with the forward"
_LOST = "a window: the core hears of lost blocks"
_STORED = "a window: a layer's blocks are fetched before, stored after"
_SELECTED = "sparse reading: a layer's query selects the units that are in its slots"
_SHORTER = "sparse reading: the batch's metadata name what is read of a prefix"
_UNREAD = "sparse reading: the core hears what was not read"
_SMALL = "sparse reading: units of 16 tokens, which the kernels take"
_FETCHED = "a window: a layer's blocks are fetched before"

CORE_TAPS: tuple[Tap, ...] = (
    # The start of an engine core.
    Tap(
        "vllm.v1.executor.abstract",
        "Executor.__init__",
        "start.taps",
        "a window: graphs are piecewise",
        "init_executor",
    ),
    *(Tap(module, "get_file_store_init_method", "start.taps", _RENDEZVOUS, "rendezvous") for module in _EXECUTORS),
    Tap(_CORE, "EngineCore._initialize_kv_caches", "start.taps", "notes the core that starts", "initialize_kv_caches"),
    Tap(_CORE, "get_kv_cache_configs", "start.taps", _SIZE, "get_kv_cache_configs"),
    Tap(_CORE, _START, "start.taps", _STARTED, "scheduler_is_ready"),
    Tap("vllm.v1.core.kv_cache_utils", "_gen_lora_extra_hash_keys", "start.taps", _ADAPTER),
    # The core's loop.
    Tap(_CORE, "EngineCoreProc._handle_client_request", "core.taps", _WAKEUP, "handle_client_request"),
    Tap(_CORE, "EngineCoreProc._process_engine_step", "core.taps", _STEP, "process_engine_step"),
    Tap(_CORE, "EngineCore.shutdown", "core.taps", "closes the connection to the broker", "shutdown"),
    Tap(_CORE, "EngineCore.reset_prefix_cache", "core.taps", _FORGET, "reset_prefix_cache"),
    Tap(_CORE, "EngineCore.add_lora", "core.taps", _ADAPTER, "add_lora"),
    # One scheduler, when it exists.
    Tap(_SCHEDULER, "Scheduler.schedule", "core.scheduler_events", "before and after each schedule"),
    Tap(_SCHEDULER, "Scheduler.update_from_output", "core.scheduler_events", "before and after each step's output"),
    Tap(_SCHEDULER, "Scheduler.add_request", "core.scheduler_events", "tiers: loads begin when a request arrives"),
    Tap(_SCHEDULER, "Scheduler._preempt_request", "core.scheduler_events", "counts preemptions"),
    Tap("vllm.v1.core.kv_cache_manager", "KVCacheManager.record_prefix_cache_stats", "core.scheduler_events", _HITS),
    Tap(_SCHEDULER, "Scheduler.set_pause_state", "weights.core", "a model without weights stays paused"),
    Tap(_SCHEDULER, "Scheduler.has_requests", "weights.core", "no empty steps while the weights are away"),
    Tap("vllm.v1.core.block_pool", "BlockPool.free_block_queue", "core.blocks", _REGIONS),
    Tap(_OFFLOADING, "OffloadingConnectorScheduler.__class__", "tiers.connector", _LOOKUP),
)
WORKER_TAPS: tuple[Tap, ...] = (
    Tap(_V1, "allocate_kv_cache", "rank.taps", _SPAN, "allocate_kv_cache"),
    Tap("vllm.v1.worker.gpu.attn_utils", "allocate_kv_cache", "rank.taps", _SPAN, "allocate_kv_cache"),
    Tap(_WORKER, "request_memory", "rank.taps", _FREE, "request_memory"),
    Tap(_V1, "create_offloader", "weights.taps", _LAYERS, "create_offloader"),
    Tap(_V2, "create_offloader", "weights.taps", _LAYERS, "create_offloader"),
    Tap("vllm.v1.worker.cpu_model_runner", "CPUModelRunner.load_model", "weights.taps", _LOADED, "load_model"),
    Tap(_WORKER, "Worker.reload_weights", "weights.taps", _STALE, "update_weights"),
    Tap(_WORKER, "Worker.start_weight_update", "weights.taps", _STALE, "update_weights"),
    Tap(_WORKER, "Worker.update_weights", "weights.taps", _STALE, "update_weights"),
    Tap(_WORKER, "Worker.reset_weights", "weights.taps", _STALE, "update_weights"),
    Tap(_WORKER, "Worker.compute_weight_checksums", "weights.taps", _ABSENT, "read_weights"),
    Tap(_WORKER, "Worker.save_sharded_state", "weights.taps", _ABSENT, "read_weights"),
    Tap(_WORKER, "Worker.save_tensorized_model", "weights.taps", _ABSENT, "read_weights"),
    # A worker's own objects.
    Tap("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", "weights.cpu_linear", _PACKED),
    Tap("torch.nn.modules.module", "Module.forward", "weights.offloader", "waits for a decoder layer's weights"),
    Tap(_V1, "GPUModelRunner._model_forward", "window.runner", _PASS),
    Tap(_V2, "GPUModelRunner.prepare_attn", "window.runner", _PASS),
    Tap("vllm.v1.worker.gpu.block_table", "BlockTables.append_block_ids", "rank.block_tables", "a window: a host copy"),
    Tap(_V1, "GPUModelRunner.sample_tokens", "window.runner", _LOST),
    Tap(_V2, "GPUModelRunner.sample_tokens", "window.runner", _LOST),
    Tap(_IMPL, "AttentionImpl.forward", "window.worker", _STORED),
    Tap(_V1, "GPUModelRunner._model_forward", "sparse.worker", _SHORTER),
    Tap(_V1, "GPUModelRunner.sample_tokens", "sparse.worker", _UNREAD),
    Tap(_IMPL, "AttentionImpl.forward", "sparse.worker", _SELECTED),
    Tap(
        "vllm.v1.attention.backends.cpu_attn",
        "CPUAttentionBackend.get_supported_kernel_block_sizes",
        "sparse.limits",
        _SMALL,
    ),
    Tap(_IMPL, "AttentionImpl.do_kv_cache_update", "window.worker", _FETCHED),
    Tap(_IMPL, "AttentionImpl.do_rope_and_kv_cache_update", "window.worker", _FETCHED),
    Tap(_IMPL, "AttentionImpl.do_qk_norm_rope_kvcache_update", "window.worker", _FETCHED),
    Tap(_IMPL, "AttentionImpl.do_qk_norm_mrope_kvcache_update", "window.worker", _FETCHED),
)
TAPS = CORE_TAPS + WORKER_TAPS
"""In the order in which they are put."""


def install() -> None:
    """Puts all taps of classes and modules, in this process."""
    for tap in TAPS:
        if tap.function:
            *owners, attribute = tap.name.split(".")
            owner = functools.reduce(getattr, owners, import_module(tap.module))
            instead = getattr(import_module(f"polder.engines.vllm.{tap.asked_by}"), tap.function)
            replace(owner, attribute, instead)
    for utility in import_module("polder.engines.vllm.core.taps").UTILITIES:
        setattr(import_module(_CORE).EngineCore, utility.__name__, utility)


def replace(owner: Any, attribute: str, instead: Callable[..., Any]) -> None:
    """From now on a call of this function of vLLM's calls `instead(stock, *arguments)`. Raises as `put` does."""
    put(owner, attribute, around(getattr(owner, attribute), instead))


def around(stock: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `instead(stock, *arguments)`.

    It has the annotations and the signature of `stock`: vLLM reads some of them, and check_seams reads all.
    """

    @functools.wraps(stock)
    def call(*args: Any, **kwargs: Any) -> Any:
        return instead(stock, *args, **kwargs)

    return call


def put(owner: Any, attribute: str, value: Any) -> None:
    """Sets an attribute of an object of vLLM's. Raises InternalError for one that is not in the table."""
    if isinstance(owner, ModuleType):
        allowed = any((owner.__name__, attribute) == (tap.module, tap.name) for tap in TAPS)
    else:
        classes = owner.__mro__ if isinstance(owner, type) else type(owner).__mro__
        allowed = not {f"{each.__name__}.{attribute}" for each in classes}.isdisjoint(tap.name for tap in TAPS)
    if not allowed:
        raise InternalError(f"hooks.TAPS has no {attribute} of {owner!r}")
    setattr(owner, attribute, value)


def table() -> str:
    """The taps as a Markdown table."""
    rows = ["| replaced | process | on | asked by | why |", "|---|---|---|---|---|"]
    for process, taps in (("core", CORE_TAPS), ("worker", WORKER_TAPS)):
        for tap in taps:
            on = "class or module" if tap.function else "one object"
            rows.append(f"| `{tap.name}` | {process} | {on} | {tap.asked_by} | {tap.why} |")
    return "".join(f"{row}\n" for row in rows)
