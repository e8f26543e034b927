"""The engine core's side of the window: opened for a request that would not fit, closed when no request needs it.

All units are regular at first. When a request needs more blocks than all regular units have, as few of these as
possible become donors (window/regions.py). The request's last blocks are the windowed ones. Between two steps:

    open         blocks leave the donors, as in a shrink; workers map the donors' pages under windowed units; the block
                 ids of these join the free queue
    bring home   a decoding request's windowed blocks become regular ones as soon as enough are free: then its steps
                 need no copies
    close        windowed units without a busy block leave the free queue and the prefix cache; workers map the pages
                 under the donors again, whose block ids join the free queue

The window stays open while memory is ample, since windowed blocks may hold a prefix that comes again. It is closed when
requests wait that need no window, and when the broker wants memory.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from polder import metrics
from polder.engines.vllm.core.blocks import BlockUnits
from polder.engines.vllm.core.holders import NewIds
from polder.engines.vllm.core.preemption import preempt, unload
from polder.engines.vllm.core.subsystem import Subsystem
from polder.engines.vllm.core.transfers import Transfers
from polder.engines.vllm.rank import calls
from polder.engines.vllm.window import calls as window_calls
from polder.engines.vllm.window import runner as window_runner
from polder.engines.vllm.window.agreement import WindowAgreement
from polder.errors import ConfigError

__all__ = ["CoreWindow"]

logger = logging.getLogger("polder.engine")

GRACE_S = 0.3
"""The broker has so long to give what would make a window unnecessary."""
RETRY_S = 5.0
"""After pages could not be mapped."""
HOME_EVERY_S = 0.5
STEPS_UNDER_WAY = 4
"""At most."""
MOST_WAITING = 64
MOST_TRIES = 3
"""A request whose blocks were lost so often, without a token in between, fails. With async scheduling twice as often:
the core can hear of one loss twice, since the next step is launched by then and goes on from it."""


class CoreWindow(Subsystem):
    """The window of one engine. Its methods run between two steps, in the core's thread."""

    def __init__(
        self,
        scheduler: Any,
        blocks: BlockUnits,
        agreement: WindowAgreement,
        rpc: Callable[..., list[Any]],
        transfers: Transfers,
    ) -> None:
        """Opens the store in all workers. Raises ConfigError when one of them cannot."""
        self._scheduler, self._blocks, self._rpc = scheduler, blocks, rpc
        self._shape, self._block_tokens = agreement.shape, agreement.block_tokens
        self._ceiling, self._transfers = agreement.regular_units, transfers
        self._wanted_since: float | None = None
        self._refused_until = float("-inf")
        self._brought_home_at = float("-inf")
        self._most_tries = MOST_TRIES * (2 if isinstance(scheduler, AsyncScheduler) else 1)
        self._tries: dict[str, tuple[int, int]] = {}
        """Request -> tokens it had when its blocks were lost last, and how often that was without a token more."""
        self._updates = 0
        self._moved: list[tuple[int, dict[int, int]]] = []
        """(number of the update before, old id -> new) of blocks that moved of late: a step that was under way then
        names them as they were."""
        self._failed: list[Any] = []
        """Requests that have ended with an error, and whose clients were not told yet."""
        self._rank_stats: dict[str, float] = {}
        self._worked = True
        self.counters = metrics.zeros(metrics.WINDOW)
        for error in rpc(window_calls.install):
            if error:
                raise ConfigError(f"the window's store: {error}")
        blocks.holders.register(self._renumber)

    def between_steps(self, now: float) -> None:
        """Opens, closes, brings home: only while no transfer of the tiers reads or writes a block that may have to
        move."""
        if self._transfers.busy:
            if self.pressing():
                self._transfers.hold()
            return
        self.tick(now)
        self._transfers.resume()

    def before_shrink(self) -> None:
        self.close_idle()

    def pressing(self) -> bool:
        """Whether a request has no room without more windowed units."""
        return self._wanted_units() > self._blocks.usable_units

    def tick(self, now: float) -> None:
        """Opens, closes, brings home, as the requests of this moment need it. To be called between steps; mostly does
        nothing."""
        wanted = self._wanted_units()
        if wanted > self._blocks.usable_units:
            self._open(wanted, now)
        else:
            self._wanted_since = None
        if self._blocks.donors:
            self._worked = True
            self._bring_home(now)
            if wanted <= self._blocks.held_units and self._pressed():
                self.close_idle()

    def close_idle(self) -> None:
        """Donors whose windowed units hold no busy block become regular again; what these have cached is lost."""
        donors = self._blocks.idle_donors()
        if not donors:
            return
        self._blocks.close(donors)
        self._rpc(window_calls.close_units, donors)
        self._blocks.offer(donors)
        self.counters["window_closes_total"] += 1
        logger.info("window: %d units are regular again", len(donors))

    def stats(self, now: float) -> dict[str, float]:
        """Counters and gauges; asks the workers only if they may have news, for a message keeps them spinning for a
        second."""
        if self._worked:
            ranks: list[dict[str, float]] = self._rpc(window_calls.figures)
            self._rank_stats = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
            self._worked = False
        return {
            **self.counters,
            **self._rank_stats,
            "window_carriers": float(len(self._blocks.donors)),
            "window_units": float(len(self._blocks.windowed)),
        }

    # ------------------------------------------------------------------ inside

    def _wanted_units(self) -> int:
        """Units that the longest request needs alone. One more where it would need all: a donor is emptied into it."""
        scheduler = self._scheduler
        # Those that wait with blocks have a part of their KV from a tier: they need the rest, and nobody is preempted for it.
        requests = [*scheduler.running, *scheduler.kv_holding_waiting, *islice(scheduler.waiting, 1)]
        # With async scheduling a step may be under way whose tokens are not known yet.
        longest = max((request.num_tokens + request.num_output_placeholders for request in requests), default=0)
        blocks = -(-(longest + 1) // self._block_tokens) + 1  # the null block
        wanted = -(-blocks // self._blocks.unit_blocks)
        return wanted + 1 if wanted >= self._blocks.usable_units else wanted

    def _open(self, wanted: int, now: float) -> None:
        if now < self._refused_until:
            return
        if self._blocks.held_units < self._ceiling:
            self._wanted_since = now if self._wanted_since is None else self._wanted_since
            if now - self._wanted_since < GRACE_S:
                return
        enough = self._shape.donors_for(self._blocks.held_units, wanted)
        if enough is None:  # one to spare is a wish
            enough = self._shape.donors_for(self._blocks.held_units, wanted - 1)
        if enough is None or enough <= len(self._blocks.donors):
            return
        done = self._blocks.shrink(enough - len(self._blocks.donors), 1)
        donors, plan = done.plan.units.tolist(), done.plan
        if not donors:
            return
        each, first, used = self._shape.units_of_donor, self._blocks.virtual_units, set(self._blocks.windowed)
        unused = [unit for unit in range(first, first + self._shape.store_units) if unit not in used]
        units = {donor: unused[at * each : (at + 1) * each] for at, donor in enumerate(donors)}
        moves = plan.sources.tolist(), plan.targets.tolist()
        errors = list(filter(None, self._rpc(window_calls.open_units, units, *moves)))
        if errors:
            logger.warning("window: cannot be opened: %s", errors[0])
            self._rpc(window_calls.close_units, donors)  # of ranks that could
            self._blocks.offer(donors)
            self._refused_until = now + RETRY_S
            return
        self._blocks.open(units)
        self.counters["window_opens_total"] += 1
        logger.info("window: %d units carry %d now", len(self._blocks.donors), len(self._blocks.windowed))

    def _pressed(self) -> bool:
        """Whether requests hold windowed blocks, or would have to."""
        if len(self._blocks.idle_donors()) < len(self._blocks.donors):
            return True
        waiting = islice(self._scheduler.waiting, MOST_WAITING)
        wanted = sum(-(-(request.num_tokens + 1) // self._block_tokens) for request in waiting)
        return bool(wanted > self._blocks.free_regular)

    def _bring_home(self, now: float) -> None:
        if now - self._brought_home_at < HOME_EVERY_S:
            return
        self._brought_home_at = now
        for request in self._scheduler.running:
            if request.is_prefill_chunk:
                continue
            sources = self._blocks.windowed_of(request.request_id)
            targets = self._blocks.bring_home(sources) if sources else []
            if not targets:
                continue
            errors = list(filter(None, self._rpc(window_calls.bring_home, sources, targets)))
            self.counters["window_home_blocks_total"] += len(targets)
            if errors:
                logger.warning("window: %s", errors[0])
                self._drop(set(targets))
            return

    # ------------------------------------------------------------------ lost blocks

    def before_update(self, output: Any, runner_output: Any) -> None:
        """Drops the blocks that the step has lost."""
        lost = set(getattr(runner_output, window_runner.DOUBTFUL, ()))
        moved = {after for _, moves in self._moved for before, after in moves.items() if before in lost}
        if lost:
            self._drop(lost | moved)
        self._updates += 1
        self._moved = [entry for entry in self._moved if self._updates - entry[0] < STEPS_UNDER_WAY]

    def after_update(self, output: Any, outputs: Any) -> None:
        if self._failed:
            self._tell(outputs)

    def _renumber(self, new: NewIds) -> None:
        """Blocks have moved: home, or out of a unit that was given up."""
        self._moved = [
            (number, {old: int(new[now]) for old, now in moves.items() if new[now]}) for number, moves in self._moved
        ]
        changed = np.flatnonzero(new != np.arange(len(new))).tolist()
        self._moved.append((self._updates, {old: int(new[old]) for old in changed if new[old]}))

    def _drop(self, lost: set[int]) -> None:
        """Requests with such a block start over, or fail, and the prefix cache forgets all of theirs."""
        from vllm.v1.request import RequestStatus

        scheduler, failing = self._scheduler, set()
        manager, in_step = scheduler.kv_cache_manager, set()
        # Those that wait with blocks may have hit some that a running request was only about to compute.
        for request in [*scheduler.running, *scheduler.kv_holding_waiting]:
            ids = {block for group in manager.get_block_ids(request.request_id) for block in group}
            if not ids & lost:
                continue
            manager.evict_blocks(ids)
            self.counters["window_lost_total"] += 1
            if request.status == RequestStatus.RUNNING:
                in_step.add(request.request_id)
            if not self._start_over(request):
                failing.add(request.request_id)
        manager.evict_blocks(lost)
        if in_step:
            self._rpc(calls.forget_outputs, sorted(in_step))
        if failing:
            logger.error("window: requests %s lost their KV and cannot start over: they fail", sorted(failing))
            self._failed += scheduler.finish_requests(failing, RequestStatus.FINISHED_ERROR)
        self._tries = {name: tries for name, tries in self._tries.items() if name in scheduler.requests}

    def _start_over(self, request: Any) -> bool:
        """Takes a request's blocks from it, so that it looks for a prefix again. False: it must fail."""
        from vllm.v1.request import RequestStatus

        scheduler = self._scheduler
        match request.status:
            case RequestStatus.RUNNING:
                preempt(scheduler, request)
                tokens, times = self._tries.get(request.request_id, (0, 0))
                times = times + 1 if request.num_tokens == tokens else 1
                self._tries[request.request_id] = request.num_tokens, times
                return times < self._most_tries
            case RequestStatus.WAITING_FOR_STREAMING_REQ:
                return False  # vLLM cuts such a session to what is computed: it would go on without its past
            case RequestStatus.WAITING_FOR_REMOTE_KVS:
                # As if its load had failed: vLLM frees the blocks when that has ended, for until then it writes to them.
                scheduler.failed_recving_kv_req_ids.add(request.request_id)
            case _:  # has loaded, and there was no room for the rest
                unload(scheduler, request)
                return True
        request.num_computed_tokens = 0
        scheduler._inflight_prefills.discard(request)  # or its next load would have to leave room for itself
        return True

    def _tell(self, outputs: Any) -> None:
        """The clients of requests that have failed."""
        from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs

        failed, self._failed = self._failed, []
        for request in failed:
            of_client = outputs.setdefault(request.client_index, EngineCoreOutputs(outputs=[]))
            of_client.outputs.append(
                EngineCoreOutput(
                    request_id=request.request_id, new_token_ids=[], finish_reason=request.get_finished_reason()
                )
            )
