"""Who used the CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from polder.bench.harness.machine import CpuTime, cpu_time

BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"


def test_children_are_ones_own() -> None:
    before = cpu_time()
    with subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        after = cpu_time()
        child.kill()
    assert after.own_s - before.own_s >= 0.25


def test_time_of_others_is_what_was_not_ones_own_or_was_stolen() -> None:
    before = CpuTime(busy_s=10, own_s=4, stolen_s=1)
    assert CpuTime(busy_s=20, own_s=11, stolen_s=1.5).foreign_since(before) == pytest.approx(3.5)
    assert CpuTime(busy_s=20, own_s=14.02, stolen_s=1).foreign_since(before) == 0, (
        "ticks are rounded, time is not negative"
    )
