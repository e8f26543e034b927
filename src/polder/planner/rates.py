"""Measured speeds that the planner compares, kept current by the work itself.

Nothing is looked up in a table of devices: a link is as fast as its last transfers were, an engine's prefill as fast as its last
steps. Both decay, so a link that a neighbour begins to use, or a batch that grows, is noticed within a few transfers.
"""

from __future__ import annotations

__all__ = ["LinkRate", "PrefillRate"]


class LinkRate:
    """Seconds a byte of one direction of one link. Unknown until the first transfer."""

    def __init__(self, *, memory_s: float = 0.5) -> None:
        """`memory_s`: transfer time over which the average forgets: short transfers change it little, long ones much."""
        self._memory_s = memory_s
        self._bytes = 0.0
        self._seconds = 0.0
        self.measured_at = float("-inf")

    def observe(self, size_bytes: int, seconds: float, now: float) -> None:
        """A transfer of `size_bytes` kept the link busy for `seconds`."""
        if size_bytes <= 0 or seconds <= 0:
            return
        keep = max(0.0, 1.0 - seconds / self._memory_s)
        self._bytes = keep * self._bytes + size_bytes
        self._seconds = keep * self._seconds + seconds
        self.measured_at = now

    @property
    def bytes_per_s(self) -> float | None:
        return self._bytes / self._seconds if self._seconds > 0 else None

    def seconds(self, size_bytes: float) -> float | None:
        """Expected time of a transfer; None when nothing was measured yet."""
        rate = self.bytes_per_s
        return None if rate is None else size_bytes / rate


class PrefillRate:
    """Seconds that this engine takes to compute the KV of one more prompt token."""

    def __init__(self, *, least_tokens: int = 64, weight: float = 0.1) -> None:
        """Steps of fewer than `least_tokens` tokens say more about the step's fixed cost and are left out."""
        self._least_tokens = least_tokens
        self._weight = weight
        self.seconds_per_token: float | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """A step computed `tokens` tokens in `seconds`."""
        if tokens < self._least_tokens or seconds <= 0:
            return
        rate = seconds / tokens
        known = self.seconds_per_token
        self.seconds_per_token = rate if known is None else (1 - self._weight) * known + self._weight * rate

    def seconds(self, tokens: int) -> float | None:
        """Expected time to recompute `tokens`; None when nothing was measured yet."""
        return None if self.seconds_per_token is None else tokens * self.seconds_per_token
