"""Which engines lend to this one. Their tables are fetched from the broker by a thread, so that the engine never waits
for it."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping

from polder.broker.wire import Neighbours
from polder.errors import PolderError
from polder.tiers.peer.borrowing import PeerSlots
from polder.tiers.peer.lending import LendingTable

__all__ = ["Lenders"]

logger = logging.getLogger("polder.engine")

RETRY_EVERY_S = 1.0


class Lenders:
    """Keeps `peers` attached to the engines that lend. All methods belong to the core's thread."""

    def __init__(self, peers: PeerSlots, own_name: str, fetch: Callable[[str], LendingTable]) -> None:
        """`fetch`: asks the broker for the table of the lender with this name; raises PolderError. A thread calls it."""
        self._peers, self._own_name, self._fetch = peers, own_name, fetch
        self._wanted: dict[str, int] = {}  # lender -> process of its core
        self._attached: dict[str, int] = {}
        self._fetched: deque[tuple[str, int, LendingTable | PolderError]] = deque()
        self._fetcher: threading.Thread | None = None
        self._asked_at = float("-inf")

    def on_neighbours(self, message: Neighbours) -> None:
        """Engines came or went: forgets those that lend no more. New ones are attached by `look`."""
        self._wanted = dict(zip(message.lenders, message.pids, strict=True))
        self._wanted.pop(self._own_name, None)
        self._detach([name for name, pid in self._attached.items() if self._wanted.get(name) != pid])
        self._peers.share_with(max(1, len(message.cores) - 1))
        self._asked_at = float("-inf")

    def look(self, now: float) -> None:
        """Between two steps: attaches tables that have come, and has missing ones fetched, at most once a second.

        A lender that stays gets a new table from a new broker, and closes the old one.
        """
        self._detach(self._peers.closed)
        while self._fetched:
            self._take(*self._fetched.popleft())
        missing = {name: pid for name, pid in self._wanted.items() if name not in self._attached}
        if missing and self._fetcher is None and now - self._asked_at > RETRY_EVERY_S:
            self._asked_at = now
            self._fetcher = threading.Thread(
                target=self._fetch_all, args=(missing,), name="polder-lenders", daemon=True
            )
            self._fetcher.start()

    def close(self) -> None:
        fetcher = self._fetcher
        if fetcher is not None:
            fetcher.join()
        for _, _, table in self._fetched:
            if isinstance(table, LendingTable):
                table.close()
        self._fetched.clear()

    def _detach(self, names: Iterable[str]) -> None:
        for name in names:
            self._attached.pop(name, None)
            self._peers.detach(name)

    def _take(self, name: str, pid: int, table: LendingTable | PolderError) -> None:
        if isinstance(table, PolderError):
            logger.info("%s does not lend yet: %s", name, table)
        elif self._wanted.get(name) != pid:
            table.close()  # it went away meanwhile
        else:
            self._attached[name] = pid
            self._peers.attach(name, table)
            logger.info("borrowing from %s: %d blocks", name, table.geometry.blocks)

    def _fetch_all(self, lenders: Mapping[str, int]) -> None:
        for name, pid in lenders.items():
            try:
                self._fetched.append((name, pid, self._fetch(name)))
            except PolderError as error:
                self._fetched.append((name, pid, error))
        self._fetcher = None
