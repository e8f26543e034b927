"""Which vLLM this Polder was tested with, and what it relies on in it.

Polder reads and replaces private parts of vLLM. A release that is not in the table is refused: silently wrong KV is worse than no
elasticity. `check_seams` looks at every private name before anything is patched, so a locally modified vLLM is refused too.
"""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from polder.errors import UnsupportedVersion

__all__ = ["TESTED", "check_seams", "check_version", "installed_version"]

TESTED: dict[str, str] = {
    "0.32.0": "V1 model runner on CPU, end to end; V2 runner and CUDA by reading only",
}

# (module, dotted name, parameters that must be there in this order)
SEAMS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("vllm.v1.engine.core", "EngineCore._initialize_effective_attention_block_size", ("self",)),
    ("vllm.v1.engine.core", "EngineCore._initialize_kv_caches", ("self", "vllm_config")),
    ("vllm.v1.engine.core", "EngineCoreProc._handle_client_request", ("self", "request_type", "request")),
    ("vllm.v1.engine.core", "EngineCoreProc._process_engine_step", ("self",)),
    ("vllm.v1.engine.core", "EngineCore.shutdown", ("self",)),
    ("vllm.v1.engine.core", "get_kv_cache_configs", ("vllm_config", "kv_cache_specs", "available_memory")),
    (
        "vllm.v1.worker.gpu_model_runner",
        "allocate_kv_cache",
        ("kv_cache_config", "device", "layout", "kernel_block_sizes"),
    ),
    (
        "vllm.v1.worker.gpu.attn_utils",
        "allocate_kv_cache",
        ("kv_cache_config", "device", "layout", "kernel_block_sizes"),
    ),
    (
        "vllm.v1.kv_cache_interface",
        "create_kv_cache_views",
        ("raw", "spec", "num_blocks", "layout", "kv_cache_tensor", "kernel_block_size"),
    ),
    ("vllm.v1.core.block_pool", "BlockPool._maybe_evict_cached_block", ("self", "block")),
    ("vllm.v1.core.block_pool", "BlockPool.move_block_hashes", ("self", "src_block", "dst_block")),
    ("vllm.v1.core.block_pool", "BlockPool._notify_reuse", ("self", "blocks")),
    ("vllm.v1.core.block_pool", "BlockPool.unpin_blocks", ("self", "blocks", "on_reuse")),
    ("vllm.v1.core.block_pool", "BlockPool.touch", ("self", "blocks")),
    ("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue.append_n", ("self", "blocks")),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler",
        "OffloadingConnectorScheduler._maximal_prefix_lookup",
        ("self", "keys", "req_context", "req", "group_config", "start_chunk_idx"),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
        "OffloadingConnector.get_num_new_matched_tokens",
        ("self", "request", "num_computed_tokens"),
    ),
    (
        "vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker",
        "OffloadingConnectorWorker.get_finished",
        ("self", "finished_req_ids"),
    ),
    ("vllm.v1.kv_offload.base", "OffloadingWorker.submit_load", ("self", "job_id", "src_spec", "dst_spec")),
    ("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue.remove", ("self", "block")),
    ("vllm.v1.core.kv_cache_utils", "FreeKVCacheBlockQueue.prepend_n", ("self", "blocks")),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.record_prefix_cache_stats", ("self", "request", "num_hits")),
    ("vllm.v1.core.sched.scheduler", "Scheduler.schedule", ("self", "throttle_prefills")),
    (
        "vllm.v1.core.sched.scheduler",
        "Scheduler.update_from_output",
        ("self", "scheduler_output", "model_runner_output"),
    ),
    ("vllm.v1.core.sched.scheduler", "Scheduler.add_request", ("self", "request")),
    ("vllm.v1.core.sched.scheduler", "Scheduler.set_pause_state", ("self", "pause_state")),
    ("vllm.v1.core.sched.scheduler", "Scheduler.has_requests", ("self",)),
    ("vllm.v1.worker.gpu_worker", "Worker.reload_weights", ("self", "args", "kwargs")),
    ("vllm.v1.worker.gpu_worker", "Worker.start_weight_update", ("self",)),
    ("vllm.v1.worker.gpu_worker", "Worker.update_weights", ("self", "update_info")),
    ("vllm.v1.worker.gpu_model_runner", "create_offloader", ("offload_config",)),
    ("vllm.v1.worker.gpu.model_runner", "create_offloader", ("offload_config",)),
    ("vllm.model_executor.layers.utils", "dispatch_cpu_unquantized_gemm", ("layer", "remove_weight")),
    ("vllm.v1.core.sched.scheduler", "Scheduler._get_local_prefix_cache_hit", ("self", "request")),
    ("vllm.v1.core.sched.scheduler", "Scheduler._inflight_prefill_reserved_blocks", ("self",)),
    ("vllm.v1.core.sched.scheduler", "Scheduler._set_kv_fetch_stage", ("self", "request", "stage")),
    ("vllm.v1.core.sched.scheduler", "Scheduler._enqueue_waiting_request", ("self", "request")),
    (
        "vllm.v1.core.sched.scheduler",
        "Scheduler._preempt_request",
        ("self", "request", "timestamp", "drop_stale_output"),
    ),
    # Of the window; all of these modules are imported by those above.
    ("vllm.v1.core.sched.scheduler", "Scheduler._free_request_blocks", ("self", "request")),
    ("vllm.v1.core.sched.scheduler", "Scheduler._update_waiting_for_remote_kv", ("self", "request")),
    ("vllm.v1.core.sched.scheduler", "Scheduler.finish_requests", ("self", "request_ids", "finished_status")),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.evict_blocks", ("self", "block_ids")),
    ("vllm.v1.core.kv_cache_manager", "KVCacheManager.get_block_ids", ("self", "request_id")),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._model_forward",
        ("self", "input_ids", "positions", "intermediate_tensors", "inputs_embeds", "model_kwargs"),
    ),
    ("vllm.v1.worker.gpu_model_runner", "GPUModelRunner.sample_tokens", ("self", "grammar_output")),
    (
        "vllm.v1.worker.gpu_model_runner",
        "GPUModelRunner._dummy_run",
        (
            *("self", "num_tokens", "cudagraph_runtime_mode", "force_attention", "uniform_decode"),
            *("allow_microbatching", "skip_eplb", "is_profile", "create_mixed_batch", "remove_lora"),
            *("is_graph_capturing", "num_active_loras", "profile_seq_lens", "randomize_inputs"),
        ),
    ),
    ("vllm.v1.worker.gpu_worker", "Worker.update_max_model_len", ("self", "max_model_len")),
    # The ops that call `do_kv_cache_update` and `forward` of a layer's attention.
    ("vllm.model_executor.layers.attention.attention", "unified_kv_cache_update", ("key", "value", "layer_name")),
    (
        "vllm.model_executor.layers.attention.attention",
        "unified_attention_with_output",
        (
            *("query", "key", "value", "output", "layer_name"),
            *("output_scale", "output_block_scale", "kv_cache_dummy_dep"),
        ),
    ),
    (
        "vllm.v1.attention.backend",
        "AttentionImpl.forward",
        (
            *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
            *("output_scale", "output_block_scale"),
        ),
    ),
)


def installed_version() -> str:
    """The installed vLLM's version without its local part: "0.32.0+cpu" -> "0.32.0"."""
    import vllm

    return str(vllm.__version__).split("+")[0]


def check_version(version: str) -> None:
    """Raises UnsupportedVersion for a vLLM that is not in the table."""
    if version not in TESTED:
        raise UnsupportedVersion(
            f"vLLM {version} is installed; this Polder was tested with {', '.join(TESTED)} only and will not patch another. "
            f"Install one of these, or unset POLDER_BROKER and POLDER_KV_BUDGET to serve without Polder"
        )


def check_seams() -> None:
    """Raises UnsupportedVersion when a part of vLLM that Polder touches is missing or takes other parameters."""
    for module, dotted, parameters in SEAMS:
        found: Any = import_module(module)
        for name in dotted.split("."):
            found = getattr(found, name, None)
        signature = tuple(inspect.signature(found).parameters) if callable(found) else None
        if signature != parameters:
            raise UnsupportedVersion(
                f"{module}.{dotted} is {signature or 'missing'} where {parameters} is expected: this vLLM differs from the "
                f"release {', '.join(TESTED)} that Polder was tested with"
            )
