"""The engine core's side of elastic KV: demand out, grants and recalls in, in the order of the laws.

Everything runs in the core's own thread: `on_wake` when the link has something (between two steps, or at once in an idle engine),
`on_step` after each step, `on_request` when a request arrives. A resize is one RPC to the workers, ordered with the steps by vLLM's
own queue, so no step ever runs with blocks whose pages are not mapped:

    grow    workers map and zero the pages   ->  block ids join the free queue  ->  Grown
    shrink  block ids leave queue and hashes ->  workers move, fence, unmap     ->  Returned
"""

from __future__ import annotations

import functools
import logging
import time
from typing import Any

from msgspec.structs import replace

from polder import metrics
from polder.broker.client import fetch_table
from polder.broker.wire import (
    FetchTable,
    Grant,
    Grown,
    Held,
    Hello,
    Neighbours,
    Pages,
    Recall,
    Refused,
    Returned,
    Welcome,
)
from polder.engines.vllm.core.blocks import BlockUnits, BusyBlocks
from polder.engines.vllm.core.demand import DemandReports
from polder.engines.vllm.core.lender import Lender
from polder.engines.vllm.core.link import BrokerLink, Down, Tick, Up
from polder.engines.vllm.core.own_table import OwnTable
from polder.engines.vllm.core.pacing import Pacing
from polder.engines.vllm.core.prefetch import Prefetch
from polder.engines.vllm.core.step_times import StepTimes
from polder.engines.vllm.rank import calls
from polder.engines.vllm.start.negotiate import Agreement
from polder.engines.vllm.weights.core import CoreWeights
from polder.engines.vllm.window.core import CoreWindow
from polder.engines.vllm.window.goal import keep_goal
from polder.planner.rates import PrefillRate
from polder.tiers.reach import ASK_TIMEOUT_S

__all__ = ["ElasticCore"]

logger = logging.getLogger("polder.engine")

SLOW_STATS_EVERY_S = 1.0


class ElasticCore:
    """Ties one EngineCore's scheduler, its workers and the broker's link together."""

    def __init__(self, core: Any, agreement: Agreement, wake: Any) -> None:
        """After the scheduler exists and the workers have mapped the floor. `wake` makes the core call `on_wake` soon."""
        self._core = core
        self._scheduler = core.scheduler
        self._hello = agreement.hello
        self._generation = agreement.welcome.generation
        ranks = self._rpc(calls.describe)
        rule = BusyBlocks.MOVE if all(rank["movable"] for rank in ranks) else BusyBlocks.STAY
        windowed = agreement.window.shape.store_units if agreement.window is not None else 0
        self.blocks = BlockUnits(
            self._scheduler, agreement.unit_blocks, ranks[0]["units"], rule, windowed_units=windowed
        )
        self._pages: dict[int, list[list[int]]] = self._by_unit(self.blocks.mapped, agreement.welcome.held.kv)
        self._refusal = ""
        self._slow: dict[str, float] = {}
        self._slow_at = float("-inf")
        self.counters: dict[str, float] = metrics.zeros(metrics.CORE)
        self._watch_scheduler()
        self._step_times = StepTimes(self._scheduler)
        if agreement.tbt_goal_s is not None:
            Pacing(self._scheduler, agreement.tbt_goal_s, self.counters)
        self.window: CoreWindow | None = None
        if agreement.window is not None:
            ceiling = self._hello.ceiling_units
            self.window = CoreWindow(self._scheduler, self.blocks, agreement.window, self._rpc, ceiling)
            if agreement.tbt_goal_s is not None:
                self.counters |= keep_goal(core, agreement.window, agreement.tbt_goal_s, ceiling, self._rpc)
        # The connector's manager, if this engine has tiers; its own module imports vLLM, so it is known here by what it can do.
        self.tiers: Any = getattr(getattr(self._scheduler, "connector", None), "manager", None)
        self.weights: CoreWeights | None = None
        if agreement.weights is not None:
            self.weights = CoreWeights(
                self._scheduler, agreement.weights, self._rpc, lambda m: self.link.send(m), self._in_transfer
            )
            self.weights.start(self._generation, agreement.welcome.held.weights)
        self._prefill: PrefillRate = PrefillRate() if self.tiers is None else self.tiers.tiers.prefill
        if self.tiers is not None:
            Prefetch(self._scheduler, self.tiers.tiers.counters)
        self._postponed: list[Recall] = []
        self.lender: Lender | None = None
        self._own_table: OwnTable | None = None
        if agreement.lend_bytes:
            ranks_of = len(self._hello.devices)
            self.lender = Lender(
                self._scheduler.kv_cache_manager.block_pool,
                self.blocks.holders,
                agreement.geometry,
                ranks_of,
                agreement.lend_bytes,
                before_offer=self._before_offer,
            )
            question = FetchTable(engine=self._hello.engine, lender=self._hello.engine)
            fetch = functools.partial(fetch_table, agreement.socket, question, timeout_s=ASK_TIMEOUT_S)
            self._own_table = OwnTable(fetch, wake)
            self._own_table.ask()
        self.link = BrokerLink(agreement.socket, agreement.channel, wake)
        self._demand = DemandReports(
            self._scheduler,
            self.blocks,
            self._hello,
            block_tokens=agreement.block_tokens,
            groups=agreement.groups,
            prefill=self._prefill,
            held_units=lambda: self._held_units,
            weights=self.weights,
            stats=self._stats,
            send=self.link.send,
        )
        self.link.send(Grown(lease=agreement.welcome.lease))
        self._report(time.monotonic())

    # ------------------------------------------------------------------ events, all in the core's thread

    def on_wake(self) -> None:
        """Handles what the link has handed over."""
        inbox = self.link.inbox
        while inbox:
            message = inbox.popleft()
            match message:
                case Grant(use="weights") if self.weights is not None:
                    self.weights.on_grant(message, self._generation, time.monotonic())
                case Recall(use="weights") if self.weights is not None:
                    self.weights.on_recall(message, self._generation, time.monotonic())
                case Grant():
                    self._grow(message)
                case Recall():
                    self._postponed.append(message)
                case Neighbours():
                    if self.tiers is not None:
                        self.tiers.on_neighbours(message)
                    if self.lender is not None:
                        self.lender.on_neighbours(message.cores)
                case Up():
                    self.link.greet(message, self._hello_again())
                case Welcome():
                    logger.info("back with the broker, %d units held", len(self.blocks.mapped))
                    new_broker = message.generation != self._generation
                    self._generation, self._refusal = message.generation, ""
                    self._demand.start_over()
                    self._pages = self._by_unit(sorted(self._pages), message.held.kv)
                    if self.weights is not None:
                        self.weights.on_welcome(message.held.weights, time.monotonic())
                    if new_broker and self.lender is not None and self._own_table is not None:
                        self.lender.close()  # it knows nothing of what was lent
                        self._own_table.ask()
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
        if self.lender is not None and self._own_table is not None:
            fd = self._own_table.take()
            if fd is not None:
                self.lender.open(fd, self._pages)
        self._settle()
        self._report(time.monotonic())

    def on_step(self) -> None:
        """vLLM's core has scheduled a step, or handled a step's output, or both."""
        self.counters["steps_total"] += 1
        for tokens, seconds in self._step_times.take():
            self._prefill.observe(tokens, seconds)
            if self.weights is not None:
                self.weights.on_step(seconds, tokens, time.monotonic())
        if self.lender is not None:
            self.lender.note_used(self.blocks.busy_blocks)
        self._settle()
        self._look_at_window()
        self._report(time.monotonic())

    def on_request(self) -> None:
        """A request has joined the queue."""
        if self.weights is not None:
            self.weights.on_request(time.monotonic())
        self._look_at_window()
        self._report(time.monotonic())

    def on_abort(self) -> None:
        """Requests were aborted. No step follows in an engine whose weights sleep, so the broker hears of it here."""
        self._report(time.monotonic())

    def close(self) -> None:
        if self._own_table is not None:
            self._own_table.close()
        if self.lender is not None:
            self.lender.close()
        self.link.close()

    def give_up(self, segments: int) -> None:
        """Gives weights up unasked, as far as possible; they come back by the broker's decision, or `polder ctl wake`."""
        assert self.weights is not None
        now = time.monotonic()
        self.weights.on_recall(Recall(lease=0, use="weights", units=segments, deadline_s=0.0), self._generation, now)
        self._demand.report_soon()
        self._report(now)

    def check_integrity(self) -> None:
        """Checks the laws, now."""
        self.blocks.check_integrity()
        if self.lender is not None:
            self.lender.check_integrity()
        if self.tiers is not None:
            self.tiers.tiers.check_integrity()

    # ------------------------------------------------------------------ resizing

    def _settle(self) -> None:
        """Gives recalled memory back, as soon as no transfer of the tiers reads or writes a block that may have to move."""
        if not self._postponed:
            return
        tiers = None if self.tiers is None else self.tiers.tiers
        if tiers is not None and tiers.busy:
            tiers.hold()  # no new ones; the engine keeps stepping until the last has ended
            return
        postponed, self._postponed = self._postponed, []
        for recall in postponed:
            self._shrink(recall)
        if tiers is not None:
            tiers.resume()

    def _look_at_window(self) -> None:
        """Opens, closes, brings home: only while no transfer of the tiers reads or writes a block that may have to move."""
        if self.window is None:
            return
        tiers = None if self.tiers is None else self.tiers.tiers
        if tiers is not None and tiers.busy:
            if self.window.pressing():
                tiers.hold()
            return
        self.window.look(time.monotonic())
        if tiers is not None:
            tiers.resume()

    def _before_offer(self, blocks: list[int]) -> None:
        """Free blocks are about to get others' bytes: returns when no step reads or writes them any more.

        A step under way may still write a block of a request that has ended. And behind a sliding window a kernel may load a block
        that no request has, together with one that it reads; what it loads is multiplied by zero, which makes NaN of NaN.
        """
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        groups = self._scheduler.kv_cache_config.kv_cache_groups
        if not all(isinstance(group.kv_cache_spec, FullAttentionSpec) for group in groups):
            self._rpc(calls.forget_blocks, blocks)
        elif self._scheduler.vllm_config.max_concurrent_batches > 1:
            self._rpc(calls.await_steps)

    def _grow(self, grant: Grant) -> None:
        started = time.perf_counter()
        units = self.blocks.unmapped(grant.units)
        outcomes = self._rpc(calls.map_units, self._generation, units, grant.pages) if len(units) == grant.units else []
        errors = [outcome.error for outcome in outcomes if outcome.error]
        if errors or not outcomes:
            logger.warning("cannot map %d units: %s", grant.units, "; ".join(errors) or "already at the ceiling")
            if outcomes:
                self._rpc(calls.unmap_units, self._generation, units)  # some ranks may have mapped theirs
            self.link.send(Returned(lease=grant.lease, use="kv", pages=grant.pages))
            return
        added = self._by_unit(units, grant.pages)
        self._pages |= added
        if self.lender is not None:
            self.lender.mapped(added)
        self.blocks.offer(units)
        self.link.send(Grown(lease=grant.lease))
        self._count("grows_total", "grow_seconds_total", "grow_max_seconds", started)

    def _shrink(self, recall: Recall) -> None:
        started = time.perf_counter()
        if self.window is not None:
            self.window.close_idle()
        asleep = self.weights is not None and self.weights.asleep
        # Requests of a model that was paused: their memory goes too, if whoever runs now needs it.
        floor = 1 if asleep else self._hello.floor_units - (len(self.window.carriers) if self.window else 0)
        if recall.preempt or asleep:
            await_steps = functools.partial(self._rpc, calls.await_steps)
            done = self.blocks.shrink_preempting(recall.units, max(1, floor), await_steps)
        else:
            done = self.blocks.shrink(recall.units, max(1, floor))
        if done.preempted:
            self._rpc(calls.forget_outputs, done.preempted)
        units, plan = done.plan.units.tolist(), done.plan
        if units and self.lender is not None:
            self.lender.unmapped(units)
        if units:
            self._rpc(calls.unmap_units, self._generation, units, plan.sources.tolist(), plan.targets.tolist())
        pages = self._by_rank([self._pages.pop(unit) for unit in units])
        self.link.send(Returned(lease=recall.lease, use="kv", pages=pages, short=recall.units - len(units)))
        self.counters["evicted_blocks_total"] += done.evicted_blocks
        self.counters["migrated_blocks_total"] += done.migrated_blocks
        self.counters["giveback_preemptions_total"] += done.preempted_requests
        if units:
            self._count("shrinks_total", "shrink_seconds_total", "shrink_max_seconds", started)

    def _count(self, times: str, seconds: str, longest: str, started: float) -> None:
        elapsed = time.perf_counter() - started
        self.counters[times] += 1
        self.counters[seconds] += elapsed
        self.counters[longest] = max(self.counters[longest], elapsed)

    # ------------------------------------------------------------------ demand

    def _report(self, now: float) -> None:
        """What is due now and then: lenders, offers, the demand."""
        if self.tiers is not None:
            self.tiers.retry_lenders(now)
        if self.lender is not None:
            useful = self._demand.useful_units(now) * self.blocks.usable_blocks // len(self.blocks.mapped)
            self.lender.look(now, self.blocks.busy_blocks, self.blocks.usable_blocks, useful)
        if self.weights is not None:
            self.weights.remind(now)
        self._demand.report(now)

    @property
    def _held_units(self) -> int:
        return len(self.blocks.mapped) if self.window is None else self.window.held_units

    def _stats(self) -> dict[str, float]:
        usable = self.blocks.usable_blocks
        return {
            **self.counters,
            "running_requests": float(len(self._scheduler.running)),
            "waiting_requests": float(len(self._scheduler.waiting)),
            "kv_used_ratio": self.blocks.busy_blocks / usable,
            "seconds_per_token": self._prefill.seconds_per_token or 0.0,
            **self._slow_stats(),
        }

    def _slow_stats(self) -> dict[str, float]:
        """What costs as much as a step's bookkeeping to count, and is looked at by people only."""
        now = time.monotonic()
        if now - self._slow_at >= SLOW_STATS_EVERY_S:
            self._slow_at = now
            self._slow = self.exact_stats()
        return self._slow

    def exact_stats(self) -> dict[str, float]:
        """Counters and gauges of lending and tiers, now."""
        lent = self.lender.figures() if self.lender is not None else {}
        if self.weights is not None:
            lent |= self.weights.stats(time.monotonic())
        if self.window is not None:
            lent |= self.window.stats()
        return lent | (self.tiers.tiers.stats() if self.tiers is not None else {})

    # ------------------------------------------------------------------ plumbing

    def _in_transfer(self) -> bool:
        return self.tiers is not None and self.tiers.tiers.busy

    def _watch_scheduler(self) -> None:
        """Listens in on one scheduler object: tokens of each step, admissions and their prefix hits, preemptions."""
        scheduler, manager, counters = self._scheduler, self._scheduler.kv_cache_manager, self.counters
        schedule, admitted, preempt = scheduler.schedule, manager.record_prefix_cache_stats, scheduler._preempt_request

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            dirty = self.lender.take_dirty() if self.lender is not None else []
            if dirty:  # bytes of another model: read as numbers they may be NaN
                # Not awaited: workers do it between the step before and this one. `new_block_ids_to_zero` would be vLLM's way, but
                # most of its runners are not ready for it, or pass some layers over.
                self._core.model_executor.collective_rpc(calls.zero_blocks, args=(dirty,), non_block=True)
            return output

        def watched_admission(request: Any, num_hits: int) -> None:
            admitted(request, num_hits)
            if not request.num_preemptions:
                counters["prefix_queries_tokens_total"] += request.num_tokens
                counters["prefix_hits_tokens_total"] += num_hits
                self._demand.reuse.touch(request.block_hashes, time.monotonic())

        def watched_preemption(*args: Any, **kwargs: Any) -> None:
            counters["preemptions_total"] += 1
            preempt(*args, **kwargs)

        scheduler.schedule = watched_schedule
        manager.record_prefix_cache_stats = watched_admission
        scheduler._preempt_request = watched_preemption

    def _hello_again(self) -> Hello:
        """Hello on a new connection: what is really held, taken between two steps."""
        pages = self._by_rank([self._pages[unit] for unit in sorted(self._pages)])
        return replace(self._hello, held=Held(kv=pages, weights=self.weights.pages if self.weights is not None else []))

    def _by_unit(self, units: list[int], pages: list[list[int]]) -> dict[int, list[list[int]]]:
        size = self._hello.pages_per_unit
        return {unit: [rank[i * size : (i + 1) * size] for rank in pages] for i, unit in enumerate(units)}

    def _by_rank(self, units: list[list[list[int]]]) -> Pages:
        """The pages of some units, per rank."""
        return [[page for unit in units for page in unit[rank]] for rank in range(len(self._hello.devices))]

    def _rpc(self, function: Any, *args: Any) -> list[Any]:
        answers: list[Any] = self._core.model_executor.collective_rpc(function, args=args)
        return answers
