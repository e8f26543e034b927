"""The native arm's copier: whole blocks, both ways, one job of a direction after another."""

from __future__ import annotations

import time
from concurrent.futures import wait

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.bench.native.copy import BlockIds, Blocks, Copies
from tests.conftest import examples

BLOCK_BYTES = 64


def layers(count: int, blocks: int, *, seed: int) -> list[Blocks]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 255, size=(blocks, BLOCK_BYTES), dtype=np.uint8) for _ in range(count)]


def ids(*numbers: int) -> BlockIds:
    return np.array(numbers, dtype=np.int32)


@examples(50)
@given(st.data())
def test_what_is_stored_and_loaded_has_equal_bytes_and_nothing_else_changes(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    stored = data.draw(st.permutations(range(12)))[:count]
    rows = data.draw(st.permutations(range(20)))[:count]
    loaded = data.draw(st.permutations(range(12)))[:count]
    device, host = layers(3, 12, seed=1), layers(3, 20, seed=2)
    before, host_before = [layer.copy() for layer in device], [layer.copy() for layer in host]
    stores, loads = Copies(device, host), Copies(host, device)
    try:
        assert stores.submit(ids(*stored), ids(*rows)).result()[0] == 3 * count * BLOCK_BYTES
        assert loads.submit(ids(*rows), ids(*loaded)).result()[0] == 3 * count * BLOCK_BYTES
    finally:
        stores.close()
        loads.close()
    for layer, old, kept, kept_old in zip(device, before, host, host_before, strict=True):
        expected = old.copy()
        expected[loaded] = old[stored]
        np.testing.assert_array_equal(layer, expected)
        others = [row for row in range(20) if row not in rows]
        np.testing.assert_array_equal(kept[others], kept_old[others])


def test_an_emulated_link_takes_its_time_for_all_jobs_of_a_direction_together() -> None:
    copies = Copies(layers(2, 8, seed=1), layers(2, 8, seed=2), link_bytes_per_s=16 * BLOCK_BYTES / 0.05)
    started = time.perf_counter()
    try:
        wait([copies.submit(ids(*range(8)), ids(*range(8))) for _ in range(3)])
        assert time.perf_counter() - started >= 0.15 - 0.001
    finally:
        copies.close()


def test_a_job_that_fails_says_so_and_later_jobs_are_carried_out() -> None:
    device, host = layers(1, 4, seed=1), layers(1, 4, seed=2)
    copies = Copies(device, host)
    try:
        failed, done = copies.submit(ids(0, 1), ids(0)), copies.submit(ids(0), ids(3))
        assert isinstance(failed.exception(), ValueError)
        assert not done.exception()
    finally:
        copies.close()
    np.testing.assert_array_equal(host[0][3], device[0][0])


def test_vllms_worker_interface_reaches_the_copier() -> None:
    torch = pytest.importorskip("torch")
    base = pytest.importorskip("vllm.v1.kv_offload.base")
    from vllm.v1.kv_offload.cpu.common import CPULoadStoreSpec

    from polder.bench.native.offload import CopyingWorker, device_blocks

    tensors = [torch.arange(6 * 32, dtype=torch.int8).reshape(6, 32) + layer for layer in range(2)]
    caches = base.CanonicalKVCaches(
        tensors=[base.CanonicalKVCacheTensor(tensor=t, page_size_bytes=32) for t in tensors],
        group_data_refs=[[base.CanonicalKVCacheRef(tensor_idx=i, page_size_bytes=32) for i in range(2)]],
    )
    device = device_blocks(caches, 1)
    worker = CopyingWorker(device, [np.zeros((9, 32), np.uint8) for _ in device], 0.0)
    try:
        expected = [t[[2, 3]].clone() for t in tensors]
        on_device = base.GPULoadStoreSpec([2, 3], group_sizes=[2], block_indices=[0])
        assert worker.submit_store(1, on_device, CPULoadStoreSpec([7, 8]))
        worker.wait({1})
        for tensor in tensors:
            tensor[:] = 0
        back = base.GPULoadStoreSpec([5, 0], group_sizes=[2], block_indices=[0])
        assert worker.submit_load(2, CPULoadStoreSpec([7, 8]), back)
        worker.wait({2})
        assert [torch.equal(t[[5, 0]], e) for t, e in zip(tensors, expected, strict=True)] == [True, True]
        assert [(r.job_id, r.success, r.transfer_size) for r in worker.get_finished()] == [
            (1, True, 128),
            (2, True, 128),
        ]
        assert not worker.get_finished(), "each job is told of once"
        worker.submit_store(3, on_device, CPULoadStoreSpec([7]))
        worker.wait({3})
        assert [(r.job_id, r.success) for r in worker.get_finished()] == [(3, False)]
    finally:
        worker.shutdown()


def test_caches_that_the_worker_does_not_know_are_refused() -> None:
    torch = pytest.importorskip("torch")
    base = pytest.importorskip("vllm.v1.kv_offload.base")
    from polder.bench.native.offload import device_blocks

    caches = base.CanonicalKVCaches(
        tensors=[base.CanonicalKVCacheTensor(tensor=torch.zeros((4, 32), dtype=torch.int8), page_size_bytes=32)],
        group_data_refs=[[base.CanonicalKVCacheRef(tensor_idx=0, page_size_bytes=24)]],
    )
    with pytest.raises(NotImplementedError):
        device_blocks(caches, 1)
