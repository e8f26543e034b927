"""vLLM's CPU worker with the parts of its GPU worker that the CPU worker leaves out."""

from __future__ import annotations

import os
from typing import Any

from vllm.v1.outputs import AsyncModelRunnerOutput
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
        self._device_thread = None
        if "late" in wanted():
            from gpulike import late

            self._device_thread = late.Device(int(os.environ.get("GPULIKE_SEED", "0")))
            late.install(self._device_thread)
        if "driver" in wanted():
            from gpulike import driven

            self._device_thread = driven.install()

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

    def execute_model(self, scheduler_output: Any) -> Any:
        if self._device_thread is not None:
            self._device_thread.begin_step()
            if scheduler_output.new_block_ids_to_zero:
                self._device_thread.begin_layer()
        return self._later(super().execute_model(scheduler_output))

    def sample_tokens(self, grammar_output: Any) -> Any:
        return self._later(super().sample_tokens(grammar_output))

    def _later(self, output: Any) -> Any:
        """An output of a step that the device thread may not have carried out."""
        if self._device_thread is None or output is None:
            return output
        from gpulike.late import LateOutput

        if isinstance(output, AsyncModelRunnerOutput):
            return LateOutput(output, self._device_thread)
        self._device_thread.wait()
        return output

    def late_figures(self) -> dict[str, int]:
        """For `collective_rpc`: layers that the device thread has carried out, and violations that it found."""
        assert self._device_thread is not None, 'add "late" to `like`'
        self._device_thread.wait()
        return {"layers": self._device_thread.launched, "violations": self._device_thread.violations}

    def driver_figures(self) -> dict[str, Any]:
        """For `collective_rpc`: what the fake driver found missing ("" if nothing), calls of it, and what late_figures tells."""
        return {**self._device_thread.figures(), **self.late_figures()}

    def replaced(self) -> list[str]:
        """For `collective_rpc`: methods of this worker's runner and of its attention layers that are not vLLM's own."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        objects = [self.model_runner, *(layer.impl for layer in layers if hasattr(layer, "impl"))]
        return sorted({name for each in objects for name in vars(each) if callable(getattr(type(each), name, None))})

    def graph_figures(self) -> dict[str, Any]:
        """For `collective_rpc`: graphs captured and replayed, operations in them, and names of operations that no graph holds."""
        from gpulike import graphs

        return {**graphs.figures, "host_calls": sorted(graphs.host_calls)}
