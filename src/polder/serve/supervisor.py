"""The children of a fleet. They may be added and removed at any time.

Each has a thread of its own, so that waiting for one (a model takes 20 s to minutes to load) delays neither the others
nor the gateway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import msgspec

from polder.broker.wire import Status
from polder.errors import UsageError
from polder.serve.child import Backoff, Child, ChildStatus, Event
from polder.serve.process import ProcessSpec

__all__ = ["BROKER", "FleetStatus", "Supervisor"]


BROKER = "broker"
"""The name of the broker's process; all other children are models."""


class FleetStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What GET /polder/status answers, and `polder top --json` prints."""

    broker: Status | None
    """None: the broker does not answer."""
    children: list[ChildStatus] = []
    """Empty where the broker runs without `polder serve`."""


class Supervisor(Mapping[str, "str | None"]):
    """Starts, restarts and ends children. A mapping from their names to where they serve, None while they do not.

    `report` is called from the children's threads, in order for each child.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        report: Callable[[Event], None],
        *,
        backoff: Backoff | None = None,
        starts_at_once: int | None = None,
    ) -> None:
        """`starts_at_once`: how many children may load at the same time (None: all)."""
        self._report, self._backoff = report, backoff or Backoff()
        self._gate = threading.BoundedSemaphore(starts_at_once or 1000)
        self._changing = threading.Lock()
        self._stopped = False
        self._children = {spec.name: self._new(spec) for spec in specs}

    def __getitem__(self, name: str) -> str | None:
        return self._children[name].url

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._children))

    def __len__(self) -> int:
        return len(self._children)

    def start(self) -> None:
        for child in self._children.values():
            child.start()

    def add(self, spec: ProcessSpec) -> None:
        """Starts one more, or one that was given up. Raises UsageError when there is one of that name."""
        with self._changing:
            if self._stopped:
                raise UsageError("the fleet is being ended")
            former = self._children.get(spec.name)
            if former is not None and former.status().state != "failed":
                raise UsageError(f"{spec.name} runs already: restart it, or remove it first")
            self._children = {**self._children, spec.name: self._new(spec)}
            self._children[spec.name].start()

    def remove(self, name: str, grace_s: float = 15.0) -> None:
        """Returns when none of its processes is left. Raises UsageError when there is none of that name."""
        child = self._child(name)
        with self._changing:
            self._children = {other: kept for other, kept in self._children.items() if other != name}
        child.stop(grace_s)

    def replace(self, spec: ProcessSpec, grace_s: float = 15.0) -> None:
        """Ends the child of this name and starts another in its place. Raises UsageError when there is none, or when
        another order has changed it meanwhile."""
        former = self._child(spec.name)
        former.stop(grace_s)
        with self._changing:
            if self._stopped:
                raise UsageError("the fleet is being ended")
            if self._children.get(spec.name) is not former:
                raise UsageError(f"{spec.name} was restarted or removed by another order at the same time")
            self._children = {**self._children, spec.name: self._new(spec)}
            self._children[spec.name].start()

    def status(self) -> list[ChildStatus]:
        return [child.status() for child in self._children.values()]

    def stop(self, grace_s: float = 15.0) -> None:
        """Ends all children at the same time: SIGTERM, after `grace_s` SIGKILL. Returns when none of their processes is
        left."""
        with self._changing:
            self._stopped = True
            for child in self._children.values():
                child.ask_to_stop()
            stops = [threading.Thread(target=child.stop, args=(grace_s,)) for child in self._children.values()]
            for stop in stops:
                stop.start()
            for stop in stops:
                stop.join()

    def _child(self, name: str) -> Child:
        child = self._children.get(name)
        if child is None:
            raise UsageError(f"no model {name!r} runs here; there are {', '.join(self._children)}")
        return child

    def _new(self, spec: ProcessSpec) -> Child:
        return Child(spec, self._report, self._backoff, self._gate)
