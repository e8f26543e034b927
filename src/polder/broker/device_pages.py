"""The physical pages of a broker's budget, and which of them the devices have no memory for.

If a device is out of memory, or a file table is full, the Fetch that met it is refused and the engine gives its grant
back. Pages that could not be made are missing (ledger.py); they are tried again now and then.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from polder.broker.config import BrokerConfig
from polder.broker.ledger import Ledger
from polder.errors import ConfigError, OutOfPages
from polder.memory.devices import open_backend
from polder.memory.pool import PagePool
from polder.units import format_bytes

__all__ = ["DevicePages"]

logger = logging.getLogger("polder.broker")

MISSING_EVERY_S = 5.0
MISSING_AT_ONCE = 16  # pages made in one call; each takes 0.2 ms on an A100


class DevicePages:
    """One thread at a time: the broker's loop is its only caller."""

    def __init__(
        self, config: BrokerConfig, ledger: Ledger, reserve_bytes: Callable[[str], int], *, crashed_before: bool
    ) -> None:
        """`reserve_bytes(device)`: what engines there still need in their steps. `crashed_before`: engines of a former
        broker may hold a part of the budget.

        Raises ConfigError when a budget exceeds the free memory, OutOfPages when its pages cannot be made.
        """
        self._page_bytes, self._ledger, self._reserve_bytes = config.page_bytes, ledger, reserve_bytes
        self._backends = {device: open_backend(device, config.page_bytes) for device in config.devices}
        self._pools = {d: PagePool(self._backends[d], total) for d, total in config.total_pages().items()}
        self._again_at: dict[str, float] = {}  # device -> when to try again what there was no memory for
        for device, budget in config.devices.items():
            if not crashed_before:
                self._check_free(device, budget)
            logger.info("%s: %d pages, %s", device, self._pools[device].total_pages, format_bytes(budget))

    def _check_free(self, device: str, budget: int) -> None:
        free = self._backends[device].free_bytes()
        if free is None:
            return
        if budget > free:
            raise ConfigError(
                f"{device}: the budget of {format_bytes(budget)} is more than the {format_bytes(free)} that are free: lower "
                f"--device {device}=..., or kv_budget; the engines' own weights, contexts and graphs need room beside it"
            )
        logger.info("%s: %s beside the budget, for the engines themselves", device, format_bytes(free - budget))

    def export(self, device: str, pages: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """(fds, fd_index, offsets) as Backend.export_many gives them; the caller closes the fds.

        Raises OutOfPages when the device has no memory for all of them; its pages without memory are missing then.
        Raises the backend's errors.
        """
        try:
            self._check_room(device, pages)
            return self._pools[device].export(pages)
        except OutOfPages as error:
            self._withhold(device)
            raise OutOfPages(f"out of memory: {error}") from error

    def _check_room(self, device: str, pages: Sequence[int]) -> None:
        """Raises OutOfPages when making new pages would use memory that engines still need in their steps."""
        new = len(set(pages).intersection(self._pools[device].unmade()))
        free = self._backends[device].free_bytes() if new else None
        if free is not None and new * self._page_bytes > free - self._reserve_bytes(device):
            reserve = format_bytes(self._reserve_bytes(device))
            raise OutOfPages(f"{format_bytes(free)} are free, of which engines need {reserve} in their steps")

    def _withhold(self, device: str) -> None:
        unmade = self._pools[device].unmade()
        self._ledger.mark_missing(device, unmade)
        self._again_at[device] = time.monotonic() + MISSING_EVERY_S
        logger.warning(
            "%s has no memory for %s of its budget of %s; others use it. Lower --device %s=..., or end what else runs there",
            device,
            format_bytes(len(unmade) * self._page_bytes),
            format_bytes(self._pools[device].total_pages * self._page_bytes),
            device,
        )

    def make_missing(self, now: float) -> None:
        """Makes missing pages, if there is memory for them now: a few at a time, because the loop stands still
        meanwhile."""
        for device, due in list(self._again_at.items()):
            if now < due:
                continue
            missing = self._ledger.missing(device).tolist()
            free = self._backends[device].free_bytes()
            room = MISSING_AT_ONCE if free is None else (free - self._reserve_bytes(device)) // self._page_bytes
            made = self._pools[device].make(missing[: max(0, min(MISSING_AT_ONCE, room))])
            self._ledger.restore(device, made)
            if len(made) == len(missing):
                del self._again_at[device]
                logger.info("%s: there is memory for the whole budget again", device)
            elif len(made) < MISSING_AT_ONCE:
                self._again_at[device] = now + MISSING_EVERY_S

    def close(self) -> None:
        """Forgets all pages. Engines that hold some keep them."""
        for pool in self._pools.values():
            pool.close()
        for backend in self._backends.values():
            backend.close()
