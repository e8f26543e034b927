"""What the parts of an engine core are told, and when.

ElasticCore has a list of subsystems. An event goes to each of them in the order of the list; what follows a call of
vLLM's goes in the reverse order, as with wrappers that lie around each other. All methods are called in the core's
thread. None has to be there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from polder.broker.wire import Neighbours, Welcome

__all__ = ["Subsystem", "UnitPages"]

UnitPages = Mapping[int, list[list[int]]]
"""Unit -> its pages, per rank."""


class Subsystem:
    # ------------------------------------------------------------------ within vLLM's scheduler (scheduler_events.py)

    def before_schedule(self) -> None:
        """The scheduler is about to make a step."""

    def after_schedule(self, output: Any) -> None:
        """`output`: the SchedulerOutput of the step, not yet launched."""

    def before_update(self, output: Any, runner_output: Any) -> None:
        """A step's result has come: `output` is the step as scheduled, `runner_output` what the workers answered."""

    def after_update(self, output: Any, outputs: Any) -> None:
        """`outputs`: what goes to the clients, by client."""

    def on_arrival(self, request: Any) -> None:
        """The scheduler has put a request into its queue: loads of its prefix may begin."""

    def on_admission(self, request: Any, hit_tokens: int) -> None:
        """The scheduler has looked a request's prefix up in the engine's own cache."""

    def on_preemption(self) -> None:
        """The scheduler preempts a request."""

    # ------------------------------------------------------------------ between two steps

    def on_reset(self) -> None:
        """The engine's own prefix cache has forgotten all, as a user has asked for."""

    def on_wake(self) -> None:
        """What the broker has sent is handled."""

    def on_neighbours(self, message: Neighbours) -> None:
        """Engines came to the broker, or left it."""

    def on_welcome(self, message: Welcome, *, new_broker: bool) -> None:
        """A new connection to the broker. `new_broker`: another process than before, which knows only what Hello
        said."""

    def on_step(self, steps: Sequence[tuple[int, float]], now: float) -> None:
        """`steps`: (tokens, seconds) of those that have ended since the last call."""

    def on_request(self, now: float) -> None:
        """A request has reached the engine core, also while the scheduler is paused: a sleeping model asks for its
        weights."""

    def between_steps(self, now: float) -> None:
        """After a step and after a request's arrival, when recalled memory was given back if it could be."""

    def on_tick(self, now: float) -> None:
        """After each event, before the demand is reported."""

    # ------------------------------------------------------------------ resizing

    def before_shrink(self) -> None:
        """Units are about to be given up."""

    def on_mapped(self, pages: UnitPages) -> None:
        """Units have pages, and their blocks are not in use yet."""

    def before_unmap(self, units: Sequence[int]) -> None:
        """Units have no blocks in use any more, and still have their pages."""

    # ------------------------------------------------------------------ at any time

    def stats(self, now: float) -> dict[str, float]:
        """Counters and gauges, as declared in polder.metrics."""
        return {}

    def check_integrity(self) -> None:
        """Raises an error unless the laws of docs/structures.md hold."""

    def close(self) -> None:
        """The engine ends."""
