"""What an engine core tells the broker it needs: built from the scheduler's queues, sent only when it is worth a
message."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from polder.broker.wire import Demand, Hello, Welcome
from polder.engines.vllm.core.blocks import BlockUnits
from polder.engines.vllm.core.resident import ResidentWeights
from polder.engines.vllm.core.subsystem import Subsystem
from polder.planner.rates import PrefillRate
from polder.planner.reuse import ReuseTracker

__all__ = ["DemandReports"]

DEMAND_EVERY_S = 0.05
SAME_EVERY_S = 0.5  # a report wakes the broker, on a core that may be the one this engine needs
URGENT_EVERY_S = 0.005
PEAK_WINDOW_S = 2.5  # a peak is remembered for one to two windows
WAITING_LOOKED_AT = 256


class DemandReports(Subsystem):
    """One engine core's. Its methods run between two steps, in the core's thread."""

    def __init__(
        self,
        scheduler: Any,
        blocks: BlockUnits,
        hello: Hello,
        *,
        block_tokens: int,
        groups: int,
        prefill: PrefillRate,
        weights: ResidentWeights,
        stats: Callable[[], dict[str, float]],
        send: Callable[[Demand], None],
        counters: dict[str, float],
    ) -> None:
        """`groups`: KV cache groups, each of which takes blocks of its own. `stats` goes out with every demand. Counts
        preemptions and prefix hits in `counters`."""
        self._scheduler, self._blocks, self._hello = scheduler, blocks, hello
        self._block_tokens, self._groups, self._prefill = block_tokens, groups, prefill
        self._weights, self._stats, self._send, self._counters = weights, stats, send, counters
        self.reuse = ReuseTracker(
            unit_blocks=blocks.unit_blocks, max_units=hello.ceiling_units, block_tokens=block_tokens
        )
        self._peaks = (0, 0)
        self._peak_since = time.monotonic()
        self._sent_at = self._checked_at = 0.0
        self._sent: Demand | None = None
        self._sent_state: tuple[Any, ...] = ()
        """The parts of the demand sent whose change can change the broker's plan at once."""
        self._useful, self._useful_at = 0, float("-inf")

    def on_welcome(self, message: Welcome, *, new_broker: bool) -> None:
        """On a new connection the broker knows nothing of what was sent before."""
        self._sent, self._sent_state = None, ()

    def on_admission(self, request: Any, hit_tokens: int) -> None:
        if not request.num_preemptions:
            self._counters["prefix_queries_tokens_total"] += request.num_tokens
            self._counters["prefix_hits_tokens_total"] += hit_tokens
            self.reuse.touch(request.block_hashes, time.monotonic())

    def on_preemption(self) -> None:
        self._counters["preemptions_total"] += 1

    def report_soon(self) -> None:
        """The next report is due, however short ago the last one was."""
        self._sent_at = self._checked_at = 0.0

    def report(self, now: float) -> None:
        """Sends the demand if it is worth sending: at once when requests wait for memory, else now and then."""
        since = now - self._sent_at
        turned = self._sent is not None and self._weights.turned(self._sent)
        if since < URGENT_EVERY_S and not turned:
            return
        busy, waiting = self._need_units()
        self._note_peak(busy + waiting, now)
        held = self._blocks.held_units
        urgent = busy + waiting > held
        was_urgent = self._sent is not None and self._sent.urgent
        unchecked_s = now - self._checked_at
        if not turned and not (urgent and not was_urgent) and unchecked_s < (DEMAND_EVERY_S if self._sent else 0):
            return
        self._checked_at = now
        cached = min(held, self._units(self._blocks.cached_blocks))
        weights = self._weights.demand(now)
        state = (
            held,
            busy,
            waiting,
            max(self._peaks),
            cached,
            urgent,
            weights.get("asleep"),
            weights.get("idle_s", 0.0) > 0,
            weights.get("spare_segments"),
        )
        if state == self._sent_state and since < SAME_EVERY_S:
            return
        demand = Demand(
            held_units=held,
            busy_units=busy,
            waiting_units=waiting,
            peak_units=max(self._peaks),
            cached_units=cached,
            curve=self.reuse.curve(now, self._prefill.seconds_per_token or 0.0),
            urgent=urgent,
            stats=self._stats(),
            **weights,
        )
        self._sent, self._sent_state, self._sent_at = demand, state, now
        self._send(demand)

    def useful_units(self, now: float) -> int:
        """Units of cache beyond which more saves next to nothing, by the measured reuse curve."""
        if now - self._useful_at >= 1.0:
            self._useful_at = now
            curve = self.reuse.curve(now, self._prefill.seconds_per_token or 0.0)
            # Below a hundredth of a second saved per second, what reuse there is does not pay for keeping memory.
            self._useful = (
                next((u for u, s in enumerate(curve) if s >= 0.95 * curve[-1]), 0) if curve and curve[-1] > 0.01 else 0
            )
        return self._useful

    # ------------------------------------------------------------------ inside

    def _need_units(self) -> tuple[int, int]:
        """Units for the blocks in use, and units more for what running and waiting requests will need soon."""
        size = self._block_tokens
        soon = 0
        for request in self._scheduler.running:
            missing = request.num_tokens - request.num_computed_tokens
            # A decoding request needs a block when its last one is full; a prefill all blocks of its remaining chunks.
            soon += -(-missing // size) if missing > 1 else request.num_tokens % size == 0
        room = self._scheduler.max_num_running_reqs - len(self._scheduler.running)
        for at, request in enumerate(self._scheduler.waiting):
            if at >= min(room, WAITING_LOOKED_AT):
                break
            soon += -(-(request.num_tokens + 1) // size)
        busy = self._blocks.busy_blocks
        together = min(self._units(busy + soon * self._groups), self._hello.ceiling_units)
        return self._units(busy), max(0, together - self._units(busy))

    def _note_peak(self, units: int, now: float) -> None:
        before, current = self._peaks
        if now - self._peak_since >= PEAK_WINDOW_S:
            before, current = (current, 0) if now - self._peak_since < 2 * PEAK_WINDOW_S else (0, 0)
            self._peak_since = now
        self._peaks = (before, max(current, units))

    def _units(self, blocks: int) -> int:
        return -(-blocks // self._blocks.unit_blocks)
