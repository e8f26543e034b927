"""The engine core's side of elastic weights: what it offers, when it sleeps, how it comes back.

    asleep      the scheduler is paused, and no pages are mapped under the weights' addresses; requests queue
    a request   NeedWeights is sent. The broker finds pages, by recalls and from idle neighbours, and sends a Grant
    granted     workers map the pages and begin to copy layer after layer; the scheduler goes on at once, and the first
                forward pass waits for each layer when it gets there

A model sleeps only when it has no request, or when the broker pauses it for another one that has waited long. Then its
requests keep as much of their KV as no other engine needs, and it asks for its weights at once. While it serves it
offers the segments that it could win by streaming (streaming.py). When steps have become too short for what it streams
already, it asks for these layers back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from vllm.v1.core.sched.interface import PauseState

from polder import metrics
from polder.broker.wire import Demand, Grant, Grown, Message, NeedWeights, Pages, Recall, Returned, Welcome
from polder.engines.vllm import hooks
from polder.engines.vllm.core.resident import ResidentWeights
from polder.engines.vllm.plans import Taken, WeightsFound
from polder.engines.vllm.weights import calls
from polder.engines.vllm.weights.held import HeldSegments, Segments
from polder.engines.vllm.weights.streaming import Streaming
from polder.errors import EnvironmentFault
from polder.planner.arrivals import Arrivals

__all__ = ["CoreWeights"]

logger = logging.getLogger("polder.engine")

TOO_SLOW_S = 1.0
"""Steps must have been too short for what is streamed for so long before layers are asked back."""
RANK_STATS_EVERY_S = 1.0
REMIND_S = 1.0


class CoreWeights(ResidentWeights):
    """Lives in the core's thread, between steps. `send`: to the broker."""

    def __init__(
        self,
        scheduler: Any,
        found: WeightsFound,
        rpc: Callable[..., list[Any]],
        send: Callable[[Message], None],
        in_transfer: Callable[[], bool],
    ) -> None:
        """`in_transfer`: whether steps must go on, even empty ones, since blocks are on their way from or to a tier."""
        self.found = found
        self._scheduler, self._rpc, self._send = scheduler, rpc, send
        self._held = HeldSegments(found.layer_pages)
        self._streaming = Streaming(found)
        self._waking_since: float | None = None
        self._asked_at = 0.0
        self._pause_state = scheduler.pause_state
        self._set_pause_state = scheduler.set_pause_state
        hooks.replace(scheduler, "set_pause_state", self._on_pause)
        # A paused scheduler with requests makes vLLM's loop run a thousand empty steps a second, on the cores of whoever serves
        # meanwhile. Without requests it waits for a message, and one comes with the weights.
        hooks.replace(scheduler, "has_requests", lambda stock: stock() and (not self.asleep or in_transfer()))
        self._arrivals = Arrivals()
        self._idle_since = time.monotonic()
        self._too_many_since: float | None = None
        self._rank_stats: dict[str, float] = {}
        self._rank_stats_at = float("-inf")
        self._worked = True
        self.counters: dict[str, float] = metrics.zeros(metrics.WEIGHTS)

    @property
    def pages(self) -> Pages:
        """Pages of the segments held, per rank, in the broker's numbers."""
        return self._held.pages

    @property
    def asleep(self) -> bool:
        return not self._held

    @property
    def lost(self) -> int:
        """Segments that it runs, or sleeps, without."""
        return self.found.layers - len(self._held)

    # ------------------------------------------------------------------ what happens

    def start(self, generation: int, pages: Pages) -> None:
        """The pages that the broker gives at first: of all segments, or none. Raises RuntimeError when a rank cannot
        map them."""
        segments = self._held.cut(pages)
        errors = list(filter(None, self._rpc(calls.adopt, generation, segments)))
        if errors:
            raise RuntimeError(f"cannot place the weights: {'; '.join(errors)}")
        self._hold(segments)
        self._apply_pause()

    def on_request(self, now: float) -> None:
        self._arrivals.note(now)
        if self.asleep:
            self._want(now)

    def on_tick(self, now: float) -> None:
        """Asks again while requests wait: an operator's `sleep` in between has made the broker forget that it was
        asked."""
        if (
            self.asleep
            and self._waking_since is not None
            and self._scheduler.requests
            and now - self._asked_at >= REMIND_S
        ):
            self._asked_at = now
            self._send(NeedWeights())

    def on_step(self, steps: Sequence[tuple[int, float]], now: float) -> None:
        for tokens, seconds in steps:
            self._note_step(seconds, tokens, now)

    def _note_step(self, seconds: float, tokens: int, now: float) -> None:
        """A step that computed `tokens` tokens has ended."""
        if tokens:
            self._worked = True
            self._streaming.note_step(seconds)
            self._idle_since = now
        if not self.lost or self.asleep:
            return
        winnable = self._streaming.winnable()
        if winnable is None or self.lost <= winnable:
            self._too_many_since = None
        elif self._too_many_since is None:
            self._too_many_since = now
        elif now - self._too_many_since > TOO_SLOW_S:
            self._want(now)

    def on_welcome(self, message: Welcome, *, new_broker: bool) -> None:
        """What was promised on the former connection is void."""
        self._held.rebook(message.held.weights)
        waking, self._waking_since = self._waking_since, None
        if waking is not None:
            self._want(time.monotonic())

    def on_recall(self, message: Recall, generation: int, now: float) -> None:
        count = min(message.units, len(self._held))
        everything = count == len(self._held)
        paused = message.preempt and everything
        in_use = everything and self._scheduler.requests and not paused
        slots = 0 if everything else self._streaming.slots(self.lost + count)
        if not count or in_use or not (everything or slots):
            self._send(Returned(lease=message.lease, use="weights", pages=[], short=message.units))
            return
        taken: list[Taken] = self._rpc(calls.take, count, slots, generation)
        errors = [answer.error for answer in taken if answer.error]
        if errors:
            logger.warning("cannot give %d segments up: %s", count, "; ".join(errors))
            self._undo(taken, generation)
            taken = []
        held, pages = len(self._held), self._let_go(taken)
        self._apply_pause()
        self.counters["sleeps_total"] += self.asleep
        short = message.units - (held - len(self._held))
        self._send(Returned(lease=message.lease, use="weights", pages=pages, short=short))
        if self.asleep:
            self._waking_since = None  # what it asked for before was not granted: the next request must ask again
        if self.asleep and self._scheduler.requests:  # paused: it stands in line again
            self.counters["pauses_total"] += 1
            self._want(now)

    def on_grant(self, message: Grant, generation: int, now: float) -> None:
        segments, started = self._held.cut(message.pages), time.monotonic()
        errors = list(filter(None, self._rpc(calls.give, generation, segments)))
        now += time.monotonic() - started
        if errors:
            logger.warning("cannot map %d segments: %s", len(segments), "; ".join(errors))
            self._send(Returned(lease=message.lease, use="weights", pages=self._refuse(segments, generation)))
            return
        slept = self.asleep
        self._hold(segments)
        self._send(Grown(lease=message.lease))
        self._apply_pause()
        if slept:
            self.counters["wakes_total"] += 1
            if self._waking_since is not None:
                waited = now - self._waking_since
                self.counters["wake_seconds_total"] += waited
                self.counters["wake_max_seconds"] = max(self.counters["wake_max_seconds"], waited)
        self._waking_since = self._too_many_since = None
        self._idle_since = now

    # ------------------------------------------------------------------ what the broker is told

    def demand(self, now: float) -> dict[str, Any]:
        """Fields of Demand."""
        busy = bool(self._scheduler.requests)
        if self.asleep and not busy:
            self._waking_since = None  # the broker forgets, when it reads this, that it was asked to wake it
        spare = max(0, (self._streaming.winnable() or 0) - self.lost) if busy else len(self._held)
        return {
            "asleep": self.asleep,
            "spare_segments": 0 if self.asleep else spare,
            "idle_s": 0.0 if busy else max(1e-3, now - self._idle_since),
            "next_use_s": self._arrivals.next_use_s(now),
            "layer_load_s": self._streaming.layer_load_s,
        }

    def turned(self, sent: Demand) -> bool:
        """Whether it has gone idle, busy, asleep or awake since its last Demand: whoever waits for memory must know at
        once."""
        return (sent.idle_s > 0) == bool(self._scheduler.requests) or sent.asleep != self.asleep

    def stats(self, now: float) -> dict[str, float]:
        """Counters and gauges; asks the workers at most once a second, and only when they have worked: a message keeps
        vLLM's workers spinning for a second."""
        if self._worked and now - self._rank_stats_at >= RANK_STATS_EVERY_S:
            self._ask_workers(now)
        return {**self.counters, "segments": float(len(self._held)), **self._rank_stats}

    def _ask_workers(self, now: float) -> None:
        """Asks the workers for their stats, and they check the laws."""
        ranks: list[dict[str, float]] = self._rpc(calls.figures)
        self._rank_stats = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
        self._rank_stats_at, self._worked = now, False
        self._streaming.learn(self._rank_stats)

    # ------------------------------------------------------------------ inside

    def _on_pause(self, stock: Callable[[PauseState], None], state: PauseState) -> None:
        """Takes the place of Scheduler.set_pause_state: somebody pauses or resumes. A model without weights stays
        paused."""
        self._pause_state = state
        self._apply_pause()

    def _apply_pause(self) -> None:
        self._set_pause_state(PauseState.PAUSED_ALL if self.asleep else self._pause_state)

    def _want(self, now: float) -> None:
        if self._waking_since is None:
            self._waking_since = self._asked_at = now
            self._send(NeedWeights())

    def _undo(self, taken: Sequence[Taken], generation: int) -> None:
        """Some rank has given nothing up: those that have get theirs back, so that all hold as many."""
        most = max(len(rank.segments) for rank in taken)
        if most:
            back = [[list(rank.segments[at]) if rank.segments else [] for rank in taken] for at in range(most)]
            self._rpc(calls.give, generation, back)  # a rank that gets empty segments refuses them

    def _refuse(self, segments: Segments, generation: int) -> Pages:
        """Some rank could not map these segments: all ranks hold as many as before. Returns the pages that are free
        then.

        A rank that did map them may give others up. Raises EnvironmentFault when it cannot: ranks would hold different
        layers.
        """
        self._hold(segments)
        slots = 0 if len(segments) == len(self._held) else self._streaming.slots(self.lost + len(segments))
        freed: list[Taken] = self._rpc(calls.undo_give, generation, segments, slots)
        errors = [answer.error for answer in freed if answer.error]
        if errors:
            raise EnvironmentFault(f"ranks hold different layers and cannot go on: {'; '.join(errors)}")
        return self._let_go(freed)

    def _hold(self, segments: Segments) -> None:
        self._streaming.changed()
        self._held.add(segments)

    def _let_go(self, taken: Sequence[Taken]) -> Pages:
        """Books what the ranks have given up. Returns these pages per rank, in the broker's numbers."""
        given_up = list(zip(*(rank.segments for rank in taken), strict=True))
        if given_up:
            self._streaming.changed()
        return self._held.remove(given_up)
