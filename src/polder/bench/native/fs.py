"""vLLM's own tiers on the CPU platform, CPU memory over files: the native-fs arm of `polder bench turns`.

As offload.py: the connector, the scheduler's half, promotion, the file tier with its 32 threads, and the
eviction are vLLM's, unchanged; only the worker copies without CUDA. The file tier knows one folder and no disks, so it
stands for a stripe over all of them: over emulated disks its reads and its writes go at the rate of all disks together.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingManager, OffloadingWorker
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.fs import manager as fs_manager
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from polder.bench.native.offload import CopyingWorker, device_blocks
from polder.emulation.links import EmulatedLink

__all__ = ["NativeTieringSpec"]


class NativeTieringSpec(TieringOffloadingSpec):  # type: ignore[misc]
    """TieringOffloadingSpec with a worker that runs without CUDA. Two keys more: `link_bytes_per_s`,
    `disk_bytes_per_s`."""

    def get_manager(self) -> OffloadingManager:
        rate = float(self.extra_config.get("disk_bytes_per_s") or 0)
        if rate:
            for name in ("batch_load_block", "batch_store_block"):
                setattr(fs_manager, name, _paced(getattr(fs_manager, name), EmulatedLink(rate)))
        return super().get_manager()

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        device = device_blocks(kv_caches, self.blocks_per_chunk)
        region = SharedOffloadRegion(
            engine_id=self._engine_id,
            num_chunks=self.num_chunks,
            rank=self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        host = [region.create_next_worker_view(t.page_size_bytes).numpy().view(np.uint8) for t in kv_caches.tensors]
        for view in host:
            view[:] = 1  # no store is to pay for the page faults of its target
        return CopyingWorker(device, host, float(self.extra_config.get("link_bytes_per_s") or 0), region.cleanup)


def _paced(move: Callable[..., Any], link: EmulatedLink) -> Callable[..., Any]:
    """The disk is as fast as it is whoever is reading: calls share it."""

    @functools.wraps(move)
    def paced(paths: list[str], view: memoryview, offsets: list[int], block_size: int, *more: Any) -> Any:
        started = time.perf_counter()
        try:
            return move(paths, view, offsets, block_size, *more)
        finally:
            link.charge(len(paths) * block_size, started)

    return paced
