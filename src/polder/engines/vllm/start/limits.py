"""What cannot be elastic, refused at the start with what to change. docs/failures.md lists it."""

from __future__ import annotations

from typing import Any

from polder.engines.vllm.settings import EngineSettings
from polder.engines.vllm.sparse.limits import check_sparse
from polder.engines.vllm.tiers.agreement import CONNECTOR
from polder.engines.vllm.window.limits import check_window
from polder.errors import ConfigError

__all__ = ["check_kv_cache", "check_supported"]


def check_supported(vllm_config: Any, settings: EngineSettings) -> None:
    """Raises ConfigError for options of vLLM's that elastic KV does not work with yet."""
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector != CONNECTOR:
        raise ConfigError(
            f"elastic KV does not work together with {transfer.kv_connector} yet: remove --kv-transfer-config"
        )
    if bool(settings.tiers) != (transfer is not None):
        flag = f'--kv-transfer-config \'{{"kv_connector":"{CONNECTOR}","kv_role":"kv_both"}}\''
        raise ConfigError(f"an engine with POLDER_TIERS needs {flag}, and one without must not have it")
    if settings.window_bytes:
        check_window(vllm_config, settings)
    if settings.sparse_bytes:
        check_sparse(vllm_config, settings)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ConfigError("elastic KV does not work with pipeline parallelism yet")
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise ConfigError("elastic KV does not work with --data-parallel-size above 1 yet: run one server per replica")
    if vllm_config.model_config.enable_sleep_mode:
        raise ConfigError("elastic KV replaces --enable-sleep-mode for the KV cache: remove that option")


def check_kv_cache(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises ConfigError for a KV cache whose unmapped blocks vLLM would touch, or that it does not allocate in one
    buffer."""
    from vllm.v1.kv_cache_interface import iter_layer_specs

    for group in kv_cache_config.kv_cache_groups:
        for spec in iter_layer_specs(group.kv_cache_spec):
            if not spec.has_layer_views:
                raise ConfigError(
                    f"this model's KV layout ({type(spec).__name__}) has no view for each layer, and elastic KV does not know "
                    f"which bytes its blocks have: serve it without Polder"
                )
    if vllm_config.attention_config.hisparse_config is not None:
        raise ConfigError(
            "a KV cache that vLLM keeps in part in host memory (HiSparse) is not allocated as one buffer: serve it without "
            "Polder, or without that option"
        )
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.enable_adaptive_verification:
        raise ConfigError(
            "adaptive verification measures steps over block ids that it makes up, and elastic KV has most of them not mapped: "
            "set enable_adaptive_verification to false in --speculative-config"
        )
