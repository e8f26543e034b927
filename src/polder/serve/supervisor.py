"""Keeps child processes alive: a death is reported at once and answered with a restart, after a delay that grows each
time.

Each child has a thread, so that waiting for one (a model takes 20 s to minutes to load) delays neither the others nor
the gateway:

    starting ──ready──► ready ──ends──► down ──back-off──► starting ...
        └─────────ends, or is too slow───┘ └─ never ready in `attempts` starts ──► failed

A child that was ready once is restarted for ever. One that never was ready has a wrong option or does not fit the
machine: it is given up after some attempts, or at once with Polder's message when Polder in it has refused a setting.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from polder.broker.wire import Status
from polder.errors import EnvironmentFault
from polder.serve.process import ManagedProcess, ProcessSpec

__all__ = ["BROKER", "Backoff", "ChildStatus", "Event", "FleetStatus", "Supervisor"]


BROKER = "broker"
"""The name of the broker's process; all other children are models."""


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


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What GET /polder/status answers, and `polder top --json` prints."""

    broker: Status | None
    """None: the broker does not answer."""
    children: list[ChildStatus] = []
    """Empty where only the broker was asked."""


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened to a child. `kind`: started, ready, silent, ended, failed, stopped."""

    child: str
    kind: str
    pid: int | None
    detail: str
    """One line; for a death also the end of its log."""


class Supervisor:
    """Starts, restarts and ends children. `report` is called from the children's threads, in order for each child."""

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        report: Callable[[Event], None],
        *,
        backoff: Backoff | None = None,
        starts_at_once: int | None = None,
    ) -> None:
        """`starts_at_once`: how many children may load at the same time (None: all)."""
        self._backoff = backoff or Backoff()
        self._gate = threading.BoundedSemaphore(starts_at_once or max(1, len(specs)))
        self._stopping = threading.Event()
        self._children = [_Child(spec, report, self._backoff, self._gate, self._stopping) for spec in specs]

    def start(self) -> None:
        for child in self._children:
            child.thread.start()

    def status(self) -> list[ChildStatus]:
        return [child.status() for child in self._children]

    def stop(self, grace_s: float = 15.0) -> None:
        """Ends all children at the same time: SIGTERM, after `grace_s` SIGKILL. Returns when none of their processes is
        left."""
        self._stopping.set()
        started = [child for child in self._children if child.thread.ident is not None]
        stops = [threading.Thread(target=child.stop, args=(grace_s,)) for child in started]
        for stop in stops:
            stop.start()
        for stop in stops:
            stop.join()


class _Child:
    """One child and its thread. Other threads only read."""

    def __init__(
        self,
        spec: ProcessSpec,
        report: Callable[[Event], None],
        backoff: Backoff,
        gate: threading.BoundedSemaphore,
        stopping: threading.Event,
    ) -> None:
        self.process = ManagedProcess(spec)
        self.thread = threading.Thread(target=self._run, name=f"polder-{spec.name}", daemon=True)
        self._report, self._backoff, self._gate, self._stopping = report, backoff, gate, stopping
        self._state = "starting"
        self._starts = 0
        self._retry_at = 0.0
        self._last_exit = ""
        self._started_at = 0.0
        self._takes_s = FIRST_START_S

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

    def stop(self, grace_s: float) -> None:
        """Ends the process and the thread. The supervisor's `stopping` is set."""
        self.process.stop(grace_s)
        while self.thread.is_alive():
            self.thread.join(0.1)
            self.process.stop(0.0)  # it was just being started

    def _run(self) -> None:
        wait_s, was_ready = 0.0, False
        while not self._stopping.is_set():
            fault = self._start()
            ready_at = time.monotonic()
            if fault is None:
                self._takes_s = ready_at - self._started_at
                was_ready, self._state = True, "ready"
                self._say("ready", f"ready after {self._takes_s:.1f} s")
                self._wait()
                fault = f"ended with code {self.process.returncode}{self.process.log_tail()}"
            if self._stopping.is_set():
                break
            self._last_exit = fault.partition("\n")[0]
            refusal = "" if was_ready else self.process.refusal()
            if refusal or (not was_ready and self._starts >= self._backoff.attempts):
                self._state = "failed"
                self._say("failed", refusal or f"given up after {self._starts} starts: {fault}")
                return
            if time.monotonic() - ready_at >= self._backoff.healthy_s:
                wait_s = 0.0
            wait_s = self._backoff.next(wait_s)
            self._state, self._retry_at = "down", time.monotonic() + wait_s
            self._say("ended", f"{fault}\nstarting again in {wait_s:g} s")
            self._stopping.wait(wait_s)
        self._state = "down"
        self._say("stopped", "stopped")

    def _wait(self) -> None:
        """Returns when the child has ended. Ends it when it has not answered for as long as its spec allows."""
        silent_s = self.process.spec.silent_s
        if silent_s is None:
            self.process.wait()
            return
        answered_at = time.monotonic()
        while not self.process.wait(silent_s / 10):
            if self.process.ready():
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at > silent_s:
                self._say("silent", f"it has not answered for {silent_s:g} s: ending it")
                self.process.stop(grace_s=0.0)

    def _start(self) -> str | None:
        """Starts it and waits until it is ready. Returns what went wrong, if anything did."""
        with self._gate:
            if self._stopping.is_set():
                return "stopped"
            self._state, self._started_at = "starting", time.monotonic()
            self._starts += 1
            try:
                self.process.start()
                self._say("started", f"started as process {self.process.pid}")
                self.process.wait_ready(self._backoff.start_timeout_s)
            except EnvironmentFault as error:
                self.process.stop(grace_s=5.0)
                return str(error)
        return None

    def _say(self, kind: str, detail: str) -> None:
        pid = self.process.pid if kind in ("started", "ready") else None
        self._report(Event(child=self.process.spec.name, kind=kind, pid=pid, detail=detail))
