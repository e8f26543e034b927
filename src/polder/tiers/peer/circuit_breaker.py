"""Asks the broker on behalf of threads that requests wait for. A broker that does not answer costs one timeout, not one
a block.

The first question without an answer takes its whole time limit. After that every question fails at once, until a
background thread gets an answer again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

from polder.errors import BrokerUnavailable

__all__ = ["ASK_TIMEOUT_S", "CircuitBreaker"]

ASK_TIMEOUT_S = 1.0
"""Time limit of a question that a request waits for. A broker that is alive answers within milliseconds."""
PROBE_EVERY_S = 0.5

T = TypeVar("T")


class CircuitBreaker:
    """Shared by all threads of a worker. Thread-safe."""

    def __init__(self, probe: Callable[[], object], *, probe_every_s: float = PROBE_EVERY_S) -> None:
        """`probe` asks the broker any question. It raises BrokerUnavailable when there is no answer."""
        self._probe, self._probe_every_s = probe, probe_every_s
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._prober: threading.Thread | None = None

    @property
    def answers(self) -> bool:
        """False from a question without an answer until the broker answers again."""
        with self._lock:
            return self._prober is None

    def ask(self, question: Callable[[], T]) -> T:
        """Returns the answer. Raises what `question` raises, and BrokerUnavailable at once while the broker does not
        answer."""
        if not self.answers:
            raise BrokerUnavailable("the broker did not answer the last question, and is not asked again yet")
        try:
            return question()
        except BrokerUnavailable:
            with self._lock:
                if self._prober is None and not self._closing.is_set():
                    self._prober = threading.Thread(target=self._wait_for_answer, name="polder-probe", daemon=True)
                    self._prober.start()
            raise

    def close(self) -> None:
        """Ends the background thread."""
        self._closing.set()
        with self._lock:
            prober = self._prober
        if prober is not None:
            prober.join()

    def _wait_for_answer(self) -> None:
        while not self._closing.wait(self._probe_every_s):
            try:
                self._probe()
            except BrokerUnavailable:
                continue
            break
        with self._lock:
            self._prober = None
