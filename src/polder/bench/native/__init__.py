"""vLLM's own offloading on the CPU platform: the arms to compare with. Its workers copy without CUDA."""

from __future__ import annotations

import json

__all__ = ["offloading_args"]

MODULES = {"NativeOffloadingSpec": "offload", "NativeTieringSpec": "fs"}


def offloading_args(spec: str, cpu_bytes: int, *, engine_id: str = "", **options: object) -> tuple[str, str]:
    """The argument by which `vllm serve` uses vLLM's own offloading with the workers of this package.

    `engine_id`: names the shared memory of vLLM's file tier. `options`: further keys of the spec.
    """
    extra = {
        "spec_name": spec,
        "spec_module_path": f"polder.bench.native.{MODULES[spec]}",
        "cpu_bytes_to_use": cpu_bytes,
        "offload_prompt_only": False,
    }
    config = {
        "kv_connector": "OffloadingConnector",
        **({"engine_id": engine_id} if engine_id else {}),
        "kv_role": "kv_both",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": extra | options,
    }
    return "--kv-transfer-config", json.dumps(config)
