"""Predicts when a model's next request comes, from the times between its bursts of requests."""

from __future__ import annotations

import math

__all__ = ["Arrivals"]


class Arrivals:
    """Times are seconds on one rising clock. A request that comes `quiet_s` or more after the last one begins a
    burst."""

    def __init__(self, *, quiet_s: float = 0.5, weight: float = 0.3) -> None:
        """`weight`: the weight of the newest time between bursts in the moving average."""
        self._quiet_s, self._weight = quiet_s, weight
        self._last = self._burst = -math.inf
        self._period_s = math.inf

    def note(self, now: float) -> None:
        """A request came."""
        if now - self._last >= self._quiet_s:
            period = now - self._burst
            if math.isfinite(period):
                known = self._period_s
                self._period_s = period if math.isinf(known) else known + self._weight * (period - known)
            self._burst = now
        self._last = now

    def next_use_s(self, now: float) -> float:
        """Seconds from now to the next burst; 0 when it is due or overdue, inf before there were two bursts."""
        return self._period_s if math.isinf(self._period_s) else max(0.0, self._burst + self._period_s - now)
