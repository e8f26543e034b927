"""Imported by the process from which engines are forked (forking.py): what an engine needs, before there is one."""

from __future__ import annotations

import gc
import importlib
import os

import setproctitle

MODULES = (
    "vllm.v1.engine.core",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.cpu.model_runner",
    "vllm.v1.worker.gpu.warmup",
    "vllm.v1.attention.backends.cpu_attn",
    "vllm.model_executor.models.llama",
    "vllm.model_executor.models.qwen3",
    "vllm.model_executor.models.qwen2_moe",
    "vllm.model_executor.models.gemma3",
    "vllm.model_executor.model_loader.default_loader",
    "vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector",
    "gpulike.worker",
)

try:
    for name in MODULES:
        importlib.import_module(name)
except ImportError as error:  # which Python's fork server would not mention
    raise RuntimeError(f"the modules that engines need cannot be imported: {error}") from error
# It finds the place of the command line beside the environment, which forked processes replace.
setproctitle.getproctitle()
threads = len(os.listdir("/proc/self/task"))
if threads != 1:
    raise RuntimeError(f"{threads} threads after the imports: forked engines would lack them")
# What was imported here is never garbage in a forked process. To look through it would copy its pages, too.
gc.collect()
gc.freeze()
gc.unfreeze = lambda: None  # vLLM's, before an engine ends
