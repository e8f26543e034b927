"""The argument by which `vllm serve` uses vLLM's own offloading with the workers of this package."""

from __future__ import annotations

import json

__all__ = ["offloading_args"]


def offloading_args(
    *, spec: str, module: str, cpu_bytes: int, options: dict[str, object], engine_id: str | None = None
) -> tuple[str, str]:
    """`spec`: a class of `module`. `options`: its further keys. `engine_id`: names the shared memory of vLLM's file
    tier."""
    extra = {
        "spec_name": spec,
        "spec_module_path": f"polder.bench.native.{module}",
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
