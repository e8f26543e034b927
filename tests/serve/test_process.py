"""Children end when they are told to, with their parent, and with everything they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from polder.errors import EnvironmentFault
from polder.serve.process import ManagedProcess, ProcessSpec
from polder.serve.supervisor import Supervisor

FAMILY = """
import subprocess, sys, time, signal
if {stubborn}: signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def spec(code: str, tmp_path: Path, name: str = "child") -> ProcessSpec:
    return ProcessSpec(name=name, argv=(sys.executable, "-c", code), log_path=tmp_path / f"{name}.log")


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("stubborn", [False, True])
def test_stop_ends_grandchildren_too(tmp_path: Path, stubborn: bool) -> None:
    process = ManagedProcess(spec(FAMILY.format(stubborn=stubborn), tmp_path))
    process.start()
    log = tmp_path / "child.log"
    wait_for(lambda: log.read_text().strip().isdecimal())
    grandchild = int(log.read_text())
    process.stop(grace_s=0.5)
    assert not process.alive()
    assert gone(grandchild)


def test_a_child_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from polder.serve.process import ManagedProcess, ProcessSpec
child = ManagedProcess(ProcessSpec(name="c", argv=(sys.executable, "-c", "import time; time.sleep(60)")))
child.start()
Path({str(tmp_path / "pid")!r}).write_text(str(child.pid))
time.sleep(60)
"""
    parent = subprocess.Popen([sys.executable, "-c", code])
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text() != "")
    child = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    wait_for(lambda: gone(child))


def test_a_child_that_dies_before_it_is_ready_shows_the_end_of_its_log(tmp_path: Path) -> None:
    bad = ProcessSpec(
        name="bad",
        argv=(sys.executable, "-c", "print('out of luck'); raise SystemExit(7)"),
        log_path=tmp_path / "bad.log",
        health_url="http://127.0.0.1:9/health",
    )
    process = ManagedProcess(bad)
    process.start()
    with pytest.raises(EnvironmentFault, match=r"(?s)ended with code 7.*out of luck"):
        process.wait_ready(10)
    process.stop()


def test_a_missing_program_is_named(tmp_path: Path) -> None:
    process = ManagedProcess(ProcessSpec(name="ghost", argv=("/no/such/program",), log_path=tmp_path / "ghost.log"))
    with pytest.raises(EnvironmentFault, match="(?s)ghost.*no/such/program"):
        process.start()
        wait_for(lambda: not process.alive())
        process.wait_ready(1)
    process.stop()


def test_a_death_is_reported_and_restarted_later_each_time(tmp_path: Path) -> None:
    now = 0.0
    lines: list[str] = []
    supervisor = Supervisor([spec("import time; time.sleep(60)", tmp_path)], lines.append, clock=lambda: now)
    process = supervisor.start("child")
    supervisor.poll()
    assert supervisor.status()[0].state == "ready"
    delays = []
    for _ in range(3):
        os.kill(process.pid, signal.SIGKILL)
        wait_for(lambda: not process.alive())
        supervisor.poll()
        assert supervisor.status()[0].state == "down"
        delays.append(supervisor.status()[0].retry_in_s)
        now += delays[-1] - 0.01
        supervisor.poll()
        assert not process.alive(), "not before its time"
        now += 0.02
        supervisor.poll()
        assert process.alive()
    assert delays == pytest.approx([1.0, 2.0, 4.0])
    assert supervisor.status()[0].restarts == 3
    assert sum("ended with" in line for line in lines) == 3
    supervisor.poll()
    now += 61.0  # healthy for a minute: the next death is the first again
    os.kill(process.pid, signal.SIGKILL)
    wait_for(lambda: not process.alive())
    supervisor.poll()
    assert supervisor.status()[0].retry_in_s == 1.0
    supervisor.stop()
