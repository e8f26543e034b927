"""KV caches that cannot be elastic, refused at the start with what to change."""

from __future__ import annotations

from typing import Any

from polder.errors import ConfigError

__all__ = ["check_kv_cache"]


def check_kv_cache(vllm_config: Any, kv_cache_config: Any) -> None:
    """Raises ConfigError for a KV cache whose unmapped blocks vLLM would touch, or that it does not allocate in one buffer."""
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
