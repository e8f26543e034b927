"""Shared by all tests: nothing a test starts may outlive it."""

from __future__ import annotations

import contextlib
import gc
import os
import re
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import settings

# A time limit for each example says how loaded the machine is, and nothing of the code.
settings.register_profile("polder", deadline=None)
settings.load_profile("polder")
TIMES = int(os.environ.get("POLDER_EXAMPLES", "1"))

if TYPE_CHECKING:
    from tests.memory.machines import FakeCuda


def examples(count: int, *, steps: int = 50, **more: Any) -> settings:
    """So many examples of a property, each of at most `steps` steps. In a run by hand POLDER_EXAMPLES times as many."""
    return settings(max_examples=count * TIMES, stateful_step_count=steps, **more)


class SharedFiles:
    """Several runs of pytest share the files of one list: who comes to a file first runs it, the others pass over it.

    `folder` is empty when the first of them starts.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._ours: dict[Path, bool] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Long files first: they tend to take long, and whoever has the last one runs alone."""
        items.sort(key=lambda item: -item.path.stat().st_size)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
        if self._takes(item.path):
            return None
        item.session._setupstate.teardown_exact(nextitem)  # what is left of the file before
        return True

    def _takes(self, path: Path) -> bool:
        if path not in self._ours:
            try:
                (self._folder / sha256(bytes(path)).hexdigest()).touch(exist_ok=False)
                self._ours[path] = True
            except FileExistsError:
                self._ours[path] = False
        return self._ours[path]


def pytest_configure(config: pytest.Config) -> None:
    """A run that is told to end tears its fixtures down, engines included, as one that fails does.

    Runs with the same folder in POLDER_SHARED_FILES share their files (scripts/test).
    """

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if folder := os.environ.get("POLDER_SHARED_FILES"):
        config.pluginmanager.register(SharedFiles(Path(folder)))


@pytest.fixture(scope="module", autouse=True)
def old_objects_are_not_searched() -> None:
    """A collection looks at what a module's own tests have made, not at all of torch and vLLM: seconds for each call."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for a Unix socket's 107 bytes."""
    path = Path(tempfile.mkdtemp(prefix="pt-", dir="/tmp"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


@pytest.fixture
def no_fd_leak() -> Iterator[None]:
    """No memory, socket, process or file is left open. What Python and hypothesis open for themselves when they first need it
    (/dev/urandom, the folder of examples) does not count."""
    before = _descriptors()
    yield
    gc.collect()
    new = _descriptors() - before
    assert not new, f"descriptors leaked: {dict(new)}"


def _descriptors() -> Counter[str]:
    """How many descriptors of each kind this process has, as /proc names them, without numbers."""
    found: Counter[str] = Counter()
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found[re.sub(r"\d+", "", os.readlink(f"/proc/self/fd/{fd}"))] += 1
    return Counter(
        {kind: n for kind, n in found.items() if "hypothesis" not in kind and kind not in ("/dev/urandom", "/dev/null")}
    )


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
