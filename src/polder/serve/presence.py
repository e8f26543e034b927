"""Checks that an engine is known to the broker: it said Hello, or reported that it serves as stock vLLM."""

from __future__ import annotations

import time
from pathlib import Path

from polder.broker import client
from polder.errors import BrokerUnavailable, EnvironmentFault

__all__ = ["Presence"]

PATIENCE_S = 15.0
"""An engine says Hello before its server answers, but a restarted broker hears of it a second later."""


class Presence:
    """Called for an engine whose server answers. An engine without Polder would take memory that was not granted to
    it."""

    def __init__(self, engine: str, socket: Path, *, patience_s: float = PATIENCE_S) -> None:
        self._engine, self._socket, self._patience_s = engine, socket, patience_s
        self._absent_since: float | None = None

    def __call__(self) -> bool:
        """True when the broker knows the engine. Raises EnvironmentFault when the broker answers but does not hear of
        it in time."""
        try:
            status = client.status(self._socket, timeout_s=1.0)
        except BrokerUnavailable:
            self._absent_since = None
            return False
        if any(known.engine == self._engine for known in status.engines) or self._engine in status.stock:
            self._absent_since = None
            return True
        now = time.monotonic()
        if self._absent_since is None:
            self._absent_since = now
        if now - self._absent_since > self._patience_s:
            self._absent_since = None
            raise EnvironmentFault(
                f"{self._engine} answers, but the broker does not know it: it serves without Polder, with memory of its own. "
                f"Install polder where its vllm is, and see its log for why the plugin `polder` was not loaded"
            )
        return False
