"""The table by which an engine lends, fetched from the broker by a thread, so that the engine never waits for it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable

from polder.errors import BrokerUnavailable, PolderError

__all__ = ["OwnTable"]

logger = logging.getLogger("polder.engine")

RETRY_EVERY_S = 1.0


class OwnTable:
    """`ask`, `take` and `close` belong to the core's thread."""

    def __init__(
        self, fetch: Callable[[], int], wake: Callable[[], None], *, retry_every_s: float = RETRY_EVERY_S
    ) -> None:
        """`fetch` asks the broker for the table's file descriptor; raises PolderError. `wake`, called by a thread,
        makes the core call `take` soon."""
        self._fetch, self._wake, self._retry_every_s = fetch, wake, retry_every_s
        self._lock = threading.Lock()
        self._fd: int | None = None
        self._over = threading.Event()
        """Set when the answer to the question asked last is not wanted any more."""

    def ask(self) -> None:
        """Wants a new table; what comes for an earlier question is dropped. A broker that does not answer is asked
        again."""
        self.close()
        self._over = threading.Event()
        threading.Thread(target=self._run, args=(self._over,), name="polder-own-table", daemon=True).start()

    def take(self) -> int | None:
        """The table's file descriptor, which is the caller's from now on, if it has come."""
        with self._lock:
            fd, self._fd = self._fd, None
        return fd

    def close(self) -> None:
        """Wants no table any more. Does not wait for a question under way."""
        with self._lock:
            self._over.set()
            fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _run(self, over: threading.Event) -> None:
        while not over.is_set():
            try:
                fd = self._fetch()
            except BrokerUnavailable as error:
                logger.info("nothing is lent yet: %s", error)
                over.wait(self._retry_every_s)
                continue
            except PolderError as error:
                logger.warning("nothing is lent: %s", error)
                return
            with self._lock:
                wanted = not over.is_set()
                if wanted:
                    self._fd = fd
            if wanted:
                self._wake()
            else:
                os.close(fd)
            return
