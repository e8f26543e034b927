"""`machine`: every test that takes it runs on each kind of device there is."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


KINDS: list[Any] = ["cpu", "fake"]
if Path("/dev/nvidiactl").exists():
    KINDS.append(pytest.param("gpu", marks=pytest.mark.gpu))


@pytest.fixture(params=KINDS)
def machine(request: pytest.FixtureRequest) -> Machine:
    return request.getfixturevalue(request.param)


def _machine(kind: str, fake: FakeCuda | None) -> Iterator[Machine]:
    before = len(os.listdir("/proc/self/fd"))
    machine = Machine(kind, fake)
    yield machine
    machine.close()
    if kind == "cuda":
        return  # the real driver opens files of its own when it likes
    if len(os.listdir("/proc/self/fd")) > before:
        gc.collect()  # takes long with torch loaded, so only when something may be left to collect
    leaked = len(os.listdir("/proc/self/fd")) - before
    assert leaked <= 0, f"{leaked} file descriptors leaked"
