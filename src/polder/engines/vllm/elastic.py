"""The engine core's side of elastic KV: demand out, grants and recalls in, in the order of the laws.

Everything runs in the core's own thread: `on_wake` when the link has something (between two steps, or at once in an idle engine),
`on_step` after each step, `on_request` when a request arrives. A resize is one RPC to the workers, ordered with the steps by vLLM's
own queue, so no step ever runs with blocks whose pages are not mapped:

    grow    workers map and zero the pages   ->  block ids join the free queue  ->  Grown
    shrink  block ids leave queue and hashes ->  workers move, fence, unmap     ->  Returned
"""

from __future__ import annotations

import logging
import time
from typing import Any

from msgspec.structs import replace

from polder.broker.client import fetch_table
from polder.broker.reuse import ReuseTracker
from polder.broker.wire import (
    Demand,
    FetchTable,
    GiveSegments,
    Grant,
    Grown,
    Hello,
    Neighbours,
    Recall,
    Refused,
    Returned,
    TakeSegments,
    Welcome,
)
from polder.engines.vllm import worker
from polder.engines.vllm.blocks import BlockUnits, BusyBlocks
from polder.engines.vllm.lender import Lender
from polder.engines.vllm.link import BrokerLink, Down, Tick, Up
from polder.engines.vllm.negotiate import Agreement
from polder.engines.vllm.pacing import Pacing
from polder.engines.vllm.prefetch import Prefetch
from polder.engines.vllm.weights import CoreWeights
from polder.engines.vllm.window_core import CoreWindow
from polder.engines.vllm.window_goal import keep_goal
from polder.errors import PolderError
from polder.planner.rates import PrefillRate

__all__ = ["ElasticCore"]

logger = logging.getLogger("polder.engine")

DEMAND_EVERY_S = 0.05
SAME_EVERY_S = 0.5  # a report wakes the broker, on a core that may be the one this engine needs
URGENT_EVERY_S = 0.005
PEAK_WINDOW_S = 2.5  # a peak is remembered for one to two windows
WAITING_LOOKED_AT = 256
SLOW_STATS_EVERY_S = 1.0


class ElasticCore:
    """Ties one EngineCore's scheduler, its workers and the broker's link together."""

    def __init__(self, core: Any, agreement: Agreement, wake: Any) -> None:
        """After the scheduler exists and the workers have mapped the floor. `wake` makes the core call `on_wake` soon."""
        self._core = core
        self._scheduler = core.scheduler
        self._hello = agreement.hello
        self._generation = agreement.welcome.generation
        self._block_tokens = agreement.block_tokens
        self._groups = agreement.groups
        ranks = self._rpc(worker.describe)
        rule = BusyBlocks.MOVE if all(rank["v1_runner"] for rank in ranks) else BusyBlocks.STAY
        windowed = agreement.window.shape.store_units if agreement.window is not None else 0
        self.blocks = BlockUnits(
            self._scheduler, agreement.unit_blocks, ranks[0]["units"], rule, windowed_units=windowed
        )
        self._pages: dict[int, list[list[int]]] = self._by_unit(self.blocks.mapped, agreement.welcome.pages)
        self._reuse = ReuseTracker(
            unit_blocks=agreement.unit_blocks, max_units=self._hello.ceiling_units, block_tokens=self._block_tokens
        )
        self._step_tokens = 0
        self._peaks = (0, 0)
        self._peak_since = time.monotonic()
        self._sent_at = self._looked_at = 0.0
        self._sent: Demand | None = None
        self._news: tuple[Any, ...] = ()
        """Of the demand sent, all that a plan can turn on at once."""
        self._refusal = ""
        self._useful, self._useful_at = 0, float("-inf")
        self._slow: dict[str, float] = {}
        self._slow_at = float("-inf")
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)
        self._watch_scheduler()
        if agreement.tbt_goal_s is not None:
            Pacing(self._scheduler, agreement.tbt_goal_s, self.counters)
        self.window: CoreWindow | None = None
        if agreement.window is not None:
            ceiling = self._hello.ceiling_units
            self.window = CoreWindow(self._scheduler, self.blocks, agreement.window, self._rpc, ceiling)
            if agreement.tbt_goal_s is not None:
                self.counters |= keep_goal(core, agreement.window, agreement.tbt_goal_s, ceiling, self._rpc)
        self._socket = agreement.socket
        # The connector's manager, if this engine has tiers; its own module imports vLLM, so it is known here by what it can do.
        self.tiers: Any = getattr(getattr(self._scheduler, "connector", None), "manager", None)
        self.weights: CoreWeights | None = None
        if agreement.weights is not None:
            self.weights = CoreWeights(
                self._scheduler, agreement.weights, self._rpc, lambda m: self.link.send(m), self._in_transfer
            )
            self.weights.start(self._generation, agreement.welcome.segments)
        self._prefill: PrefillRate = PrefillRate() if self.tiers is None else self.tiers.tiers.prefill
        if self.tiers is not None:
            Prefetch(self._scheduler, self.tiers.tiers.statistics)
        self._postponed: list[Recall] = []
        self.lender: Lender | None = None
        if agreement.lend_bytes:
            ranks_of = len(self._hello.devices)
            self.lender = Lender(
                self._scheduler.kv_cache_manager.block_pool, agreement.geometry, ranks_of, agreement.lend_bytes
            )
            self._open_table()
        self.link = BrokerLink(agreement.socket, agreement.channel, wake)
        self.link.send(Grown(lease=agreement.welcome.lease))
        self._report(time.monotonic())

    # ------------------------------------------------------------------ events, all in the core's thread

    def on_wake(self) -> None:
        """Handles what the link has handed over."""
        inbox = self.link.inbox
        while inbox:
            message = inbox.popleft()
            match message:
                case Grant():
                    self._grow(message)
                case Recall():
                    self._postponed.append(message)
                case GiveSegments() if self.weights is not None:
                    self.weights.on_give(message, self._generation, time.monotonic())
                case TakeSegments() if self.weights is not None:
                    self.weights.on_take(message, self._generation, time.monotonic())
                case Neighbours():
                    if self.tiers is not None:
                        self.tiers.on_neighbours(message)
                    if self.lender is not None:
                        self.lender.on_neighbours(message.cores)
                case Up():
                    self.link.send(self._hello_again())
                case Welcome():
                    logger.info("back with the broker, %d units held", len(self.blocks.mapped))
                    new_broker = message.generation != self._generation
                    self._generation, self._sent, self._news, self._refusal = message.generation, None, (), ""
                    self._pages = self._by_unit(sorted(self._pages), message.pages)
                    if self.weights is not None:
                        self.weights.on_welcome(message.segments, time.monotonic())
                    if new_broker and self.lender is not None:
                        self._open_table()  # it knows nothing of what was lent
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
        self._settle()
        self._report(time.monotonic())

    def on_step(self, seconds: float) -> None:
        """A step that took `seconds` has ended."""
        self.counters["steps_total"] += 1
        self._prefill.observe(self._step_tokens, seconds)
        if self.weights is not None:
            self.weights.on_step(seconds, self._step_tokens, time.monotonic())
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

    def close(self) -> None:
        if self.lender is not None:
            self.lender.close()
        self.link.close()

    def give_up(self, segments: int) -> None:
        """Gives weights up unasked, as far as possible; they come back by the broker's decision, or `polder ctl wake`."""
        assert self.weights is not None
        now = time.monotonic()
        self.weights.on_take(TakeSegments(lease=0, segments=segments, deadline_s=0.0), self._generation, now)
        self._sent_at = self._looked_at = 0.0
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

    def _open_table(self) -> None:
        """Lends by a table that the broker knows. Without one, nothing is lent."""
        assert self.lender is not None
        try:
            fd = fetch_table(self._socket, FetchTable(engine=self._hello.engine, lender=self._hello.engine))
        except PolderError as error:
            logger.warning("nothing is lent: %s", error)
            return
        self.lender.open(fd, self._pages)

    def _grow(self, grant: Grant) -> None:
        started = time.perf_counter()
        units = self.blocks.unmapped(grant.units)
        outcomes = (
            self._rpc(worker.map_units, self._generation, units, grant.pages) if len(units) == grant.units else []
        )
        errors = [outcome.error for outcome in outcomes if outcome.error]
        if errors or not outcomes:
            logger.warning("cannot map %d units: %s", grant.units, "; ".join(errors) or "already at the ceiling")
            if outcomes:
                self._rpc(worker.unmap_units, self._generation, units)  # some ranks may have mapped theirs
            self.link.send(Returned(lease=grant.lease, pages=grant.pages))
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
        shrink = self.blocks.shrink_preempting if recall.preempt or asleep else self.blocks.shrink
        floor = 1 if asleep else self._hello.floor_units - (len(self.window.carriers) if self.window else 0)
        done = shrink(recall.units, max(1, floor))
        units, plan = done.plan.units.tolist(), done.plan
        if units and self.lender is not None:
            self.lender.unmapped(units)
        if units:
            self._rpc(worker.unmap_units, self._generation, units, plan.sources.tolist(), plan.targets.tolist())
        taken = [self._pages.pop(unit) for unit in units]
        pages = [[page for unit in taken for page in unit[rank]] for rank in range(len(self._hello.devices))]
        self.link.send(Returned(lease=recall.lease, pages=pages, short=recall.units - len(units)))
        self.counters["evicted_blocks_total"] += done.evicted_blocks
        self.counters["migrated_blocks_total"] += done.migrated_blocks
        self.counters["polder_preemptions_total"] += done.preempted_requests
        if units:
            self._count("shrinks_total", "shrink_seconds_total", "shrink_max_seconds", started)

    def _count(self, times: str, seconds: str, longest: str, started: float) -> None:
        elapsed = time.perf_counter() - started
        self.counters[times] += 1
        self.counters[seconds] += elapsed
        self.counters[longest] = max(self.counters[longest], elapsed)

    # ------------------------------------------------------------------ demand

    def _report(self, now: float) -> None:
        """Sends the demand if it is worth sending: at once when requests wait for memory, else now and then."""
        if self.tiers is not None:
            self.tiers.retry_lenders(now)
        if self.lender is not None:
            useful = self._useful_units(now) * self.blocks.usable_blocks // len(self.blocks.mapped)
            self.lender.look(now, self.blocks.busy_blocks, self.blocks.usable_blocks, useful)
        if self.weights is not None:
            self.weights.remind(now)
        since = now - self._sent_at
        turned = self.weights is not None and self._sent is not None and self.weights.turned(self._sent)
        if since < URGENT_EVERY_S and not turned:
            return
        busy, waiting = self._need_units()
        self._note_peak(busy + waiting, now)
        urgent = busy + waiting > self._held_units
        was_urgent = self._sent is not None and self._sent.urgent
        unlooked = now - self._looked_at
        if not turned and not (urgent and not was_urgent) and unlooked < (DEMAND_EVERY_S if self._sent else 0):
            return
        self._looked_at = now
        held = self._held_units
        cached = min(held, self._units(self.blocks.cached_blocks))
        weights = self.weights.demand(now) if self.weights is not None else {}
        news = (
            held,
            busy,
            waiting,
            max(self._peaks),
            cached,
            urgent,
            weights.get("asleep"),
            weights.get("spare_segments"),
        )
        if news == self._news and since < SAME_EVERY_S:
            return
        demand = Demand(
            held_units=held,
            busy_units=busy,
            waiting_units=waiting,
            peak_units=max(self._peaks),
            cached_units=cached,
            curve=self._reuse.curve(now, self._prefill.seconds_per_token or 0.0),
            urgent=urgent,
            stats=self._stats(),
            **weights,
        )
        self._sent, self._news, self._sent_at = demand, news, now
        self.link.send(demand)

    def _useful_units(self, now: float) -> int:
        """Units of cache beyond which more saves next to nothing, by the measured reuse curve."""
        if now - self._useful_at >= 1.0:
            self._useful_at = now
            curve = self._reuse.curve(now, self._prefill.seconds_per_token or 0.0)
            # Below a hundredth of a second saved per second, what reuse there is does not pay for keeping memory.
            self._useful = (
                next((u for u, s in enumerate(curve) if s >= 0.95 * curve[-1]), 0) if curve and curve[-1] > 0.01 else 0
            )
        return self._useful

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
        busy = self.blocks.busy_blocks
        together = min(self._units(busy + soon * self._groups), self._hello.ceiling_units)
        return self._units(busy), max(0, together - self._units(busy))

    def _note_peak(self, units: int, now: float) -> None:
        before, current = self._peaks
        if now - self._peak_since >= PEAK_WINDOW_S:
            before, current = (current, 0) if now - self._peak_since < 2 * PEAK_WINDOW_S else (0, 0)
            self._peak_since = now
        self._peaks = (before, max(current, units))

    def _units(self, blocks: int) -> int:
        return -(-blocks // self.blocks.unit_blocks)

    @property
    def _held_units(self) -> int:
        return len(self.blocks.mapped) if self.window is None else self.window.held_units

    def _stats(self) -> dict[str, float]:
        usable = self.blocks.usable_blocks
        return {
            **self.counters,
            "running": float(len(self._scheduler.running)),
            "waiting": float(len(self._scheduler.waiting)),
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
        return lent | (self.tiers.tiers.figures() if self.tiers is not None else {})

    # ------------------------------------------------------------------ plumbing

    def _in_transfer(self) -> bool:
        return self.tiers is not None and self.tiers.tiers.busy

    def _watch_scheduler(self) -> None:
        """Listens in on one scheduler object: tokens of each step, admissions and their prefix hits, preemptions."""
        scheduler, manager, counters = self._scheduler, self._scheduler.kv_cache_manager, self.counters
        schedule, admitted, preempt = scheduler.schedule, manager.record_prefix_cache_stats, scheduler._preempt_request

        def watched_schedule(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            self._step_tokens = output.total_num_scheduled_tokens
            dirty = self.lender.take_dirty() if self.lender is not None else []
            if dirty:  # bytes of another model: read as numbers they may be NaN
                output.new_block_ids_to_zero = [*(output.new_block_ids_to_zero or ()), *dirty]
            return output

        def watched_admission(request: Any, num_hits: int) -> None:
            admitted(request, num_hits)
            if not request.num_preemptions:
                counters["prefix_queries_tokens_total"] += request.num_tokens
                counters["prefix_hits_tokens_total"] += num_hits
                self._reuse.touch(request.block_hashes, time.monotonic())

        def watched_preemption(*args: Any, **kwargs: Any) -> None:
            counters["preemptions_total"] += 1
            preempt(*args, **kwargs)

        scheduler.schedule = watched_schedule
        manager.record_prefix_cache_stats = watched_admission
        scheduler._preempt_request = watched_preemption

    def _hello_again(self) -> Hello:
        """Hello on a new connection: what is really held, taken between two steps."""
        segments = self.weights.segments if self.weights is not None else []
        return replace(self._hello, held=dict(self._pages), held_segments=segments)

    def _by_unit(self, units: list[int], pages: list[list[int]]) -> dict[int, list[list[int]]]:
        size = self._hello.pages_per_unit
        return {unit: [rank[i * size : (i + 1) * size] for rank in pages] for i, unit in enumerate(units)}

    def _rpc(self, function: Any, *args: Any) -> list[Any]:
        answers: list[Any] = self._core.model_executor.collective_rpc(function, args=args)
        return answers


COUNTERS = (
    "prefix_queries_tokens_total",
    "prefix_hits_tokens_total",
    "preemptions_total",
    "polder_preemptions_total",
    "grows_total",
    "shrinks_total",
    "grow_seconds_total",
    "shrink_seconds_total",
    "grow_max_seconds",
    "shrink_max_seconds",
    "migrated_blocks_total",
    "evicted_blocks_total",
    "steps_total",
)
