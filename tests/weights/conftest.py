from __future__ import annotations

from collections.abc import Iterator

import pytest

from polder.emulation.backends import FaultyBackend
from polder.memory.cpu import CpuBackend
from tests.weights.models import PAGE, Model


@pytest.fixture
def backend(no_fd_leak: None) -> Iterator[FaultyBackend]:
    backend = FaultyBackend(CpuBackend(page_bytes=PAGE))
    yield backend
    assert backend.resident_bytes() == 0, "physical memory was left behind"
    backend.close()


@pytest.fixture
def model(backend: FaultyBackend) -> Iterator[Model]:
    model = Model(backend, 8)
    yield model
    backend.forgive()
    model.close()
