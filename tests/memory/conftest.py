"""`machine`: every test that takes it runs on each kind of device there is."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

import pytest

from tests.memory.machines import FAKE_MB, LIBRARY, FakeCuda, Machine, build_fakecuda


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    """The fake driver, loaded. It stays loaded: a process has one libcuda.so.1, so not where a real one may be in use."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a real NVIDIA driver is here")
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    path = build_fakecuda(tmp_path_factory.mktemp("fakecuda"))
    os.environ[LIBRARY], os.environ["FAKECUDA_MB"] = str(path), str(FAKE_MB)
    return FakeCuda(str(path))


@pytest.fixture
def cpu() -> Iterator[Machine]:
    yield from _machine("cpu", None)


@pytest.fixture
def fake(fake_cuda: FakeCuda) -> Iterator[Machine]:
    fake_cuda.reset()
    yield from _machine("fake-cuda", fake_cuda)
    fake_cuda.reset()
    assert fake_cuda.used(0) == 0, "physical memory was left behind"


@pytest.fixture
def gpu() -> Iterator[Machine]:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU")
    yield from _machine("cuda", None)


@pytest.fixture(params=["cpu", "fake", pytest.param("gpu", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest) -> Machine:
    return request.getfixturevalue(request.param)


def _machine(kind: str, fake: FakeCuda | None) -> Iterator[Machine]:
    gc.collect()
    before = os.listdir("/proc/self/fd")
    machine = Machine(kind, fake)
    yield machine
    machine.close()
    gc.collect()
    if kind != "cuda":  # the real driver opens files of its own when it likes
        leaked = len(os.listdir("/proc/self/fd")) - len(before)
        assert leaked <= 0, f"{leaked} file descriptors leaked"
