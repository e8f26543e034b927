"""The tiers' half in every worker: vLLM's OffloadingWorker over polder.tiers.worker.

vLLM calls it with the ids of its own blocks and with the job that the scheduler's half made (manager.py); here the ids
become addresses. A job that fails is reported as done, since OffloadingConnector asserts success and would end the
engine (KC/offloading/worker.py:286-288); which loads failed is told beside it, and the connector (connector.py) makes
them misses.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.kv_offload.base import CanonicalKVCaches, LoadStoreSpec, OffloadingWorker, TransferResult

from polder.broker.client import fetch_table, status
from polder.broker.wire import FetchTable, Status
from polder.diskstore.keys import Keys
from polder.emulation.factory import Emulation
from polder.engines.vllm.plans import TierPlan
from polder.engines.vllm.process import here
from polder.engines.vllm.rank.host_region import HostRegion
from polder.engines.vllm.rank.memory import WorkerMemory
from polder.engines.vllm.tiers.disk import OpenDisks
from polder.errors import EnvironmentFault, PolderError
from polder.memory.backend import Mark
from polder.memory.pool import ImportedPages
from polder.tiers.disk.memory import DiskMemory
from polder.tiers.host import HostMemory
from polder.tiers.jobs import BatchMemory, Direction, Job, JobResult, Pieces, TierMemory
from polder.tiers.movers import CpuMover, CudaMover
from polder.tiers.peer.borrowing import ChunkGeometry
from polder.tiers.peer.circuit_breaker import ASK_TIMEOUT_S, CircuitBreaker
from polder.tiers.peer.lending import open_table
from polder.tiers.peer.memory import Lent, PeerMemory
from polder.tiers.worker import TierWorker

__all__ = ["PolderWorker", "TierJob", "caches_prefixes", "open_worker"]

logger = logging.getLogger("polder.engine")


class TierJob(LoadStoreSpec):  # type: ignore[misc]
    """The job, as vLLM carries it from its scheduler to its workers."""

    def __init__(self, job: Job) -> None:
        self.job = job


class PolderWorker(OffloadingWorker):  # type: ignore[misc]
    """Adapts TierWorker to vLLM."""

    def __init__(
        self,
        open_tiers: Callable[[int, DiskMemory | None], TierWorker],
        groups: Sequence[Sequence[tuple[int, int, int]]],
        on_close: Callable[[], None],
        *,
        mark: Callable[[], Mark | None] = lambda: None,
        disks: OpenDisks | None = None,
        host: tuple[int, int] = (0, 0),
    ) -> None:
        """`open_tiers(slots of the disk, its memory)`: with a disk called by `start`, else at once. `groups`: for each
        KV cache group (address of block 0, bytes from block to block, bytes of a block) of every layer. `host`: address
        and slot bytes of its tier. `mark`: Backend.mark; a job waits for what was launched before it was submitted."""
        self._groups, self._on_close, self._open, self._host = groups, on_close, open_tiers, host
        self._mark = mark
        self.disks = disks
        self._disk: DiskMemory | None = None
        self.tiers: TierWorker
        if disks is None:
            self.tiers = open_tiers(0, None)
        self._unsent: list[JobResult] = []
        self._numbers: dict[int, int] = {}  # job number -> vLLM's job id
        self._reports: list[JobResult] = []
        self.failed_loads: set[int] = set()

    def start(self, capacity: int, kept: Keys) -> None:
        """The scheduler has `capacity` slots for pages on disk, the first of them with the pages `kept`."""
        assert self.disks is not None
        self._disk = self.disks.memory(capacity, kept, *self._host)
        self.tiers = self._open(capacity, self._disk)

    def stop_disks(self) -> None:
        """The weights are not those that the stores' namespace names any more: nothing is read or written in this run."""
        if self._disk is not None:
            self._disk.stop()

    def submit_own(self, jobs: Sequence[Job]) -> None:
        """Jobs of the disk's own, which vLLM does not know."""
        for job in jobs:
            self.tiers.submit(job, [])

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        window = here.window
        # These blocks are of the pass before. Wrong or old bytes would get a checksum of their own.
        if window is not None and (not window.settled() or window.spoiled):
            return self._refuse(job_id, dst_spec.job)
        return self._submit(job_id, dst_spec, src_spec)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:
        # vLLM 0.33 sets `expedited` with sync_load_budget_bytes only, which tiers/agreement.py refuses.
        window = here.window
        # The pass before may have written such a block for a request that has ended: its save must not land after the load.
        if window is not None and not window.settled():
            return self._refuse(job_id, src_spec.job)
        return self._submit(job_id, src_spec, dst_spec)

    def get_finished(self) -> list[TransferResult]:
        results = []
        unsent, self._unsent = self._unsent, []
        for finished in [*unsent, *self.tiers.poll()]:
            self._reports.append(finished)
            job_id = self._numbers.pop(finished.number, None)
            if job_id is None:
                continue  # the disk's own
            if finished.failed:
                self.failed_loads.add(job_id)
            size = sum(moved for moved, _ in finished.moved.values())
            seconds = max((taken for _, taken in finished.moved.values()), default=0.0)
            results.append(TransferResult(job_id, success=True, transfer_size=size, transfer_time=seconds))
        return results

    def take_reports(self) -> list[JobResult]:
        """What ended since the last call, for the scheduler's half."""
        reports, self._reports = self._reports, []
        return reports

    def wait(self, job_ids: set[int]) -> None:
        self.tiers.wait(number for number, job_id in self._numbers.items() if job_id in job_ids)

    def shutdown(self) -> None:
        if self.disks is None or self._disk is not None:  # else the start failed before `start`
            self.tiers.close()
        if self.disks is not None:
            self.disks.close()
        self._on_close()

    def _refuse(self, job_id: int, job: Job) -> bool:
        """Not begun: all of it has failed."""
        self._numbers[job.number] = job_id
        rows = [row for part in job.parts for row in part.rows.tolist()]
        self._unsent.append(JobResult(number=job.number, failed=dict.fromkeys(rows, "error")))
        return True

    def _submit(self, job_id: int, spec: TierJob, blocks: Any) -> bool:
        try:
            mark = self._mark()
        except PolderError as error:
            logger.warning("blocks are not copied: %s", error)
            return self._refuse(job_id, spec.job)
        self._numbers[spec.job.number] = job_id
        window = here.window
        pieces: list[Pieces] = []
        at = 0
        for group, size in zip(self._groups, blocks.group_sizes, strict=True):
            for block in blocks.block_ids[at : at + size].tolist():
                if window is None:
                    pieces.append([(base + block * stride, length) for base, stride, length in group])
                else:
                    pieces.append([(window.home_of(base, block), length) for base, _, length in group])
            at += size
        self.tiers.submit(spec.job, pieces, after=mark)
        return True


def open_worker(memory: WorkerMemory, plan: TierPlan, kv_caches: CanonicalKVCaches) -> PolderWorker:
    """The worker of this rank, over the KV cache that vLLM registered."""
    groups = []
    for refs in kv_caches.group_data_refs:
        layers = []
        for ref in refs:
            tensor = kv_caches.tensors[ref.tensor_idx].tensor
            layers.append((tensor.data_ptr(), tensor.stride(0) * tensor.element_size(), ref.page_size_bytes))
        groups.append(layers)
    emulation = Emulation(links=memory.plan.links, faults=memory.plan.faults)
    host = HostRegion(memory, plan.host_pages[memory.rank]) if "host" in plan.tiers else None
    reach = CircuitBreaker(lambda: status(memory.plan.broker))
    lanes: dict[tuple[int, Direction], TierMemory] = {}
    directions: tuple[Direction, ...] = ("load", "store")
    for tier, name in enumerate(plan.tiers):
        for direction in directions:
            lane: TierMemory
            if name == "disk":
                continue  # carries out whole parts
            if name == "host":
                assert host is not None
                lane = HostMemory(host.address, plan.shard_bytes)
            else:
                lane = _peer_memory(memory, plan, reach)
            lanes[tier, direction] = emulation.tier_memory(lane, name, direction)
    mover = CpuMover() if memory.device.startswith("cpu") else CudaMover(memory.backend)

    def open_tiers(disk_slots: int, disk: DiskMemory | None) -> TierWorker:
        capacities = dict(enumerate(plan.capacities))
        batches: dict[int, BatchMemory] = {}
        if disk is not None:
            last = plan.tiers.index("disk")
            capacities[last] = disk_slots
            batches[last] = emulation.disk_memory(disk)
        return TierWorker(
            lanes,
            mover,
            seed=plan.namespace + memory.rank,
            capacities=capacities,
            batches=batches,
            host=plan.tiers.index("host") if disk is not None else None,
        )

    def close() -> None:
        reach.close()
        if host is not None:
            host.close()

    here.tiers = PolderWorker(
        open_tiers,
        groups,
        close,
        mark=memory.backend.mark,
        disks=OpenDisks(plan.disk, memory.rank, emulation) if plan.disk is not None else None,
        host=(host.address, plan.shard_bytes) if host is not None else (0, 0),
    )
    return here.tiers


def caches_prefixes(worker: Any) -> bool:
    """Whether vLLM has left prefix caching on in this worker."""
    return bool(worker.vllm_config.cache_config.enable_prefix_caching)


def _peer_memory(memory: WorkerMemory, plan: TierPlan, reach: CircuitBreaker) -> PeerMemory:
    broker = memory.plan.broker

    def open_lender(name: str) -> Lent:
        request = FetchTable(engine=memory.plan.engine, lender=name)
        table_devices = _devices(reach.ask(lambda: status(broker, timeout_s=ASK_TIMEOUT_S)), name)
        fd = reach.ask(lambda: fetch_table(broker, request, timeout_s=ASK_TIMEOUT_S))
        table = open_table(fd)

        def fetch(imported: ImportedPages, rank: int, pages: Sequence[int]) -> None:
            device = table_devices[rank]
            reach.ask(
                lambda: memory.adopt(
                    imported,
                    device,
                    pages,
                    lender=name,
                    generation=memory.plan.generation,
                    timeout_s=ASK_TIMEOUT_S,
                )
            )

        cut = ChunkGeometry.of(table.geometry, plan.shard_bytes)
        return Lent(table=table, cut=cut, generation=memory.plan.generation, fetch=fetch)

    return PeerMemory(number=plan.number, rank=memory.rank, backend=memory.backend, open_lender=open_lender)


def _devices(known: Status, lender: str) -> list[str]:
    """The device of each rank of the lender. Raises EnvironmentFault when it is gone."""
    for engine in known.engines:
        if engine.engine == lender:
            return engine.devices
    raise EnvironmentFault(f"{lender} is gone")
