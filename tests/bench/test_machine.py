"""Who used the CPU."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from polder.bench.harness import machine
from polder.bench.harness.machine import foreign_cpu_s, own_cpu_s

BURN = "import time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\ntime.sleep(60)"


def test_children_are_ones_own() -> None:
    before = own_cpu_s()
    with subprocess.Popen([sys.executable, "-c", BURN], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        after = own_cpu_s()
        child.kill()
    assert after - before >= 0.25


def test_time_of_others_is_what_was_not_ones_own_and_what_was_stolen(monkeypatch: pytest.MonkeyPatch) -> None:
    times = SimpleNamespace(user=20.0, nice=1.0, system=2.0, irq=0.5, softirq=0.5, steal=3.0, idle=100.0, iowait=7.0)
    monkeypatch.setattr(machine.psutil, "cpu_times", lambda: times)
    monkeypatch.setattr(machine, "own_cpu_s", lambda: 10.0)
    assert foreign_cpu_s() == 17.0
