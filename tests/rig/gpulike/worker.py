"""vLLM's CPU worker with the parts of its GPU worker that the CPU worker leaves out."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from gpulike import wanted

__all__ = ["GpuLikeWorker"]


class GpuLikeWorker(CPUWorker):
    def init_device(self) -> None:
        if "v2" in wanted():
            from gpulike.interpreted import mend_interpreter

            mend_interpreter()
            import vllm.v1.sample.ops.topk_topp_sampler as sampler

            sampler.HAS_TRITON = (
                False  # its kernel calls a method of a loop counter, which is a plain int in the interpreter
            )
        super().init_device()

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        if "graphs" in wanted():
            from gpulike.graphs import install

            install(self.model_runner)

    def compile_or_warm_up_model(self) -> Any:
        times = super().compile_or_warm_up_model()
        if self.use_v2_model_runner and "warmup" in wanted():
            from vllm.v1.worker.gpu.warmup import warmup_kernels

            # As gpu_worker.Worker.compile_or_warm_up_model does.
            warmup_kernels(self.model_runner, self.execute_model, self.sample_tokens)
        if "graphs" in wanted():
            # The option leaves out nothing but the lock of a workspace that the CPU does not have.
            self.model_runner.capture_model(profile_only=True)
        return times

    def graph_figures(self) -> dict[str, Any]:
        """For `collective_rpc`: graphs captured and replayed, operations in them, and names of operations that no graph holds."""
        from gpulike import graphs

        return {**graphs.figures, "host_calls": sorted(graphs.host_calls)}
