"""What vLLM 0.32 does wrong, and that our connector does not: each test shows the stock behaviour first, so it fails when it is
mended. 0.33 has mended the last."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import KVTransferConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.common import (
    OffloadingConnectorMetadata,
    OffloadingWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import OffloadingConnectorScheduler
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker
from vllm.v1.kv_offload.base import TransferResult

from polder.engines.vllm import plugin
from polder.engines.vllm.compat import installed_version
from polder.engines.vllm.tiers.connector import PolderConnector, TierScheduler, TierWorkerMetadata, complete_config
from polder.engines.vllm.tiers.worker import PolderWorker
from polder.tiers.jobs import JobResult


class OneFailedLoad:
    """In the place of vLLM's OffloadingWorker: job 5 failed."""

    def get_finished(self) -> list[TransferResult]:
        return [TransferResult(5, success=False)]


class OneFailedJob:
    """In the place of our TierWorker: job number 1 failed in its first row."""

    def poll(self) -> list[JobResult]:
        return [JobResult(number=1, failed={0: "corrupt"}, moved={0: (4096, 0.001)})]


def stock_worker(worker: Any) -> OffloadingConnectorWorker:
    half = OffloadingConnectorWorker.__new__(OffloadingConnectorWorker)
    half.worker, half._load_jobs = worker, {5: "request"}
    half._connector_worker_meta = OffloadingWorkerMetadata()
    return half


def test_a_failed_load_ends_a_stock_engine_and_is_reported_by_ours() -> None:
    with pytest.raises(AssertionError):
        stock_worker(OneFailedLoad()).get_finished(set())
    ours = PolderWorker(lambda *_: OneFailedJob(), [], lambda: None)  # type: ignore[arg-type,return-value]
    ours._numbers[1] = 5
    connector = PolderConnector.__new__(PolderConnector)
    connector.connector_worker = stock_worker(ours)
    connector._connector_metadata = OffloadingConnectorMetadata({}, {})
    results = connector.get_transfer_results(set())
    assert results.finished_recving == {"request"}
    assert results.failed_recving == {"request"}
    meta = connector.build_connector_worker_meta()
    assert isinstance(meta, TierWorkerMetadata)
    assert [report.number for report in meta.reports] == [1]
    both = meta.aggregate(TierWorkerMetadata(completed_jobs={5: 1}, reports=[JobResult(number=1)]))
    assert both.completed_jobs == {5: 2}
    assert len(both.reports) == 2, "every rank's outcome arrives"


def test_a_request_whose_load_failed_is_not_offered_the_same_load_again() -> None:
    """Stock: `update_connector_output` leaves the request as it was, so the same hit is found again, for ever."""
    state = SimpleNamespace(max_load_tokens=None)
    connector = PolderConnector.__new__(PolderConnector)
    connector.connector_scheduler = TierScheduler.__new__(TierScheduler)
    connector.connector_scheduler._req_status = {"request": state}
    connector.connector_scheduler._stale_job_threshold = 0
    tiers = SimpleNamespace(refresh=lambda: None)
    connector.connector_scheduler.manager = SimpleNamespace(tiers=tiers, lock=nullcontext())
    connector.connector_scheduler._step_region = None
    output = SimpleNamespace(kv_connector_worker_meta=None, failed_recving={"request"})
    connector.connector_scheduler.update_connector_output(output)
    assert state.max_load_tokens is None, "stock"
    connector.update_connector_output(output)
    assert state.max_load_tokens == 0


def test_failed_loads_are_recomputed_although_vllm_would_fail_the_request() -> None:
    transfer = KVTransferConfig(kv_connector="PolderConnector", kv_role="kv_both")
    assert transfer.kv_load_failure_policy == "fail", "stock"
    complete_config(SimpleNamespace(kv_transfer_config=transfer))
    assert transfer.kv_load_failure_policy == "recompute"


def test_the_front_end_can_rebuild_our_metrics_because_the_class_is_registered_by_name() -> None:
    """Stock: the statistics of a class that was given by a module path raise ValueError in the API server."""
    with pytest.raises(ValueError, match="not registered"):
        KVConnectorFactory.get_connector_class_by_name("OneOfAModulePath")
    plugin.register()
    assert KVConnectorFactory.get_connector_class_by_name("PolderConnector") is PolderConnector
    assert PolderConnector.build_kv_connector_stats() is not None


def test_a_request_preempted_between_steps_that_loads_again_ends_a_stock_engine_and_flushes_its_stores_in_ours() -> (
    None
):
    def half(kind: type[OffloadingConnectorScheduler]) -> Any:
        scheduler = kind.__new__(kind)
        scheduler._update_req_states = lambda _: None
        scheduler._build_store_jobs = scheduler._build_partial_tail_store_jobs = lambda _: {}
        tiers = SimpleNamespace(refresh=lambda: None)
        scheduler.manager = SimpleNamespace(
            on_schedule_end=lambda _: None, plan_spills=list, tiers=tiers, lock=nullcontext()
        )
        scheduler._jobs = {
            1: SimpleNamespace(is_store=False, is_sync_load=False),
            2: SimpleNamespace(is_store=True, is_sync_load=False),
        }
        scheduler._reset_fence = {}  # as the lock above, since 0.33
        scheduler._req_status = {"a": SimpleNamespace(transfer_jobs={1, 2})}
        scheduler._block_id_to_pending_jobs = {}
        scheduler._current_batch_allocated_block_ids = set()
        scheduler._current_batch_jobs_to_flush = set()
        scheduler._current_batch_load_jobs = {1: "load"}
        return scheduler

    def output() -> Any:
        return SimpleNamespace(preempted_req_ids={"a", "b"}, scheduled_new_reqs=[], finished_req_ids=set())

    mended = installed_version() != "0.32.0"
    with nullcontext() if mended else pytest.raises(AssertionError):
        half(OffloadingConnectorScheduler).build_connector_meta(output())
    told = output()
    meta = half(TierScheduler).build_connector_meta(told)
    assert meta.jobs_to_flush == {2}
    assert told.preempted_req_ids == {"a", "b"}, "vLLM's runners want to know"
