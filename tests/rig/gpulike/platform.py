"""vLLM's CPU platform, with the GPU defaults that it switches off switched on again."""

from __future__ import annotations

from typing import Any

from vllm.platforms.cpu import CpuPlatform

from gpulike import wanted

CAPTURE_SIZES = (1, 2, 4, 8, 16)
PREFILL_SIZES = (32, 64, 128, 256)
"""Of piecewise graphs, which compute prefills as well."""


class GpuLikePlatform(CpuPlatform):
    """CpuPlatform for an engine that asks for nothing."""

    def get_global_graph_pool(self) -> Any:
        return (0, 0)

    @classmethod
    def graph_pool_handle(cls) -> Any:
        return (0, 0)

    @classmethod
    def get_static_graph_wrapper_cls(cls) -> str:
        if "graphs" in wanted():
            return "vllm.compilation.cuda_graph.CUDAGraphWrapper"
        return str(super().get_static_graph_wrapper_cls())

    @classmethod
    def support_static_graph_mode(cls) -> bool:
        return "graphs" in wanted()

    @classmethod
    def check_and_update_config(cls, vllm_config: Any) -> None:
        names = wanted()
        decided = vllm_config.scheduler_config.async_scheduling  # vLLM's decision: false if something rules it out
        asked = vllm_config.compilation_config.cudagraph_mode
        super().check_and_update_config(vllm_config)
        if not names:
            return
        from vllm.config.compilation import CompilationMode, CUDAGraphMode

        parallel, compilation = vllm_config.parallel_config, vllm_config.compilation_config
        vllm_config.scheduler_config.async_scheduling = "async" in names and decided is not False
        if "uni" in names and parallel.world_size == 1:
            parallel.distributed_executor_backend = "uni"
        parallel.worker_cls = "gpulike.worker.GpuLikeWorker"
        both = "compiled" in names
        if both:
            if vllm_config.model_config.enforce_eager:
                # vLLM has settled by now which of its own kernels and fusions are used, as for a model that is not compiled.
                raise ValueError("gpulike: compiled needs enforce_eager=False")
            compilation.mode, compilation.backend = CompilationMode.VLLM_COMPILE, "eager"
            compilation.compile_sizes = compilation.compile_sizes or []  # vLLM leaves it out where there are no graphs
        if "graphs" in names:
            compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE if both else CUDAGraphMode.FULL_DECODE_ONLY
            if both and asked == CUDAGraphMode.PIECEWISE:
                compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE
            compilation.cudagraph_capture_sizes = [*CAPTURE_SIZES, *(PREFILL_SIZES if both else ())]
            compilation.max_cudagraph_capture_size = compilation.cudagraph_capture_sizes[-1]
        import vllm.config.vllm  # not at the top: it needs the platform

        # Only workers run Triton kernels. This process may have been started without any.
        vllm.config.vllm.HAS_TRITON = "v2" in names
