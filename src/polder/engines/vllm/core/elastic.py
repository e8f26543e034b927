"""One engine core's side of Polder: events of vLLM and of the broker in, demand out.

Everything runs in the core's own thread: `on_wake` when the link has something (between two steps, or at once in an
idle engine), `on_step` after each step, `on_request` when a request arrives. What there is to do then is done by
Resizing, and by the subsystems.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from msgspec.structs import replace

from polder import metrics
from polder.broker.wire import Grant, Grown, Held, Neighbours, Recall, Refused, Welcome
from polder.engines.vllm.agreement import Agreement
from polder.engines.vllm.core.blocks import BlockUnits, BusyBlocks
from polder.engines.vllm.core.demand import DemandReports
from polder.engines.vllm.core.lending import Lending
from polder.engines.vllm.core.link import BrokerLink, Down, Tick, Up
from polder.engines.vllm.core.pacing import Pacing
from polder.engines.vllm.core.prefetch import Prefetch
from polder.engines.vllm.core.resident import ResidentWeights
from polder.engines.vllm.core.resizing import Resizing
from polder.engines.vllm.core.scheduler_events import watch
from polder.engines.vllm.core.step_times import StepTimes
from polder.engines.vllm.core.subsystem import Subsystem
from polder.engines.vllm.core.transfers import TierTransfers, Transfers
from polder.engines.vllm.rank import calls
from polder.engines.vllm.sparse.core import CoreSparse
from polder.engines.vllm.weights.core import CoreWeights
from polder.engines.vllm.window.core import CoreWindow
from polder.engines.vllm.window.goal import keep_goal

__all__ = ["ElasticCore"]

logger = logging.getLogger("polder.engine")

SLOW_STATS_EVERY_S = 1.0


class ElasticCore:
    """Ties one EngineCore's scheduler, its workers and the broker's link together."""

    def __init__(self, core: Any, agreement: Agreement, wake: Callable[[], None]) -> None:
        """After the scheduler exists and the workers have mapped the floor. `wake` makes the core call `on_wake`
        soon."""
        self._core, self._scheduler, self._hello = core, core.scheduler, agreement.hello
        welcome = agreement.welcome
        rule = BusyBlocks.MOVE if all(self._rpc(calls.start_serving)) else BusyBlocks.STAY
        held, size = list(range(agreement.held_units)), agreement.geometry.unit_blocks
        windowed = agreement.window.shape.store_units if agreement.window else 0
        self.blocks = BlockUnits(self._scheduler, size, held, rule, windowed_units=windowed)
        self._refusal = ""
        self._slow: dict[str, float] = {}
        self._slow_at = float("-inf")
        self.counters: dict[str, float] = metrics.zeros(metrics.CORE)
        self.tiers: Any = getattr(getattr(self._scheduler, "connector", None), "manager", None)
        """The tiers' manager, if this engine has tiers; its own module imports vLLM, so it is known here by what it can
        do."""
        self._transfers = TierTransfers(self.tiers, self._scheduler) if self.tiers else Transfers()
        self._weights = self._open_weights(agreement)
        self._step_times = StepTimes()
        self._subsystems: list[Subsystem] = []
        self._resizing = Resizing(
            self.blocks,
            self._hello,
            rpc=self._rpc,
            send=lambda message: self.link.send(message),
            subsystems=self._subsystems,
            transfers=self._transfers,
            weights=self._weights,
            counters=self.counters,
        )
        self._resizing.book(welcome.generation, self.blocks.mapped, welcome.held.kv)
        self._demand = DemandReports(
            self._scheduler,
            self.blocks,
            self._hello,
            block_tokens=min(agreement.block_tokens),
            groups=len(agreement.block_tokens),
            prefill=self._transfers.prefill,
            weights=self._weights,
            stats=self.stats,
            send=lambda message: self.link.send(message),
            counters=self.counters,
        )
        self._subsystems += self._parts(agreement, wake)
        watch(self._scheduler, self._subsystems)
        self.link = BrokerLink(agreement.socket, agreement.channel, wake)
        self.link.send(Grown(lease=welcome.lease))
        self._report(time.monotonic())

    def _parts(self, agreement: Agreement, wake: Callable[[], None]) -> Iterator[Subsystem]:
        """In the order in which they are told.

        In particular: loads of tiers begin before a step's tokens are bounded; blocks that a window has lost are
        dropped before the step's output is handled; the time of a schedule is that of vLLM's and of nothing else;
        blocks that were lent are zeroed as soon as a step with them is scheduled.
        """
        if self.tiers and Prefetch.fits(self._scheduler):
            yield Prefetch(self._scheduler, self.tiers.tiers.counters)
        if agreement.window:
            yield self._open_window(agreement)
        if agreement.settings.sparse_bytes:
            yield CoreSparse(
                self._scheduler,
                agreement.settings,
                self.blocks,
                self._rpc,
                block_tokens=agreement.block_tokens[0],
                block_bytes=agreement.geometry.unit_bytes // agreement.geometry.unit_blocks,
            )
        if agreement.settings.tbt_goal_s:
            yield Pacing(self._scheduler, agreement.settings.tbt_goal_s, self.counters)
        yield self._step_times
        yield self._transfers
        if agreement.settings.lend_bytes:
            yield Lending(
                self._scheduler,
                self.blocks,
                agreement,
                wake,
                workers=self._core.model_executor,
                pages=lambda: self._resizing.pages,
                useful_units=self._demand.useful_units,
            )
        yield self._weights
        yield self._demand

    def _open_weights(self, agreement: Agreement) -> ResidentWeights:
        if not agreement.weights:
            return ResidentWeights()
        weights = CoreWeights(
            self._scheduler,
            agreement.weights,
            self._rpc,
            lambda message: self.link.send(message),
            lambda: self._transfers.busy,
        )
        weights.start(agreement.welcome.generation, agreement.welcome.held.weights)
        return weights

    def _open_window(self, agreement: Agreement) -> CoreWindow:
        assert agreement.window
        window = CoreWindow(self._scheduler, self.blocks, agreement.window, self._rpc, self._transfers)
        if agreement.settings.tbt_goal_s:
            self.counters |= keep_goal(self._core, agreement.window, agreement.settings.tbt_goal_s, self._rpc)
        return window

    # ------------------------------------------------------------------ events, all in the core's thread

    def on_wake(self) -> None:
        """Handles what the link has handed over."""
        inbox = self.link.inbox
        while inbox:
            self._handle(inbox.popleft())
        for part in self._subsystems:
            part.on_wake()
        self._resizing.settle()
        self._report(time.monotonic())

    def _handle(self, message: Any) -> None:
        match message:
            case Grant(use="weights"):
                self._weights.on_grant(message, self._resizing.generation, time.monotonic())
            case Recall(use="weights"):
                self._weights.on_recall(message, self._resizing.generation, time.monotonic())
            case Grant():
                self._resizing.grow(message)
            case Recall():
                self._resizing.recall(message)
            case Neighbours():
                for part in self._subsystems:
                    part.on_neighbours(message)
            case Up():
                held = Held(kv=self._resizing.held(), weights=self._weights.pages)  # between two steps
                self.link.greet(message, replace(self._hello, held=held))
            case Welcome():
                self._on_welcome(message)
            case Refused():
                if message.reason != self._refusal:
                    logger.warning(
                        "the broker refuses: %s; serving on with the memory held, asking again", message.reason
                    )
                self._refusal = message.reason
                self.link.drop()
            case Down() | Tick():
                pass
            case _:
                logger.warning("unexpected message %s", type(message).__name__)

    def _on_welcome(self, message: Welcome) -> None:
        logger.info("back with the broker, %d units held", len(self.blocks.mapped))
        new_broker = message.generation != self._resizing.generation
        self._refusal = ""
        self._resizing.book(message.generation, sorted(self._resizing.pages), message.held.kv)
        for part in self._subsystems:
            part.on_welcome(message, new_broker=new_broker)

    def on_step(self) -> None:
        """vLLM's core has scheduled a step, or handled a step's output, or both."""
        self.counters["steps_total"] += 1
        steps = self._step_times.take()
        for tokens, seconds in steps:
            self._transfers.prefill.observe(tokens, seconds)
        for part in self._subsystems:
            part.on_step(steps, time.monotonic())
        self._resizing.settle()
        self._between_steps()

    def on_request(self) -> None:
        """A request has joined the queue."""
        for part in self._subsystems:
            part.on_request(time.monotonic())
        self._between_steps()

    def on_abort(self) -> None:
        """Requests were aborted. No step follows in an engine whose weights sleep, so the broker hears of it here."""
        self._report(time.monotonic())

    def on_reset(self) -> None:
        """The prefix cache was reset."""
        for part in self._subsystems:
            part.on_reset()

    def close(self) -> None:
        for part in self._subsystems:
            part.close()
        self.link.close()

    def give_up(self, segments: int) -> None:
        """Gives weights up unasked, as far as possible; they come back by the broker's decision, or `polder ctl
        wake`."""
        now = time.monotonic()
        recall = Recall(lease=0, use="weights", units=segments, deadline_s=0.0)
        self._weights.on_recall(recall, self._resizing.generation, now)
        self._demand.report_soon()
        self._report(now)

    def check_integrity(self) -> None:
        """Checks the laws, now."""
        self.blocks.check_integrity()
        for part in self._subsystems:
            part.check_integrity()

    # ------------------------------------------------------------------ statistics

    def stats(self) -> dict[str, float]:
        """Counters and gauges. Those of the subsystems are up to a second old."""
        usable = self.blocks.usable_blocks
        return {
            **self.counters,
            "running_requests": float(len(self._scheduler.running)),
            "waiting_requests": float(len(self._scheduler.waiting)),
            "kv_used_ratio": self.blocks.busy_blocks / usable,
            "seconds_per_token": self._transfers.prefill.seconds_per_token or 0.0,
            **self._slow_stats(),
        }

    def _slow_stats(self) -> dict[str, float]:
        """To count these costs as much as a step's bookkeeping, and only people look at them."""
        now = time.monotonic()
        if now - self._slow_at >= SLOW_STATS_EVERY_S:
            self._slow_at = now
            self._slow = self.exact_stats()
        return self._slow

    def exact_stats(self) -> dict[str, float]:
        """Counters and gauges of the subsystems, now."""
        now = time.monotonic()
        return {name: value for part in self._subsystems for name, value in part.stats(now).items()}

    # ------------------------------------------------------------------ inside

    def _between_steps(self) -> None:
        now = time.monotonic()
        for part in self._subsystems:
            part.between_steps(now)
        self._report(time.monotonic())

    def _report(self, now: float) -> None:
        """What is due now and then: lenders, offers, the demand."""
        for part in self._subsystems:
            part.on_tick(now)
        self._demand.report(now)

    def _rpc(self, function: Any, *args: Any) -> list[Any]:
        answers: list[Any] = self._core.model_executor.collective_rpc(function, args=args)
        return answers
