"""`machine`: every test that takes it runs on each kind of device there is."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.memory.machines import FakeCuda, Machine


@pytest.fixture
def cpu() -> Iterator[Machine]:
    yield from _machine("cpu", None)


@pytest.fixture
def fake(fake_cuda: FakeCuda) -> Iterator[Machine]:
    fake_cuda.reset()
    yield from _machine("fake-cuda", fake_cuda)
    assert fake_cuda.violation() == ""
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
