"""Engines that share a GPU: the second one starts beside the first, and each is on the device that the broker means."""

from __future__ import annotations

import resource
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.utils.mem_utils import MemorySnapshot
from vllm.v1.worker.utils import request_memory

from polder.broker.wire import DeviceStatus
from polder.engines.vllm.hooks import around
from polder.engines.vllm.process import here
from polder.engines.vllm.rank import calls, taps
from polder.engines.vllm.start.broker import check_devices
from polder.errors import ConfigError

GIB = 1 << 30
ONE, OTHER = "0" * 32, "1" * 32


def snapshot(free_gib: int) -> MemorySnapshot:
    return MemorySnapshot(total_memory=100 * GIB, free_memory=free_gib * GIB, device="cpu", auto_measure=False)


def config_of(additional: dict[str, Any]) -> VllmConfig:
    config = VllmConfig(additional_config=additional)
    config.model_config = SimpleNamespace(served_model_name="m", model="m")
    return config


def test_a_second_engine_gets_what_is_free_and_a_stock_one_is_refused() -> None:
    module = SimpleNamespace(request_memory=around(request_memory, taps.request_memory))
    cache = SimpleNamespace(gpu_memory_utilization=0.92)
    with set_current_vllm_config(config_of({})), pytest.raises(ValueError, match="less than desired GPU memory"):
        module.request_memory(snapshot(40), cache)
    with set_current_vllm_config(config_of({"polder": {"kv_budget": "8GiB"}})):
        assert module.request_memory(snapshot(40), cache) == 40 * GIB
        assert module.request_memory(snapshot(99), cache) == 92 * GIB
        assert module.request_memory(snapshot(40), cache, 60 * GIB) == 32 * GIB


def test_a_device_is_compared_by_its_uuid() -> None:
    def device(name: str, uuid: str) -> DeviceStatus:
        return DeviceStatus(device=name, page_bytes=1, total_pages=1, free_pages=1, pages_by_owner={}, uuid=uuid)

    known = {"cuda:0": device("cuda:0", ONE), "cpu:0": device("cpu:0", "")}
    check_devices(["cuda:0"], [ONE], known)
    check_devices(["cuda:0"], [""], known)
    check_devices(["cpu:0"], [""], known)
    with pytest.raises(ConfigError, match=f"GPU {OTHER} for this engine and GPU {ONE} for the broker"):
        check_devices(["cuda:0"], [OTHER], known)
    hidden = {"cuda:1": device("cuda:1", ONE)}
    with pytest.raises(ConfigError, match=r"this engine's cuda:0 is the broker's cuda:1: .* by --device-ids 1"):
        check_devices(["cuda:0"], [ONE], hidden)
    with pytest.raises(ConfigError, match="the broker has cuda:0, cpu:0: add --device cuda:1=SIZE"):
        check_devices(["cuda:1"], [OTHER], known)


def test_an_engine_on_the_cpu_has_no_uuid() -> None:
    assert calls.device_uuid(SimpleNamespace(device=SimpleNamespace(type="cpu"))) == ""


def test_a_worker_may_have_many_files_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA each page that it gets is a descriptor at first."""
    for name in ("plan", "rank", "device", "runner"):
        monkeypatch.setattr(here, name, getattr(here, name))
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    rank = SimpleNamespace(rank=0, device=SimpleNamespace(type="cpu"), model_runner=None)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        calls.prepare(rank, SimpleNamespace(sparse=None))
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] > 256
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
