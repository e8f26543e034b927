"""Child processes that end at `stop`, when they fail, and when their parent dies for any reason.

Each child runs under a guard (guard.py). The guard ends only when no descendant of the child is left, so waiting for
the guard is waiting for the whole tree.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from polder.errors import EnvironmentFault
from polder.serve import guard

__all__ = ["ManagedProcess", "ProcessSpec", "free_port", "vllm_serve"]

ORPHANED_GRACE_S = 10.0  # after our own death: between SIGTERM and SIGKILL to the child
SWEEP_S = 10.0  # the guard's time to kill a tree
TAIL_BYTES = 64 << 10
_LOG_BYTES = 4 << 20
_REFUSAL = re.compile(r"polder\.errors\.(?:ConfigError|UnsupportedVersion): (.*)")
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is never reached through a proxy


@dataclass(frozen=True, kw_only=True)
class ProcessSpec:
    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    """Added to the parent's environment."""
    log_path: Path | None = None
    """Both outputs are appended to it; None: the parent's own."""
    health_url: str | None = None
    """Answers 200 when the process is ready. None: ready as soon as it runs, or when `is_ready` says so."""
    is_ready: Callable[[], bool] | None = None
    """Asked in addition, once the health URL answers. Raises EnvironmentFault when it will never be ready."""
    silent_s: float | None = None
    """A child that was ready and has not answered for so long is ended and restarted. None: it is restarted only when
    it ends."""


class ManagedProcess:
    """One child with all its descendants. `stop` may be called from any thread, also while another is in
    `wait_ready`."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._log_from = 0  # bytes of the log before this start
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Process, session and group id of the child's guard."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None before the start and while any process of the tree runs; 128 + N when signal N ended it."""
        if self._process is None:
            return None
        with self._lock:
            if self._process.returncode is None and _has_ended(self._process.pid):
                # A guard that was killed leaves its group behind. Its id is not reaped yet, so no other process has it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
            code = self._process.returncode
        return 128 - code if code is not None and code < 0 else code

    def alive(self) -> bool:
        return self._process is not None and self.returncode is None

    def wait(self, timeout_s: float | None = None) -> bool:
        """True when it has ended, False when the time is over."""
        if self._process is None:
            return True
        try:
            pidfd = os.pidfd_open(self._process.pid)
        except ProcessLookupError:  # reaped by another thread
            return True
        try:
            return bool(select.select([pidfd], [], [], timeout_s)[0])
        finally:
            os.close(pidfd)

    def start(self) -> None:
        """Starts it, also again after it has ended. Raises EnvironmentFault when it cannot be started."""
        assert not self.alive(), "already running"
        command = (sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(ORPHANED_GRACE_S), *self.spec.argv)
        try:
            with contextlib.ExitStack() as stack:
                log = stack.enter_context(self.spec.log_path.open("ab")) if self.spec.log_path else None
                self._log_from = log.tell() if log is not None else 0
                self._process = subprocess.Popen(
                    command,
                    env={**os.environ, **self.spec.env},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT if log else None,
                    # A process group, so that it can be killed, and not a session: Linux schedules each session as a
                    # unit
                    # (autogroup), and on one core one of two sessions got no time for 29 s (docs/log.md).
                    process_group=0,
                )
        except OSError as error:
            raise EnvironmentFault(f"cannot start {self.spec.name}: {error}") from error

    def ready(self) -> bool:
        """Whether its health URL answers now and `is_ready` agrees. Blocks for 2 s at most, plus the time of
        `is_ready`."""
        if not self._healthy() or not self.alive():
            return False
        return self.spec.is_ready is None or self.spec.is_ready()

    def _healthy(self) -> bool:
        if self.spec.health_url is None:
            return True
        try:
            with _direct.open(self.spec.health_url, timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError, ValueError):
            return False

    def wait_ready(self, timeout_s: float) -> None:
        """Returns when it is ready. Raises EnvironmentFault with the end of its log when it dies first or takes too
        long, and whatever `is_ready` raises."""
        deadline = time.monotonic() + timeout_s
        while not self.ready():
            if not self.alive():
                raise EnvironmentFault(
                    f"{self.spec.name} ended with code {self.returncode} before it was ready{self.log_tail()}"
                )
            if time.monotonic() > deadline:
                raise EnvironmentFault(f"{self.spec.name} was not ready after {timeout_s:g} s{self.log_tail()}")
            time.sleep(0.1)

    def terminate(self) -> None:
        """Asks it to end; returns at once."""
        self._signal(signal.SIGTERM)

    def stop(self, grace_s: float = 15.0) -> None:
        """SIGTERM, after `grace_s` SIGKILL to the tree. Returns when nothing of it is left; harmless when it does not
        run."""
        self.terminate()
        if not self._ended_within(grace_s):
            self._signal(signal.SIGQUIT)
            if not self._ended_within(SWEEP_S):
                self._signal(signal.SIGKILL)
                self._ended_within(SWEEP_S)

    def log_tail(self, lines: int = 15) -> str:
        """The last lines of the log, as the end of an error message. Empty without a log."""
        path = self.spec.log_path
        if path is None or not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            text = file.read().decode(errors="replace")
        return f". The end of {path}:\n" + "\n".join(text.splitlines()[-lines:])

    def refusal(self) -> str:
        """Polder's own error in the child's log, which would come again after a restart. Empty if there is none."""
        path = self.spec.log_path
        if path is None or not path.exists():
            return ""
        with path.open("rb") as file:
            file.seek(self._log_from)
            found = _REFUSAL.search(file.read(_LOG_BYTES).decode(errors="replace"))
        return found[1].strip() if found else ""

    def _signal(self, number: signal.Signals) -> None:
        if self.alive():
            with self._lock:
                assert self._process is not None
                if self._process.returncode is None:  # else its id may belong to another process by now
                    os.kill(self._process.pid, number)

    def _ended_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.alive():
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.02)
        return True


def _has_ended(pid: int) -> bool:
    """Whether the child process has ended. Does not reap it."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def free_port() -> int:
    """A TCP port of the loopback interface that is free at this moment."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def vllm_serve(
    model_path: Path | str,
    *,
    name: str,
    port: int,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cpus: str = "",
    log_path: Path | None = None,
) -> ProcessSpec:
    """`vllm serve` on loopback: the model at `model_path` under the name `name`, on the cores `cpus` (empty: all)."""
    command = Path(sys.executable).with_name("vllm")
    program = (str(command),) if command.exists() else (sys.executable, "-m", "vllm.entrypoints.cli.main")
    own = {"--served-model-name": name, "--host": "127.0.0.1", "--port": str(port)}
    options = [word for option in own.items() for word in option]
    # A log line for each request would grow without bound.
    options.append("--disable-uvicorn-access-log")
    pinned = ("taskset", "--cpu-list", cpus) if cpus else ()
    return ProcessSpec(
        name=name,
        argv=(*pinned, *program, "serve", str(model_path), *options, *args),
        env=dict(env or {}),
        log_path=log_path,
        health_url=f"http://127.0.0.1:{port}/health",
    )
