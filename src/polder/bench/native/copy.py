"""The copying half of the native comparison arm: blocks between a KV cache and a host buffer, behind the engine's back.

One thread for each direction, so that a load, which a request is waiting for, never queues behind stores, for which
nobody waits. Each direction carries out its jobs one after another, like a DMA engine. Neighbouring blocks go in one
piece, and pieces move with the GIL released. Over an emulated link a job ends when the link would have carried its
bytes. Knows nothing of vLLM.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from polder.emulation.links import EmulatedLink

__all__ = ["BlockCopier", "BlockIds", "Blocks", "Copied"]

Blocks = npt.NDArray[np.uint8]
"""One layer's blocks: (number of blocks, bytes of a block)."""
BlockIds = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Copied:
    """A job that is over."""

    job_id: int
    size_bytes: int
    seconds: float
    """From the beginning of its copy to its end, the link's time included; not the time it was queued."""
    error: Exception | None = None


_End = Callable[[Copied], None]


class BlockCopier:
    """Copies between device blocks and host blocks of the same layers. Thread-safe."""

    def __init__(
        self, device: Sequence[Blocks], host: Sequence[Blocks], *, link_bytes_per_s: float | None = None
    ) -> None:
        """`device[i]` and `host[i]` are the same layer. `link_bytes_per_s`: of each direction; None: as fast as
        memcpy."""
        self._over: queue.SimpleQueue[Copied] = queue.SimpleQueue()
        self._running: set[int] = set()
        self._changed = threading.Condition()
        self._stores = _Direction("native-store", list(zip(device, host, strict=True)), link_bytes_per_s, self._end)
        self._loads = _Direction("native-load", list(zip(host, device, strict=True)), link_bytes_per_s, self._end)

    def store(self, job_id: int, device_ids: BlockIds, host_ids: BlockIds) -> None:
        """Device to host. Sources must not change, and nobody may read destinations, until the job is over."""
        self._submit(self._stores, job_id, device_ids, host_ids)

    def load(self, job_id: int, host_ids: BlockIds, device_ids: BlockIds) -> None:
        """Host to device, under the same condition."""
        self._submit(self._loads, job_id, host_ids, device_ids)

    def take_finished(self) -> list[Copied]:
        """Jobs that ended since the last call, each once. Never blocks."""
        found: list[Copied] = []
        while not self._over.empty():
            found.append(self._over.get())
        return found

    def wait(self, job_ids: set[int]) -> None:
        """Returns when all of them are over. They are still taken by `take_finished`."""
        with self._changed:
            self._changed.wait_for(lambda: not self._running & job_ids)

    def close(self) -> None:
        """Carries out what was submitted and ends the threads."""
        self._stores.close()
        self._loads.close()

    def _submit(self, direction: _Direction, job_id: int, source_ids: BlockIds, target_ids: BlockIds) -> None:
        with self._changed:
            self._running.add(job_id)
        direction.submit(job_id, source_ids, target_ids)

    def _end(self, copied: Copied) -> None:
        self._over.put(copied)
        with self._changed:
            self._running.discard(copied.job_id)
            self._changed.notify_all()


class _Direction:
    """One thread and one direction of the link."""

    def __init__(
        self, name: str, layers: list[tuple[Blocks, Blocks]], link_bytes_per_s: float | None, end: _End
    ) -> None:
        self._layers = layers
        self._link = EmulatedLink(link_bytes_per_s) if link_bytes_per_s else None
        self._end = end
        self._jobs: queue.SimpleQueue[tuple[int, BlockIds, BlockIds] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def submit(self, job_id: int, source_ids: BlockIds, target_ids: BlockIds) -> None:
        self._jobs.put((job_id, source_ids, target_ids))

    def close(self) -> None:
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job_id, source_ids, target_ids = job
            started, size, error = time.perf_counter(), 0, None
            try:
                size = self._copy(source_ids, target_ids)
                if self._link is not None:
                    self._link.charge(size, started)
            except Exception as raised:  # the submitter decides; the thread must live on for the other jobs
                error = raised
            self._end(Copied(job_id=job_id, size_bytes=size, seconds=time.perf_counter() - started, error=error))

    def _copy(self, source_ids: BlockIds, target_ids: BlockIds) -> int:
        """Bytes copied."""
        if len(source_ids) != len(target_ids):
            raise ValueError(f"{len(source_ids)} blocks to copy to {len(target_ids)}")
        size = 0
        runs = _runs(source_ids, target_ids)
        for source, target in self._layers:
            for from_block, to_block, count in runs:
                target[to_block : to_block + count] = source[from_block : from_block + count]
            size += len(source_ids) * source.shape[1]
        return size


def _runs(source_ids: BlockIds, target_ids: BlockIds) -> list[tuple[int, int, int]]:
    """(first source, first target, count) of the stretches in which both sides go on without a gap."""
    if len(source_ids) == 0:
        return []
    breaks = (np.diff(source_ids) != 1) | (np.diff(target_ids) != 1)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1, [len(source_ids)]))
    return [(int(source_ids[start]), int(target_ids[start]), stop - start) for start, stop in pairwise(starts.tolist())]
