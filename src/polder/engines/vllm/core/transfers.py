"""What the core asks of the tiers: whether their jobs read or write blocks now, and that no new ones begin."""

from __future__ import annotations

from typing import Any

from polder.broker.wire import Neighbours
from polder.engines.vllm.core.preemption import last_loaded, unload
from polder.engines.vllm.core.subsystem import Subsystem
from polder.planner.rates import PrefillRate

__all__ = ["TierTransfers", "Transfers"]

PATIENCE_STEPS = 16
"""In which nothing runs and nothing is loaded, before a request that waits with loaded KV gives it up. A request that
can run does so within two, or three under asynchronous scheduling."""


class Transfers(Subsystem):
    """An engine without tiers: no block is ever on its way."""

    def __init__(self) -> None:
        self.prefill = PrefillRate()
        """Measured by the core, and used by the tiers' gate."""

    @property
    def busy(self) -> bool:
        """Whether a job reads or writes blocks. These blocks must not move."""
        return False

    def hold(self) -> None:
        """No new jobs. The engine keeps stepping until the last one has ended."""

    def resume(self) -> None:
        """Ends `hold`."""


class TierTransfers(Transfers):
    def __init__(self, manager: Any, scheduler: Any) -> None:
        """`manager`: the TierManager; its module imports vLLM, which this one does not need."""
        self._manager, self._tiers, self._scheduler = manager, manager.tiers, scheduler
        self.prefill = self._tiers.prefill
        self._stuck_steps = 0

    @property
    def busy(self) -> bool:
        return bool(self._tiers.busy)

    def hold(self) -> None:
        self._tiers.hold()

    def resume(self) -> None:
        self._tiers.resume()

    def on_neighbours(self, message: Neighbours) -> None:
        self._manager.on_neighbours(message)

    def between_steps(self, now: float) -> None:
        """Requests that wait with loaded KV, each for room that the others hold, would wait for ever: the last one
        gives its own up."""
        scheduler = self._scheduler
        waits = not scheduler.running and not self.busy and scheduler._pause_state.name == "UNPAUSED"
        loaded = last_loaded(scheduler) if waits else None
        self._stuck_steps = self._stuck_steps + 1 if loaded else 0
        if self._stuck_steps > PATIENCE_STEPS:
            unload(scheduler, loaded)
            self._stuck_steps = 0

    def on_tick(self, now: float) -> None:
        self._manager.retry_lenders(now)

    def stats(self, now: float) -> dict[str, float]:
        found: dict[str, float] = self._tiers.stats()
        return found

    def check_integrity(self) -> None:
        self._tiers.check_integrity()
