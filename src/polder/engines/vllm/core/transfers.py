"""What the core asks of the tiers: whether their jobs read or write blocks now, and that no new ones begin."""

from __future__ import annotations

from typing import Any

from polder.broker.wire import Neighbours
from polder.engines.vllm.core.subsystem import Subsystem
from polder.planner.rates import PrefillRate

__all__ = ["TierTransfers", "Transfers"]


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
    def __init__(self, manager: Any) -> None:
        """`manager`: the TierManager; its module imports vLLM, which this one does not need."""
        self._manager, self._tiers = manager, manager.tiers
        self.prefill = self._tiers.prefill

    @property
    def busy(self) -> bool:
        return bool(self._tiers.busy)

    def hold(self) -> None:
        self._tiers.hold()

    def resume(self) -> None:
        self._tiers.resume()

    def on_neighbours(self, message: Neighbours) -> None:
        self._manager.on_neighbours(message)

    def on_tick(self, now: float) -> None:
        self._manager.retry_lenders(now)

    def stats(self, now: float) -> dict[str, float]:
        found: dict[str, float] = self._tiers.stats()
        return found

    def check_integrity(self) -> None:
        self._tiers.check_integrity()
