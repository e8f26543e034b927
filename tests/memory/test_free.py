"""How much of a device is free, without a context on it."""

from __future__ import annotations

import ctypes
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from polder.memory import nvml
from polder.memory.cpu import CpuBackend
from polder.memory.cuda import CudaBackend
from polder.memory.limits import raise_open_files
from tests.memory.machines import FakeCuda, build_library

FAKE = Path(__file__).parents[1] / "fixtures" / "fakenvml"


@pytest.fixture
def fake_nvml(tmp_path: Path) -> Iterator[None]:
    ctypes.CDLL(str(build_library(tmp_path / "libnvidia-ml.so.1", FAKE)), mode=ctypes.RTLD_GLOBAL)
    nvml._library.cache_clear()
    yield
    nvml._library.cache_clear()


def test_a_gpu_tells_what_is_free_by_its_uuid(fake_nvml: None, fake_cuda: FakeCuda) -> None:
    fake_cuda.reset()
    for device, free in ((0, 3 << 30), (1, None)):
        backend = CudaBackend(device)
        assert backend.free_bytes() == free
        assert backend.driver.call("cuDevicePrimaryCtxGetState", device)[1] == 0, "that took a context"
        backend.close()


def test_without_a_gpu_it_is_not_known() -> None:
    backend = CpuBackend()
    assert backend.free_bytes() is None
    backend.close()


def test_the_limit_of_open_files_is_raised() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        assert raise_open_files() > 256
        assert raise_open_files() == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
