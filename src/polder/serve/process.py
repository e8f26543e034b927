"""Child processes that end at `stop`, when they fail, and when their parent dies for any reason.

Each child runs under a guard (guard.py). The guard ends only when no descendant of the child is left, so waiting for
the guard is waiting for the whole tree.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from polder.errors import EnvironmentFault
from polder.serve import guard
from polder.serve.logs import Log

__all__ = ["PORT", "ManagedProcess", "ProcessSpec", "free_port"]

ORPHANED_GRACE_S = 10.0  # after our own death: between SIGTERM and SIGKILL to the child
SWEEP_S = 10.0  # the guard's time to kill a tree
BEAT_S = 15.0
"""A child that is waited for is spoken of so often."""
PORT = "{port}"
"""Stands in a spec for a port that is chosen anew for each start: another process may have taken the former one."""
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
    """Answers 200 when the process is ready. None: ready as soon as it runs, or when `is_ready` says so. May have PORT
    in it, as `argv` may."""
    is_ready: Callable[[], bool] | None = None
    """Asked in addition, once the health URL answers. Raises EnvironmentFault when it will never be ready."""
    silent_s: float | None = None
    """A child that was ready and has not answered for so long is ended and restarted. None: it is restarted only when
    it ends."""
    prepare: Callable[[], None] | None = None
    """Called before each start. Raises EnvironmentFault."""


class ManagedProcess:
    """One child with all its descendants. `stop` may be called from any thread, also while another is in
    `wait_ready`."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self._process: subprocess.Popen[bytes] | None = None
        self._log = Log(spec.log_path) if spec.log_path else None
        self._port = ""
        self._lock = threading.Lock()

    @property
    def pid(self) -> int:
        """Process, session and group id of the child's guard."""
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def url(self) -> str | None:
        """Where it serves, since its last start; None without a health URL."""
        url = self.spec.health_url
        return url.replace(PORT, self._port).removesuffix("/health") if url is not None else None

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
        if self.spec.prepare is not None:
            self.spec.prepare()
        if PORT in self.spec.argv:
            self._port = str(free_port())
        argv = (self._port if word == PORT else word for word in self.spec.argv)
        command = (sys.executable, "-I", "-S", guard.__file__, str(os.getpid()), str(ORPHANED_GRACE_S), *argv)
        try:
            with contextlib.ExitStack() as stack:
                log = stack.enter_context(self._log.begin()) if self._log else None
                self._process = subprocess.Popen(
                    command,
                    # Modules are never taken from the working directory, which may have a queue.py or a token.py.
                    env={**os.environ, "PYTHONSAFEPATH": "1", **self.spec.env},
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
        if self.url is None:
            return True
        try:
            with _direct.open(f"{self.url}/health", timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError, ValueError):
            return False

    def wait_ready(self, timeout_s: float, beat: Callable[[float], None] = lambda _: None) -> None:
        """Returns when it is ready. Raises EnvironmentFault with the cause when it dies first or takes too long, and
        whatever `is_ready` raises. Calls `beat` with the seconds so far now and then."""
        began = beat_at = time.monotonic()
        while not self.ready():
            now = time.monotonic()
            if not self.alive():
                raise EnvironmentFault(
                    f"{self.spec.name} ended with code {self.returncode} before it was ready{self.why()}"
                )
            if now > began + timeout_s:
                raise EnvironmentFault(f"{self.spec.name} was not ready after {timeout_s:g} s{self.why()}")
            if now > beat_at + BEAT_S:
                beat_at = now
                beat(now - began)
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

    def why(self) -> str:
        """The cause of its end in its log, as the end of an error message. Empty without a log."""
        return self._log.failure() if self._log else ""

    def refusal(self) -> str:
        """Polder's own error in the log, which would come again after a restart. Empty if there is none."""
        return self._log.refusal() if self._log else ""

    def last_line(self) -> str:
        return "".join(self._log.tail(1)) if self._log else ""

    def tend(self) -> None:
        """To be called now and then while it runs: keeps its log short."""
        if self._log:
            self._log.shorten()

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
