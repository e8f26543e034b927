"""One child of a fleet and its thread: started, watched, and restarted after a delay that grows each time.

    starting ──ready──► ready ──ends──► down ──back-off──► starting ...
        └─────────ends, or is too slow───┘ └─ never ready, and another start would not help ──► failed

A child that was ready once is restarted for ever. One that never was ready has a wrong option or does not fit the
machine. It is given up at once when its command line is wrong or Polder in it has refused a setting, else when two
starts end in the same way, or after some attempts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from polder.errors import EnvironmentFault
from polder.serve.process import ManagedProcess, ProcessSpec

__all__ = ["Backoff", "Child", "ChildStatus", "Event"]

TEND_S = 60.0  # between looks at the log of a child that runs
NO_USE = (2, 126, 127)
"""Exit codes of a wrong command line, a program that may not be run, and one that is not there."""
FIRST_START_S = 30.0
"""What a start is taken to last until one was measured."""


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """Times in seconds."""

    first_s: float = 1.0
    most_s: float = 30.0
    healthy_s: float = 60.0
    """After so long in the state ready, the next death counts as the first again."""
    attempts: int = 3
    """Starts that a child gets before it was ready for the first time."""
    start_timeout_s: float = 1800.0

    def next(self, before_s: float) -> float:
        return min(2 * before_s, self.most_s) if before_s else self.first_s


@dataclass(frozen=True, kw_only=True)
class ChildStatus:
    name: str
    state: str
    """"starting", "ready", "down" (restarted after its back-off) or "failed" (given up)."""
    pid: int | None
    """None while it does not run."""
    restarts: int
    retry_in_s: float
    """Until the next start; 0 unless it is down."""
    last_exit: str
    """Why it ended the last time; empty if it never ended."""
    ready_in_s: float = 0.0
    """Until it is probably ready, by the time that its last start took; 0 when it is."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a child. `kind`: started, loading, ready, silent, ended, failed, stopped."""

    child: str
    kind: str
    pid: int | None
    detail: str
    """One line; for a death of which the log does not tell the cause also the end of its log."""


class Child:
    """One child and its thread. Other threads only read."""

    def __init__(
        self,
        spec: ProcessSpec,
        report: Callable[[Event], None],
        backoff: Backoff,
        gate: threading.BoundedSemaphore,
    ) -> None:
        """`gate`: held while a child loads."""
        self.process = ManagedProcess(spec)
        self._thread = threading.Thread(target=self._run, name=f"polder-{spec.name}", daemon=True)
        self._report, self._backoff, self._gate = report, backoff, gate
        self._stopping = threading.Event()
        self._state = "starting"
        self._starts = 0
        self._retry_at = 0.0
        self._last_exit = ""
        self._started_at = 0.0
        self._takes_s = FIRST_START_S

    def start(self) -> None:
        self._thread.start()

    @property
    def url(self) -> str | None:
        """Where it serves; None while it does not."""
        return self.process.url if self._state == "ready" else None

    def status(self) -> ChildStatus:
        state, now = self._state, time.monotonic()
        begins_at = self._started_at if state == "starting" and self._started_at else max(now, self._retry_at)
        return ChildStatus(
            name=self.process.spec.name,
            state=state,
            pid=self.process.pid if self.process.alive() else None,
            restarts=max(0, self._starts - 1),
            retry_in_s=max(0.0, self._retry_at - now) if state == "down" else 0.0,
            ready_in_s=0.0 if state == "ready" else max(0.0, begins_at + self._takes_s - now),
            last_exit=self._last_exit,
        )

    def ask_to_stop(self) -> None:
        """Returns at once."""
        self._stopping.set()

    def stop(self, grace_s: float) -> None:
        """Ends the process and the thread: SIGTERM, after `grace_s` SIGKILL."""
        self.ask_to_stop()
        self.process.stop(grace_s)
        while self._thread.is_alive():
            self._thread.join(0.1)
            self.process.stop(0.0)  # it was just being started

    def _run(self) -> None:
        wait_s, was_ready, before = 0.0, False, ""
        while not self._stopping.is_set():
            fault = self._start()
            ready_at = time.monotonic()
            if fault is None:
                self._takes_s = ready_at - self._started_at
                was_ready, self._state = True, "ready"
                self._say("ready", f"ready after {self._takes_s:.1f} s")
                self._wait()
                fault = f"ended with code {self.process.returncode}{self.process.why()}"
            if self._stopping.is_set():
                break
            self._last_exit = fault.partition("\n")[0]
            given_up = "" if was_ready else self._given_up(fault, before)
            if given_up:
                self._state = "failed"
                self._say("failed", given_up)
                return
            before = fault
            if time.monotonic() - ready_at >= self._backoff.healthy_s:
                wait_s = 0.0
            wait_s = self._backoff.next(wait_s)
            self._retry_at = time.monotonic() + wait_s
            self._state = "down"
            self._say("ended", f"{fault}\nstarting again in {wait_s:g} s")
            self._stopping.wait(wait_s)
        self._state = "down"
        self._say("stopped", "stopped")

    def _given_up(self, fault: str, before: str) -> str:
        """Why it is not started again, if it is not."""
        if refusal := self.process.refusal():
            return refusal
        if self.process.returncode in NO_USE:
            return fault
        if fault == before:
            return f"given up after {self._starts} starts with the same end: {fault}"
        return f"given up after {self._starts} starts: {fault}" if self._starts >= self._backoff.attempts else ""

    def _wait(self) -> None:
        """Returns when the child has ended. Ends it when it has not answered for as long as its spec allows, or never
        will again."""
        silent_s = self.process.spec.silent_s
        answered_at = time.monotonic()
        while not self.process.wait(TEND_S if silent_s is None else silent_s / 10):
            self.process.tend()
            fault = ""
            try:
                if silent_s is None or self.process.ready():
                    answered_at = time.monotonic()
                elif time.monotonic() - answered_at > silent_s:
                    fault = f"it has not answered for {silent_s:g} s"
            except EnvironmentFault as error:
                fault = str(error)
            if fault and not self._stopping.is_set():
                self._say("silent", f"{fault}: ending it")
                self.process.stop(grace_s=0.0)

    def _start(self) -> str | None:
        """Starts it and waits until it is ready. Returns what went wrong, if anything did."""
        while not self._gate.acquire(timeout=0.2):
            if self._stopping.is_set():
                return "stopped"
        try:
            if self._stopping.is_set():
                return "stopped"
            self._state, self._started_at = "starting", time.monotonic()
            self._starts += 1
            self.process.start()
            self._say("started", f"started as process {self.process.pid}")
            self.process.wait_ready(self._backoff.start_timeout_s, self._beat)
        except EnvironmentFault as error:
            self.process.stop(grace_s=5.0)
            return str(error)
        finally:
            self._gate.release()
        return None

    def _beat(self, seconds: float) -> None:
        line = self.process.last_line()[:100]
        self._say("loading", f"loading for {seconds:.0f} s{f': {line}' if line else ''}")

    def _say(self, kind: str, detail: str) -> None:
        pid = self.process.pid if kind in ("started", "ready") else None
        self._report(Event(child=self.process.spec.name, kind=kind, pid=pid, detail=detail))
