"""Which vLLM this Polder was tested with, and what it relies on in it.

Polder reads and replaces private parts of vLLM. A release that is not in the table is refused: silently wrong KV is
worse than no elasticity. `check_seams` looks at every private name before anything is patched, so a locally modified
vLLM is refused too.

A new release: `scripts/compare-vllm` says which of these names changed in it. What differs goes into CHANGES with the
reason why Polder may go on using it; then the release may be added to TESTED, with what ran.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from polder.errors import UnsupportedVersion

__all__ = [
    "CHANGES",
    "SEAMS",
    "TESTED",
    "Change",
    "Seam",
    "check_seams",
    "check_version",
    "installed_version",
    "seams_of",
]

TESTED: dict[str, str] = {
    "0.32.0": "V1 model runner on a CPU, end to end; V2 runner with the GPU's defaults on a CPU (tests/rig); the CUDA backend "
    "over a fake driver",
    "0.33.0": "its Python over the CPU libraries of 0.32.0 (scripts/vllm-mixed), V1 model runner: resizing, sharing, tiers, "
    "weights; V2 runner, window and CUDA by reading only",
}
"""Release -> what ran on it. From the oldest to the newest."""

Seam = tuple[str, str, tuple[str, ...]]
"""Module, dotted name in it, parameters that must be there in this order."""

_NAMES = """
vllm.v1.engine.core
    EngineCore._initialize_effective_attention_block_size(self)
    EngineCore._initialize_kv_caches(self, vllm_config)
    EngineCoreProc._handle_client_request(self, request_type, request)
    EngineCoreProc._process_engine_step(self)
    EngineCore.shutdown(self)
    EngineCore.add_lora(self, lora_request)
    EngineCore.reset_prefix_cache(self, reset_running_requests, reset_connector)
    get_kv_cache_configs(vllm_config, kv_cache_specs, available_memory)
vllm.v1.executor.uniproc_executor
    get_file_store_init_method()
vllm.v1.executor.multiproc_executor
    get_file_store_init_method()
vllm.v1.core.kv_cache_utils
    _gen_lora_extra_hash_keys(request)
    FreeKVCacheBlockQueue.append_n(self, blocks)
    FreeKVCacheBlockQueue.remove(self, block)
    FreeKVCacheBlockQueue.prepend_n(self, blocks)
vllm.v1.core.sched.scheduler
    Scheduler.reset_connector_cache(self)
    Scheduler.schedule(self, throttle_prefills)
    Scheduler.update_from_output(self, scheduler_output, model_runner_output)
    Scheduler.add_request(self, request)
    Scheduler.set_pause_state(self, pause_state)
    Scheduler.has_requests(self)
    Scheduler._get_local_prefix_cache_hit(self, request)
    Scheduler._inflight_prefill_reserved_blocks(self)
    Scheduler._set_kv_fetch_stage(self, request, stage)
    Scheduler._enqueue_waiting_request(self, request)
    Scheduler._preempt_request(self, request, timestamp, drop_stale_output)
    Scheduler._drain_deferred_frees(self)
    Scheduler._free_request_blocks(self, request)
    Scheduler._handle_blocked_waiting_request(self, request)
    Scheduler._update_waiting_for_remote_kv(self, request)
    Scheduler.finish_requests(self, request_ids, finished_status)
vllm.v1.worker.gpu_model_runner
    allocate_kv_cache(kv_cache_config, device, layout, kernel_block_sizes)
    create_offloader(offload_config)
    GPUModelRunner._model_forward(self, input_ids, positions, intermediate_tensors, inputs_embeds, model_kwargs)
    GPUModelRunner.sample_tokens(self, grammar_output)
    GPUModelRunner._dummy_run(self, num_tokens, cudagraph_runtime_mode, force_attention, uniform_decode,
        allow_microbatching, skip_eplb, is_profile, create_mixed_batch, remove_lora, is_graph_capturing,
        num_active_loras, profile_seq_lens, randomize_inputs)
vllm.v1.worker.gpu.attn_utils
    allocate_kv_cache(kv_cache_config, device, layout, kernel_block_sizes)
vllm.v1.kv_cache_interface
    create_kv_cache_views(raw, spec, num_blocks, layout, kv_cache_tensor, kernel_block_size)
vllm.v1.core.block_pool
    BlockPool._maybe_evict_cached_block(self, block)
    BlockPool.move_block_hashes(self, src_block, dst_block)
    BlockPool._notify_reuse(self, blocks)
    BlockPool.unpin_blocks(self, blocks, on_reuse)
    BlockPool.touch(self, blocks)
    BlockPool.get_new_blocks(self, num_blocks)
    BlockPool.free_blocks(self, ordered_blocks)
vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler
    OffloadingConnectorScheduler._maximal_prefix_lookup(self, keys, req_context, req, group_config, start_chunk_idx)
    RequestOffloadState.update_block_id_groups(self, new_block_id_groups)
vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector
    OffloadingConnector.get_num_new_matched_tokens(self, request, num_computed_tokens)
vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker
    OffloadingConnectorWorker.get_finished(self, finished_req_ids)
vllm.v1.kv_offload.base
    OffloadingWorker.submit_load(self, job_id, src_spec, dst_spec)
vllm.v1.core.kv_cache_manager
    KVCacheManager.record_prefix_cache_stats(self, request, num_hits)
    KVCacheManager.evict_blocks(self, block_ids)
    KVCacheManager.get_block_ids(self, request_id)
vllm.v1.worker.gpu_worker
    request_memory(init_snapshot, cache_config, external_weight_memory)
    Worker.reload_weights(self, args, kwargs)
    Worker.start_weight_update(self)
    Worker.update_weights(self, update_info)
    Worker.reset_weights(self)
    Worker.compute_weight_checksums(self)
    Worker.save_sharded_state(self, path, pattern, max_size)
    Worker.save_tensorized_model(self, tensorizer_config)
    Worker.update_max_model_len(self, max_model_len)
vllm.v1.worker.cpu_model_runner
    CPUModelRunner.load_model(self, load_dummy_weights)
vllm.v1.worker.gpu.model_runner
    create_offloader(offload_config)
    GPUModelRunner.prepare_attn(self, input_batch)
    GPUModelRunner.sample_tokens(self, grammar_output)
    GPUModelRunner._dummy_run(self, num_tokens, args, skip_attn, uniform_decode, context_len, skip_eplb, is_profile,
        valid_dummy_state_slots, randomize_inputs, kwargs)
vllm.model_executor.layers.utils
    dispatch_cpu_unquantized_gemm(layer, remove_weight)
vllm.v1.worker.gpu.block_table
    BlockTables.append_block_ids(self, req_index, new_block_ids, overwrite)
vllm.v1.worker.gpu.buffer_utils
    StagedWriteTensor.apply_write(self)
vllm.v1.executor.abstract
    Executor.__init__(self, vllm_config)
vllm.model_executor.layers.attention.attention
    unified_kv_cache_update(key, value, layer_name)
    unified_attention_with_output(query, key, value, output, layer_name, output_scale, output_block_scale,
        kv_cache_dummy_dep)
vllm._custom_ops
    cpu_attn_get_scheduler_metadata(num_reqs, num_heads, num_kv_heads, head_dim, seq_lens, dtype, query_start_loc, causal,
        sliding_window_size, isa, enable_kv_split, dynamic_causal, kv_cache_dtype)
vllm.v1.attention.backends.cpu_attn
    CPUAttentionBackend.get_supported_kernel_block_sizes(kv_cache_spec)
vllm.v1.attention.backend
    AttentionImpl.forward(self, layer, query, key, value, kv_cache, attn_metadata, output, output_scale,
        output_block_scale)
"""
"""Modules of vLLM, and below each the functions that Polder calls, replaces or relies on, with their parameters in
order."""


def _seams(text: str) -> Iterator[Seam]:
    module = ""
    for found in re.finditer(r"^(\S+)$|^    ([\w.]+)\(([^)]*)\)$", text, re.MULTILINE):
        module = found[1] or module
        if found[2]:
            yield module, found[2], tuple(re.findall(r"\w+", found[3]))


SEAMS: tuple[Seam, ...] = tuple(_seams(_NAMES))


@dataclass(frozen=True, kw_only=True)
class Change:
    """A seam that a release changed."""

    since: str
    """The first release that has it so."""
    name: str
    """As in SEAMS."""
    parameters: tuple[str, ...]
    reason: str
    """What Polder does about it."""


CHANGES: tuple[Change, ...] = (
    Change(
        since="0.33.0",
        name="get_kv_cache_configs",
        parameters=("vllm_config", "kv_cache_specs", "available_memory", "global_kv_cache_groups"),
        reason="the groups do not depend on the memory: start/taps.py passes them on",
    ),
    Change(
        since="0.33.0",
        name="OffloadingWorker.submit_load",
        parameters=("self", "job_id", "src_spec", "dst_spec", "expedited"),
        reason="set only with sync_load_budget_bytes, which tiers/agreement.py refuses",
    ),
    Change(
        since="0.33.0",
        name="Scheduler._get_local_prefix_cache_hit",
        parameters=("self", "request", "max_cache_hit_length"),
        reason="given only with an auxiliary output connector, and prefetch.py leaves such engines alone",
    ),
)
"""Differences from SEAMS, from the oldest release to the newest; a later one of the same name wins."""


def seams_of(version: str) -> tuple[Seam, ...]:
    """The seams as a tested release has them. A release that is not in TESTED is taken for the newest that is."""
    releases = list(TESTED)
    known = releases[: releases.index(version) + 1] if version in TESTED else releases
    changed = {change.name: change.parameters for change in CHANGES if change.since in known}
    return tuple((module, name, changed.get(name, parameters)) for module, name, parameters in SEAMS)


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
    version = installed_version()
    for module, dotted, parameters in seams_of(version):
        found: Any = import_module(module)
        for name in dotted.split("."):
            found = getattr(found, name, None)
        signature = tuple(inspect.signature(found).parameters) if callable(found) else None
        if signature != parameters:
            raise UnsupportedVersion(
                f"{module}.{dotted} is {signature or 'missing'} where {parameters} is expected: this vLLM differs from the "
                f"release {version} that Polder was tested with"
            )
