"""Measured speeds of links and of prefill.

A link is as fast as its last transfers, and prefill is as fast as the engine's last steps. Both averages decay, so a
link that a neighbour begins to use, or a batch that grows, is noticed within a few transfers or steps.
"""

from __future__ import annotations

__all__ = ["LinkRate", "PrefillRate"]


class LinkRate:
    """The speed of one direction of one link. Unknown until the first transfer."""

    def __init__(self, *, memory_s: float = 0.5) -> None:
        """`memory_s`: seconds of transfers after which old ones are forgotten. Long transfers count more than short
        ones."""
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
    """Seconds that this engine takes to compute the KV of one more prompt token.

    A step has a cost that does not depend on its tokens: weights are read, kernels launched, requests decode. It is
    paid whether a prefix is recomputed or not. So small and large steps are averaged apart, and the rate is the slope
    between both averages. Until both were seen it is seconds per token of the large steps, which is too much.
    """

    def __init__(self, *, least_tokens: int = 64, weight: float = 0.1) -> None:
        """`least_tokens`: a step with as many is large. `weight`: the weight of the newest step in its average."""
        self._least_tokens = least_tokens
        self._weight = weight
        self._small: tuple[float, float] | None = None  # mean tokens, mean seconds
        self._large: tuple[float, float] | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """A step computed `tokens` tokens in `seconds`."""
        if tokens <= 0 or seconds <= 0:
            return
        if tokens < self._least_tokens:
            self._small = self._averaged(self._small, tokens, seconds)
        else:
            self._large = self._averaged(self._large, tokens, seconds)

    @property
    def seconds_per_token(self) -> float | None:
        """None when no large step was measured yet."""
        if self._large is None:
            return None
        tokens, seconds = self._large
        quotient = seconds / tokens
        if self._small is None:
            return quotient
        slope = (seconds - self._small[1]) / (tokens - self._small[0])
        # A slope far below the quotient is noise. A slope of zero would refuse every load for ever.
        return max(slope, quotient / 10)

    def seconds(self, tokens: int) -> float | None:
        """Expected time to recompute `tokens`; None when nothing was measured yet."""
        rate = self.seconds_per_token
        return None if rate is None else tokens * rate

    def _averaged(self, known: tuple[float, float] | None, tokens: int, seconds: float) -> tuple[float, float]:
        if known is None:
            return float(tokens), seconds
        return known[0] + self._weight * (tokens - known[0]), known[1] + self._weight * (seconds - known[1])
