"""The copying half of the native comparison arms: blocks between a KV cache and a host buffer, behind the engine's back.

One thread for each direction, so that a load, which a request is waiting for, never queues behind stores, for which
nobody waits. Each direction carries out its jobs one after another, like a DMA engine. Neighbouring blocks go in one
piece, and pieces move with the GIL released. Over an emulated link a job ends when the link would have carried its
bytes. Knows nothing of vLLM.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from polder.emulation.links import EmulatedLink

__all__ = ["BlockIds", "Blocks", "Copies"]

Blocks = npt.NDArray[np.uint8]
"""One layer's blocks: (number of blocks, bytes of a block)."""
BlockIds = npt.NDArray[np.int32]


class Copies:
    """One direction. Until a job is over its sources must not change, and nobody may read its targets."""

    def __init__(self, source: Sequence[Blocks], target: Sequence[Blocks], link_bytes_per_s: float = 0.0) -> None:
        """`source[i]` and `target[i]` are the same layer. `link_bytes_per_s`: 0 is as fast as memcpy."""
        self._layers = list(zip(source, target, strict=True))
        self._link = EmulatedLink(link_bytes_per_s) if link_bytes_per_s else None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="native-copy")

    def submit(self, source_ids: BlockIds, target_ids: BlockIds) -> Future[tuple[int, float]]:
        """A job; its result is (bytes copied, seconds from the beginning of its copy to its end on the link)."""
        return self._thread.submit(self._copy, source_ids, target_ids)

    def close(self) -> None:
        """Carries out what was submitted and ends the thread."""
        self._thread.shutdown()

    def _copy(self, source_ids: BlockIds, target_ids: BlockIds) -> tuple[int, float]:
        started, size_bytes, runs = time.perf_counter(), 0, _runs(source_ids, target_ids)
        for source, target in self._layers:
            for from_block, to_block, count in runs:
                target[to_block : to_block + count] = source[from_block : from_block + count]
            size_bytes += len(source_ids) * source.shape[1]
        if self._link is not None:
            self._link.charge(size_bytes, started)
        return size_bytes, time.perf_counter() - started


def _runs(source_ids: BlockIds, target_ids: BlockIds) -> list[tuple[int, int, int]]:
    """(first source, first target, count) of the stretches in which both sides go on without a gap."""
    if len(source_ids) != len(target_ids):
        raise ValueError(f"{len(source_ids)} blocks to copy to {len(target_ids)}")
    if len(source_ids) == 0:
        return []
    breaks = (np.diff(source_ids) != 1) | (np.diff(target_ids) != 1)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1, [len(source_ids)]))
    return [(int(source_ids[start]), int(target_ids[start]), stop - start) for start, stop in pairwise(starts.tolist())]
