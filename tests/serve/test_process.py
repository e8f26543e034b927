"""Nothing that descends from a child outlives it, its stop, or its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from multiprocessing import shared_memory
from pathlib import Path

import pytest

from polder.errors import EnvironmentFault
from polder.serve.process import ManagedProcess, ProcessSpec, free_port
from polder.serve.specs import vllm_serve
from tests.serve.fakes import is_running, tree_argv, tree_pids, wait_for


def python(code: str, **options: object) -> ProcessSpec:
    return ProcessSpec(name="child", argv=(sys.executable, "-S", "-c", code), **options)  # type: ignore[arg-type]


def test_stop_ends_grandchildren_that_ignore_sigterm(tmp_path: Path) -> None:
    process = ManagedProcess(ProcessSpec(name="tree", argv=tree_argv(tmp_path)))
    process.start()
    pids = tree_pids(tmp_path)
    process.stop(grace_s=5.0)
    assert not process.alive()
    assert not [pid for pid in pids if is_running(pid)]


def test_a_child_that_ignores_sigterm_is_killed_after_the_grace(tmp_path: Path) -> None:
    flag = tmp_path / "up"
    process = ManagedProcess(
        python(f"import signal, time; signal.signal(15, signal.SIG_IGN); open({str(flag)!r}, 'w'); time.sleep(100)")
    )
    process.start()
    wait_for(flag.exists, "the child")
    before = time.monotonic()
    process.stop(grace_s=0.3)
    assert 0.3 <= time.monotonic() - before < 5
    assert process.returncode == 128 + signal.SIGKILL


def test_grandchildren_end_when_the_child_dies(tmp_path: Path) -> None:
    process = ManagedProcess(ProcessSpec(name="tree", argv=tree_argv(tmp_path)))
    process.start()
    pids = tree_pids(tmp_path)
    child = int(subprocess.check_output(["pgrep", "-P", str(process.pid)]))
    os.kill(child, signal.SIGKILL)
    process.wait()
    assert process.returncode == 128 + signal.SIGKILL
    assert not [pid for pid in pids if is_running(pid)]


def test_the_group_ends_when_the_guard_is_killed(tmp_path: Path) -> None:
    process = ManagedProcess(ProcessSpec(name="tree", argv=tree_argv(tmp_path)))
    process.start()
    same_session, own_session = tree_pids(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not process.alive()
    wait_for(lambda: not is_running(same_session), "the group to end")
    os.kill(own_session, signal.SIGKILL)  # out of reach without its guard: guard.py says so


def test_the_tree_ends_when_the_parent_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from polder.serve.process import ManagedProcess, ProcessSpec;"
        f"p = ManagedProcess(ProcessSpec(name='tree', argv={tree_argv(tmp_path)!r})); p.start(); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    pids = tree_pids(tmp_path)
    parent.kill()
    parent.wait()
    wait_for(lambda: not [pid for pid in pids if is_running(pid)], "the tree to end")


def test_a_death_before_readiness_fails_at_once_with_the_end_of_the_log(tmp_path: Path) -> None:
    spec = python(
        "print('bad option --frobnicate'); raise SystemExit(3)",
        log_path=tmp_path / "log",
        health_url=f"http://127.0.0.1:{free_port()}/health",
    )
    process = ManagedProcess(spec)
    process.start()
    with pytest.raises(EnvironmentFault, match=r"child ended with code 3 .*(?s:.*)--frobnicate"):
        process.wait_ready(30)
    process.stop()


def test_readiness_is_the_health_url(tmp_path: Path) -> None:
    port = free_port()
    (tmp_path / "health").touch()
    argv = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1", "--directory", str(tmp_path))
    process = ManagedProcess(
        ProcessSpec(name="http", argv=argv, log_path=tmp_path / "log", health_url=f"http://127.0.0.1:{port}/health")
    )
    process.start()
    try:
        process.wait_ready(20)
        (tmp_path / "health").unlink()
        assert not process.ready()
        with pytest.raises(EnvironmentFault, match="not ready after"):
            process.wait_ready(0.2)
    finally:
        process.stop()


def test_a_program_that_is_not_there_is_said(tmp_path: Path) -> None:
    process = ManagedProcess(ProcessSpec(name="x", argv=("/no/such/program",), log_path=tmp_path / "log"))
    process.start()
    process.wait()
    assert process.returncode == 127
    assert "cannot start /no/such/program" in process.why()


def test_shared_memory_that_a_tree_leaves_behind_is_removed(tmp_path: Path) -> None:
    """As an engine does that is stopped while it loads."""
    code = (
        "import time; from multiprocessing import resource_tracker, shared_memory\n"
        "mine = shared_memory.SharedMemory(create=True, size=4096); resource_tracker.unregister(mine._name, 'shared_memory')\n"
        "from multiprocessing import get_context; lock = get_context('spawn').Lock(); name = lock._semlock.name\n"
        "resource_tracker.unregister(name, 'semaphore')\n"
        f"open({str(tmp_path / 'new')!r}, 'w').write(f'{{mine.name}} sem.{{name[1:]}}')\n"
        f"import os; os.rename({str(tmp_path / 'new')!r}, {str(tmp_path / 'name')!r}); time.sleep(100)"
    )
    other = shared_memory.SharedMemory(create=True, size=4096)
    try:
        process = ManagedProcess(python(code))
        process.start()
        wait_for((tmp_path / "name").exists, "the child")
        left = [Path("/dev/shm", name) for name in (tmp_path / "name").read_text().split()]
        assert [path.exists() for path in left] == [True, True]
        process.stop()
        assert [path.exists() for path in left] == [False, False]
        assert Path("/dev/shm", other.name).exists(), "it is another's"
    finally:
        other.close()
        other.unlink()


def test_modules_never_come_from_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A queue.py, token.py or random.py beside a fleet file is nothing unusual."""
    for name in ("queue", "token", "random"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('shadowed')")
    monkeypatch.chdir(tmp_path)
    process = ManagedProcess(
        ProcessSpec(name="x", argv=(sys.executable, "-m", "polder.cli.main", "version"), log_path=tmp_path / "log")
    )
    process.start()
    assert process.wait(60)
    assert process.returncode == 0, process.why()


def test_vllm_serve_is_bound_to_loopback_and_keeps_the_extra_arguments_last() -> None:
    spec = vllm_serve("/m", name="chat", port=81, args=("--enforce-eager",), env={"A": "1"})
    text = " ".join(spec.argv)
    assert " serve /m --served-model-name chat --host 127.0.0.1 --port 81 " in text
    assert text.endswith("--enforce-eager")
    assert spec.health_url == "http://127.0.0.1:81/health"
