"""Shared by all tests: nothing a test starts may outlive it."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

# A time limit for each example says how loaded the machine is, and nothing of the code.
settings.register_profile("polder", deadline=None)
settings.load_profile("polder")

if TYPE_CHECKING:
    from tests.memory.machines import FakeCuda


def pytest_configure() -> None:
    """A run that is told to end tears its fixtures down, engines included, as one that fails does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for a Unix socket's 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="pt-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def no_fd_leak() -> Iterator[None]:
    before = len(os.listdir("/proc/self/fd"))
    yield
    after = len(os.listdir("/proc/self/fd"))
    assert after <= before, f"{after - before} file descriptors leaked"


@pytest.fixture(scope="session")
def fake_cuda(tmp_path_factory: pytest.TempPathFactory) -> FakeCuda:
    """The fake driver, loaded. It stays loaded: a process has one libcuda.so.1, so not where a real one may be in use."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("a real NVIDIA driver is here")
    pytest.importorskip("cuda.bindings.driver", reason="cuda-bindings is not installed")
    from tests.memory.machines import FAKE_MB, LIBRARY, FakeCuda, build_fakecuda

    path = build_fakecuda(tmp_path_factory.mktemp("fakecuda"))
    os.environ[LIBRARY], os.environ["FAKECUDA_MB"] = str(path), str(FAKE_MB)
    return FakeCuda(str(path))
