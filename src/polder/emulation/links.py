"""One direction of an emulated link."""

from __future__ import annotations

import threading
import time

__all__ = ["EmulatedLink"]

_LATE_S = 0.005
_SHORTEST_SLEEP_S = 0.0005
"""A shorter sleep would cost more than it emulates, so short waits are carried over to the next transfer."""


class EmulatedLink:
    """A link of limited bandwidth. Thread-safe: transfers share the bandwidth, first come first served.

    The caller copies the bytes and then calls `charge`, which sleeps until the link would have carried them. The time
    of the copy itself counts. The two directions of a link are two objects, as they are independent on PCIe and NVLink.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def charge(self, size_bytes: int, started: float) -> None:
        """Returns when a transfer of `size_bytes` that began at `started` (time.perf_counter) is over on this link."""
        with self._lock:
            # A real link goes on by itself when the copying thread is a little late, so that must not slow it down.
            idle = started - self._free_at > _LATE_S
            self._free_at = (started if idle else self._free_at) + size_bytes / self.bytes_per_s
            over = self._free_at
        wait = over - time.perf_counter()
        if wait > _SHORTEST_SLEEP_S:
            time.sleep(wait)
