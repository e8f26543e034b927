"""The fake driver itself: what it costs and what it has not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.memory.machines import build_fakecuda

SCRIPT = """
import ctypes, os, time
ctypes.CDLL(os.environ["FAKECUDA_LIBRARY"], mode=ctypes.RTLD_GLOBAL)
from polder.errors import OutOfPages
from polder.memory.cuda import CudaBackend
backend = CudaBackend(0, page_bytes=1 << 20)
started = time.perf_counter()
handles = backend.create(4)
print(time.perf_counter() - started)
try:
    backend.create(1)
except OutOfPages as error:
    print(error)
backend.close()
"""


@pytest.mark.parametrize("cost_us", [0, 20_000])
def test_a_small_device_with_small_pages_and_slow_calls(tmp_path: Path, cost_us: int) -> None:
    variables = {
        "FAKECUDA_LIBRARY": str(build_fakecuda(tmp_path)),
        "FAKECUDA_MB": "4",
        "FAKECUDA_GRANULARITY": str(1 << 20),
        "FAKECUDA_COST_US": f"cuMemCreate={cost_us},cuMemMap=5",
    }
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=os.environ | variables, capture_output=True, text=True, check=True
    )
    seconds, refusal = result.stdout.splitlines()
    assert float(seconds) >= 4 * cost_us * 1e-6
    assert refusal == "cuda:0: room for 0 of 1 pages"
