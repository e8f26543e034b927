"""vLLM's own CPU offloading on the CPU platform: the native arm of `polder bench turns`.

vLLM 0.32 refuses its OffloadingConnector on CPUs, because its worker copies with CUDA streams. This module is that
worker without CUDA and nothing else: the connector, the scheduler's half, the manager, its LRU eviction and the block
fences are vLLM's, unchanged. CPUOffloadingSpec is the one of vLLM's two specs that needs the least: only its worker is
replaced.

--kv-transfer-config '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both",
      "kv_load_failure_policy": "recompute", "kv_connector_extra_config": {
        "spec_name": "NativeOffloadingSpec", "spec_module_path": "polder.bench.native.offload",
        "cpu_bytes_to_use": 369098752, "offload_prompt_only": false, "link_bytes_per_s": 400000000}}'
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import numpy as np
import torch
from vllm.v1.kv_offload.base import (
    BlockIDsLoadStoreSpec,
    CanonicalKVCaches,
    GPULoadStoreSpec,
    LoadStoreSpec,
    OffloadingWorker,
    TransferResult,
)
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec

from polder.bench.native.copy import Blocks, Copies

__all__ = ["CopyingWorker", "NativeOffloadingSpec", "device_blocks"]


class NativeOffloadingSpec(CPUOffloadingSpec):  # type: ignore[misc]
    """CPUOffloadingSpec with a worker that runs without CUDA. One key more: `link_bytes_per_s` (0 or absent: no
    emulation)."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        # Asked for once by each worker process. The buffer is private to it, as vLLM's is without a shared region. Filled, not only
        # reserved: no store is to pay for the page faults of its target.
        device = device_blocks(kv_caches, self.blocks_per_chunk)
        host = [np.full((self.num_chunks, blocks.shape[1]), 1, dtype=np.uint8) for blocks in device]
        return CopyingWorker(device, host, float(self.extra_config.get("link_bytes_per_s") or 0))


def device_blocks(kv_caches: CanonicalKVCaches, blocks_per_chunk: int) -> list[Blocks]:
    """Raises NotImplementedError for caches that are not one group of unpadded pages, one block to a chunk."""
    (refs,) = kv_caches.group_data_refs
    tensors = [kv_caches.tensors[ref.tensor_idx] for ref in refs]
    unpadded = all(r.page_size_bytes == t.page_size_bytes for r, t in zip(refs, tensors, strict=True))
    if blocks_per_chunk != 1 or len(refs) != len(kv_caches.tensors) or not unpadded:
        raise NotImplementedError("the native arms copy whole blocks of plain attention layers")
    return [tensor.tensor.view(torch.uint8).numpy() for tensor in tensors]


class CopyingWorker(OffloadingWorker):  # type: ignore[misc]
    """Copies by a thread for each direction."""

    def __init__(
        self,
        device: Sequence[Blocks],
        host: Sequence[Blocks],
        link_bytes_per_s: float,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        """`device[i]` and `host[i]` are the same layer."""
        self._stores, self._loads = Copies(device, host, link_bytes_per_s), Copies(host, device, link_bytes_per_s)
        self._jobs: dict[int, Future[tuple[int, float]]] = {}
        """Those that vLLM was not told of yet."""
        self._on_close = on_close

    def submit_store(self, job_id: int, src_spec: GPULoadStoreSpec, dst_spec: LoadStoreSpec) -> bool:
        assert isinstance(dst_spec, BlockIDsLoadStoreSpec)
        self._jobs[job_id] = self._stores.submit(src_spec.block_ids, dst_spec.block_ids)
        return True

    def submit_load(
        self, job_id: int, src_spec: LoadStoreSpec, dst_spec: GPULoadStoreSpec, expedited: bool = False
    ) -> bool:
        """`expedited`: vLLM 0.33 sets it with sync_load_budget_bytes, which the bench does not; such loads are not
        hurried."""
        assert isinstance(src_spec, BlockIDsLoadStoreSpec)
        self._jobs[job_id] = self._loads.submit(src_spec.block_ids, dst_spec.block_ids)
        return True

    def get_finished(self) -> list[TransferResult]:
        over = {job_id: self._jobs.pop(job_id) for job_id, job in list(self._jobs.items()) if job.done()}
        return [TransferResult(job_id, not job.exception(), *_moved(job)) for job_id, job in over.items()]

    def wait(self, job_ids: set[int]) -> None:
        wait([self._jobs[job_id] for job_id in job_ids & self._jobs.keys()])

    def shutdown(self) -> None:
        self._stores.close()
        self._loads.close()
        self._on_close()


def _moved(job: Future[tuple[int, float]]) -> tuple[int, float]:
    return (0, 0.0) if job.exception() else job.result()
