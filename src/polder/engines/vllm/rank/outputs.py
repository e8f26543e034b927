"""What a worker tells the core with a step's output, beside what vLLM's own output holds."""

from __future__ import annotations

from typing import Any

__all__ = ["tell"]


def tell(output: Any, name: str, value: Any) -> bool:
    """Puts an attribute on what the core gets. False: no request was in the step, and nobody will read it.

    With async scheduling that comes out of the runner's output later.
    """
    from vllm.v1.outputs import ModelRunnerOutput

    for inner in ("model_runner_output", "_model_runner_output"):  # AsyncOutput of V2, AsyncGPUModelRunnerOutput of V1
        output = getattr(output, inner, output)
    if not isinstance(output, ModelRunnerOutput) or not output.req_ids:
        return False
    setattr(output, name, value)
    return True
