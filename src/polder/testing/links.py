"""Emulated links: a transfer takes as long as it would over a link of the given bandwidth, and not less.

On a machine with one kind of memory every tier is as fast as memcpy, so nothing that depends on which tier serves a block can
be seen. An emulated link makes it visible: the bytes are really copied, then the copying thread sleeps until the link would have
carried them. Both directions of a link are independent, as on PCIe and NVLink. Time that the copy itself took counts.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping

from polder.errors import ConfigError

__all__ = ["EmulatedLink", "parse_links"]

_RATE = re.compile(r"(peer|host|disk|weights|window)=([0-9]+(?:\.[0-9]+)?)(k|M|G)B/s")
_UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}
_LATE_S = 0.005
_SHORTEST_SLEEP_S = 0.0005  # sleeping less costs more than it emulates: the debt is carried over


class EmulatedLink:
    """One direction of one link. Thread-safe: callers share the bandwidth, first come first served."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._lock = threading.Lock()
        self._free_at = 0.0

    def charge(self, size_bytes: int, started: float) -> None:
        """Returns when a transfer of `size_bytes` that began at `started` (time.perf_counter) is over on this link."""
        with self._lock:
            # A real link goes on by itself when the copying thread is late: being late a little must not make it slower.
            idle = started - self._free_at > _LATE_S
            self._free_at = (started if idle else self._free_at) + size_bytes / self.bytes_per_s
            over = self._free_at
        wait = over - time.perf_counter()
        if wait > _SHORTEST_SLEEP_S:
            time.sleep(wait)


def parse_links(text: str) -> Mapping[str, float]:
    """ "peer=3.2GB/s,host=400MB/s" -> {"peer": 3.2e9, "host": 4e8}; bytes per second. Raises ConfigError on anything else."""
    links: dict[str, float] = {}
    for part in filter(None, (word.strip() for word in text.split(","))):
        match = _RATE.fullmatch(part)
        if match is None or not float(match[2]):
            raise ConfigError(
                f"link {part!r}: write peer=3.2GB/s, host=400MB/s, disk=200MB/s (each), weights=2GB/s or window=2GB/s"
            )
        links[match[1]] = float(match[2]) * _UNITS[match[3]]
    return links
