"""What sparse reading does not work with, refused at the start with what to change."""

from __future__ import annotations

from typing import Any

from polder.engines.vllm.settings import EngineSettings
from polder.errors import ConfigError

__all__ = ["allow_small_blocks", "check_sparse", "layers_of"]


def check_sparse(vllm_config: Any, settings: EngineSettings) -> None:
    """Raises ConfigError."""
    others = {
        "POLDER_TIERS": settings.tiers,
        "POLDER_WINDOW": settings.window_bytes,
        "POLDER_LEND": settings.lend_bytes,
    }
    for name, given in others.items():
        if given:
            raise ConfigError(f"POLDER_SPARSE does not work together with {name} yet: remove one of them")
    if vllm_config.speculative_config is not None:
        raise ConfigError("POLDER_SPARSE does not work with speculative decoding yet: remove --speculative-config")
    if vllm_config.device_config.device_type != "cpu" or vllm_config.use_v2_model_runner:
        raise ConfigError("POLDER_SPARSE works on CPUs with the V1 model runner only so far: remove it")
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigError("POLDER_SPARSE does not work with context parallelism: remove that option")


def layers_of(worker: Any) -> dict[str, Any]:
    """The attention layers by name. Raises ConfigError when one of them is not plain full attention."""
    groups = worker.model_runner.kv_cache_config.kv_cache_groups
    every = worker.vllm_config.compilation_config.static_forward_context
    if len(groups) != 1:
        raise ConfigError("POLDER_SPARSE works with models of one kind of attention only: remove it for this model")
    layers = {name: every[name] for name in groups[0].layer_names}
    for name, layer in layers.items():
        impl = layer.impl
        plain = (
            getattr(impl, "sliding_window", -1) in (None, -1)
            and getattr(impl, "alibi_slopes", None) is None
            and getattr(impl, "sinks", None) is None
            and not getattr(impl, "logits_soft_cap", 0)
            and not getattr(layer, "kv_sharing_target_layer_name", None)
            and hasattr(impl, "do_kv_cache_update")
            and layer.kv_cache.shape[2] == groups[0].kv_cache_spec.block_size
        )
        if not plain:
            raise ConfigError(
                f"POLDER_SPARSE works with plain full attention, which {name} is not: remove it for this model"
            )
    return layers


def allow_small_blocks() -> None:
    """The CPU's kernels take blocks of 16 tokens, though vLLM says 32: units of 16 are selected more exactly."""
    from vllm.v1.attention.backend import MultipleOf
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from polder.engines.vllm import hooks

    def sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(16)]

    hooks.put(CPUAttentionBackend, "get_supported_kernel_block_sizes", staticmethod(sizes))
