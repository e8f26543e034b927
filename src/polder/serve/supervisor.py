"""Keeps children alive: a death is reported at once and answered with a restart, later each time it repeats."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from polder.serve.process import ManagedProcess, ProcessSpec

__all__ = ["ChildStatus", "Supervisor"]

BACKOFF_FIRST_S = 1.0
BACKOFF_MOST_S = 30.0
HEALTHY_AFTER_S = 60.0  # so long up, and the next death counts as the first again


@dataclass(frozen=True, kw_only=True)
class ChildStatus:
    name: str
    state: str
    """"starting", "ready" or "down"."""
    pid: int | None
    restarts: int
    retry_in_s: float


class _Child:
    def __init__(self, spec: ProcessSpec) -> None:
        self.process = ManagedProcess(spec)
        self.restarts = 0
        self.backoff_s = BACKOFF_FIRST_S
        self.started_at = 0.0
        self.retry_at: float | None = None
        self.ready = False


class Supervisor:
    """Call `poll` a few times a second. All methods from one thread, which must live as long as the children."""

    def __init__(
        self,
        specs: list[ProcessSpec],
        report: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`report` gets one line for every start, death and restart."""
        self._children = {spec.name: _Child(spec) for spec in specs}
        self._report = report
        self._clock = clock

    def start(self, name: str) -> ManagedProcess:
        child = self._children[name]
        child.process.start()
        child.started_at, child.retry_at, child.ready = self._clock(), None, False
        return child.process

    def poll(self) -> None:
        """Notices deaths and readiness, restarts what is due."""
        now = self._clock()
        for name, child in self._children.items():
            if child.retry_at is not None:
                if now >= child.retry_at:
                    child.restarts += 1
                    self._report(f"{name}: restarting (restart {child.restarts})")
                    self.start(name)
            elif not child.process.alive():
                if now - child.started_at > HEALTHY_AFTER_S:
                    child.backoff_s = BACKOFF_FIRST_S
                code = child.process.returncode
                self._report(
                    f"{name}: ended with {code}; restarting in {child.backoff_s:g} s{child.process.log_tail(5)}"
                )
                child.process.stop(grace_s=0.0)  # whatever it started goes too
                child.retry_at, child.ready = now + child.backoff_s, False
                child.backoff_s = min(2 * child.backoff_s, BACKOFF_MOST_S)
            elif not child.ready and child.process.ready():
                child.ready = True
                self._report(f"{name}: ready after {now - child.started_at:.0f} s")

    def status(self) -> list[ChildStatus]:
        now = self._clock()
        found = []
        for name, child in self._children.items():
            state = "down" if child.retry_at is not None else "ready" if child.ready else "starting"
            found.append(
                ChildStatus(
                    name=name,
                    state=state,
                    pid=child.process.pid if state != "down" else None,
                    restarts=child.restarts,
                    retry_in_s=max(0.0, child.retry_at - now) if child.retry_at is not None else 0.0,
                )
            )
        return found

    def stop(self, grace_s: float = 15.0) -> None:
        """Ends all children and everything they started, side by side."""
        for child in self._children.values():
            child.process.terminate()
        for child in self._children.values():
            child.process.stop(grace_s)
