"""What a window cannot work with, and what it changes in vLLM's configuration before the workers start.

A window's copies are launched from the methods of each attention layer. A CUDA graph that holds attention would leave
them out when it is replayed: the kernels would read what lay in the layer's slot at that moment. Piecewise graphs hold
what lies between the attention ops, and these run as in eager mode, provided that vLLM splits the model at both of
them: at `unified_attention_with_output` and at `unified_kv_cache_update`, which writes keys and values.
"""

from __future__ import annotations

import logging
from typing import Any

from polder.engines.vllm.settings import EngineSettings
from polder.errors import ConfigError

__all__ = ["check_runner", "check_window", "limit_graphs"]

logger = logging.getLogger("polder.engine")

EXACT_METHODS = ("ngram", "suffix")
"""Ways of speculation without a draft model, whose KV would be written between the window's passes."""


def limit_graphs(vllm_config: Any) -> None:
    """Makes CUDA graphs piecewise, or switches them off where the model is not compiled: such graphs hold the whole
    model.

    To be called before the workers start: they compile by this mode. Raises ConfigError for a model that is compiled
    and not split at the ops that a window needs.
    """
    import vllm.envs as envs
    from vllm.config import CompilationMode, CUDAGraphMode

    compilation = vllm_config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or mode == CUDAGraphMode.NONE:
        return
    breakable = envs.VLLM_USE_BREAKABLE_CUDAGRAPH
    if compilation.mode == CompilationMode.NONE and not breakable:
        logger.warning(
            "window: cudagraph_mode is NONE instead of %s, for graphs of a model that is not compiled would leave the window's "
            "copies out; with vLLM's default compilation mode they would be piecewise",
            mode.name,
        )
        compilation.cudagraph_mode = CUDAGraphMode.NONE
        return
    split = compilation.is_attention_compiled_piecewise() and compilation.splitting_ops_contain_kv_cache_update()
    if breakable or not split:
        raise ConfigError(
            f"a window launches copies around each layer's attention, and with these options CUDA graphs ({mode.name}) "
            f"are not split there. Use vLLM's default compilation mode and splitting_ops, without "
            f"use_inductor_graph_partition, fuse_attn_quant and VLLM_USE_BREAKABLE_CUDAGRAPH, or add --enforce-eager"
        )
    if mode.has_full_cudagraphs():
        logger.warning(
            "window: cudagraph_mode is PIECEWISE instead of %s, for full graphs would leave the window's copies out",
            mode.name,
        )
        compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def check_window(vllm_config: Any, settings: EngineSettings) -> None:
    """Raises ConfigError for what a window does not work with; docs/window.md lists it."""
    parallel, speculation = vllm_config.parallel_config, vllm_config.speculative_config
    if settings.lend_bytes:
        raise ConfigError("an engine with a window borrows and does not lend: remove POLDER_LEND, or POLDER_WINDOW")
    if vllm_config.model_config.runner_type == "pooling":
        raise ConfigError(
            "a window works with models that generate, not with pooling: remove POLDER_WINDOW for this model"
        )
    if speculation is not None:
        # With these runners the host knows only an upper bound of how many tokens are computed.
        estimated = vllm_config.use_v2_model_runner or vllm_config.scheduler_config.async_scheduling
        if estimated or speculation.method not in EXACT_METHODS:
            raise ConfigError(
                "a window does not work with speculative decoding yet: remove --speculative-config, or POLDER_WINDOW"
            )
    if parallel.use_ubatching:
        raise ConfigError(
            "a window needs the layers of a step one after another: remove --enable-dbo and --ubatch-size, or POLDER_WINDOW"
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ConfigError("a window does not work with context parallelism: remove that option, or POLDER_WINDOW")


def check_runner(runner: Any) -> str:
    """Called when the model runner is ready. Returns what is wrong with it; "" if nothing."""
    keeper = getattr(runner, "cudagraph_manager", None) or getattr(runner, "cudagraph_dispatcher", None)
    mode = getattr(keeper, "cudagraph_mode", None)
    if mode is not None and mode.has_full_cudagraphs():
        return f"CUDA graphs are {mode.name} here, and a window needs PIECEWISE ones: add --enforce-eager"
    return ""
