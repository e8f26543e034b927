"""The engine core's side of sparse reading: which requests decode sparsely, and which blocks they hold.

A prompt is computed as always. Between two steps, when a request that asks for it has its whole prompt computed:

    store    workers cluster the prefix into units and keep them in host memory, unless a stored prefix is found again
    enter    the request's middle blocks go back to the pool, where they stay in the prefix cache as what they are: exact.
             A few blocks from the pool become its slots, and take the first places of the middle in its list; the null
             block takes the others
    leave    it ends, is preempted, or its estimated unread share is above the limit: then it is preempted and computed
             again, and decodes over all of its KV from then on

What a sparse request computes is not exact, so its blocks enter no cache from `enter` on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from polder import metrics
from polder.engines.vllm.core.blocks import BlockUnits
from polder.engines.vllm.core.preemption import preempt
from polder.engines.vllm.core.subsystem import Subsystem
from polder.engines.vllm.rank import calls
from polder.engines.vllm.settings import EngineSettings
from polder.engines.vllm.sparse import calls as sparse_calls
from polder.engines.vllm.sparse.ask import Ask, ask_of, asks
from polder.engines.vllm.sparse.stored import Entry, StoredPrefixes
from polder.engines.vllm.sparse.worker import STEPS
from polder.errors import ConfigError
from polder.sparse.budget import Layout, layout_of
from polder.sparse.methods import Method

__all__ = ["CoreSparse"]

logger = logging.getLogger("polder.engine")

SINK_TOKENS, WINDOW_TOKENS = 32, 256
"""The first and last tokens of a prefix, which every step reads."""
FLOOR_TOKENS = 256
"""A step selects at least so many."""
NEVER = 1 << 40
"""Blocks: more than any request has."""


@dataclass(kw_only=True)
class Reading:
    """A request that decodes sparsely, or has done so."""

    ask: Ask
    prefix: Entry
    preemptions: int
    """Of the request when it began."""
    units: int
    selected: int
    slots: int
    steps: int = 0
    unread: float = 0.0
    """Sum over the steps."""
    worst: float = 0.0
    read: int = 0
    failed: int = 0
    """Units."""


class CoreSparse(Subsystem):
    """Its methods run between two steps, in the core's thread."""

    def __init__(
        self,
        scheduler: Any,
        settings: EngineSettings,
        blocks: BlockUnits,
        rpc: Callable[..., list[Any]],
        *,
        block_tokens: int,
        block_bytes: int,
    ) -> None:
        """`block_bytes`: of a block in all layers, on one rank. Raises ConfigError when a worker cannot."""
        self._scheduler, self._settings, self._blocks, self._rpc = scheduler, settings, blocks, rpc
        self._manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self._pool = scheduler.kv_cache_manager.block_pool
        self._block_tokens = block_tokens
        errors = list(filter(None, rpc(sparse_calls.install)))
        if errors:
            raise ConfigError(errors[0])
        ranks = scheduler.vllm_config.parallel_config.world_size
        self._stored = StoredPrefixes(
            settings.sparse_bytes // ranks, block_bytes, sum(size for _, size in settings.sparse_disks) // ranks
        )
        self._reading: dict[str, Reading] = {}
        self._dense: dict[str, str] = {}
        """Request that asked, and stays dense -> why."""
        self._told: dict[str, Reading] = {}
        """Of requests that left: what their answers say."""
        self._preempted: list[str] = []
        self.counters = metrics.zeros(metrics.SPARSE)

    def on_arrival(self, request: Any) -> None:
        """A prompt whose KV is in the prefix cache is computed again, once, where no prefix of it is stored in units:
        these are made by the metric of its own queries, which nobody has kept."""
        if asks(request.sampling_params) is None:
            return
        with contextlib.suppress(ConfigError):  # said in its answer
            ask, layout = ask_of(request.sampling_params), self._layout(request)
            if ask is not None and layout is not None:
                found = self._stored.find(request.block_hashes, layout, ask.method)
                request.skip_reading_prefix_cache |= found is None

    def on_reset(self) -> None:
        """The prefix cache was told to forget, for example since the weights are others now."""
        self._rpc(sparse_calls.forget, self._stored.clear())

    # ------------------------------------------------------------------ between two steps

    def between_steps(self, now: float) -> None:
        for request in list(self._scheduler.running):
            name = request.request_id
            if name in self._reading:
                self._fall_back(request)
            elif asks(request.sampling_params) is not None and name not in self._dense and _is_computed(request):
                self._consider(request)

    def after_schedule(self, output: Any) -> None:
        """Requests that were preempted hold no slots in this step."""
        requests = self._scheduler.requests
        gone = [
            name
            for name, reading in self._reading.items()
            if name not in requests or requests[name].num_preemptions != reading.preemptions
        ]
        if gone:
            self._leave(gone)

    def before_update(self, output: Any, runner_output: Any) -> None:
        for name, (unread, wanted, read, failed) in getattr(runner_output, STEPS, {}).items():
            self.counters["sparse_tokens_total"] += 1
            self.counters["sparse_wanted_units_total"] += wanted
            self.counters["sparse_read_units_total"] += read
            self.counters["sparse_failed_units_total"] += failed
            self.counters["sparse_unread_ratio"] = unread
            reading = self._reading.get(name)
            if reading is not None:
                reading.steps += 1
                reading.unread += unread
                reading.worst = max(reading.worst, unread)
                reading.read += read
                reading.failed += failed

    def after_update(self, output: Any, outputs: Any) -> None:
        """Answers say how they were made."""
        for of_client in outputs.values():
            for each in of_client.outputs:
                if each.finish_reason is not None:
                    self._answer(each)

    def stats(self, now: float) -> dict[str, float]:
        return {
            **self.counters,
            "sparse_prefixes": float(len(self._stored)),
            "sparse_used_bytes": float(self._stored.used_bytes),
            "sparse_running_requests": float(len(self._reading)),
        }

    # ------------------------------------------------------------------ enter

    def _consider(self, request: Any) -> None:
        name = request.request_id
        try:
            ask = ask_of(request.sampling_params)
        except ConfigError as fault:
            self._stay_dense(name, str(fault))
            return
        layout = self._layout(request)
        if ask is None or layout is None:
            self._stay_dense(name, f"the prompt has {request.num_prompt_tokens} tokens")
            return
        began = time.monotonic()
        if error := self._enter(request, ask, layout):
            self._stay_dense(name, error)
        self.counters["sparse_store_seconds_total"] += time.monotonic() - began

    def _enter(self, request: Any, ask: Ask, layout: Layout) -> str:
        """Returns why it stays dense; "" if it does not."""
        name = request.request_id
        blocks = self._manager.req_to_blocks[name]
        ids = [block.block_id for block in blocks]
        key, layout, error = self._prefix(request, ids, layout, ask.method)
        if error:
            return error
        selected = ask.budget.units(layout.units, unit_tokens=layout.unit_tokens, floor_tokens=FLOOR_TOKENS)
        count = min(layout.units, round(selected * ask.slots))
        middle = blocks[layout.sink_blocks : layout.end_block]
        # What lies in slots is read in every step: no windowed blocks.
        own = sum(block.ref_cnt == 1 and block.block_id < self._blocks.first_windowed for block in middle)
        if count > self._blocks.free_regular + own:
            return "no blocks for its slots"
        self._pool.free_blocks(reversed(middle))
        slots = self._pool.get_new_blocks(count)
        # The bytes of the middle are read from the units, so slots may be blocks of the middle.
        slot_ids = [block.block_id for block in slots]
        tokens = request.num_computed_tokens
        if error := self._errors(sparse_calls.enter, name, key, ids, slot_ids, tokens, selected):
            self._undo(request, layout, slots)
            return error
        blocks[layout.sink_blocks : layout.end_block] = slots + [self._pool.null_block] * (layout.units - count)
        self._manager.num_cached_block[name] = NEVER  # what it computes from now on is not exact
        self._reading[name] = Reading(
            ask=ask,
            prefix=self._stored.use(key),
            preemptions=request.num_preemptions,
            units=layout.units,
            selected=selected,
            slots=count,
        )
        self.counters["sparse_requests_total"] += 1
        return ""

    def _prefix(self, request: Any, ids: list[int], layout: Layout, method: Method) -> tuple[bytes, Layout, str]:
        """(key of its stored prefix, its layout, what was wrong)."""
        found = self._stored.find(request.block_hashes, layout, method)
        if found is not None:
            self.counters["sparse_reused_total"] += 1
            return *found, ""
        key, evicted = self._stored.add(request.block_hashes, layout, method, request.request_id)
        if evicted:
            self._rpc(sparse_calls.forget, evicted)
        if not key:
            return key, layout, "no room for another prefix in POLDER_SPARSE"
        error = self._errors(sparse_calls.store_prefix, request.request_id, key, ids, layout, method)
        if error:
            self._stored.remove(key)
            self._rpc(sparse_calls.forget, [key])
        return key, layout, error

    def _layout(self, request: Any) -> Layout | None:
        """None: the prompt is too short."""
        tokens = request.num_prompt_tokens
        if tokens < self._settings.sparse_least_tokens:
            return None
        return layout_of(tokens, unit_tokens=self._block_tokens, sink_tokens=SINK_TOKENS, window_tokens=WINDOW_TOKENS)

    def _undo(self, request: Any, layout: Layout, slots: list[Any]) -> None:
        """Its middle is in the pool already, and may be overwritten: it is computed again."""
        blocks = self._manager.req_to_blocks[request.request_id]
        blocks[layout.sink_blocks : layout.end_block] = slots + [self._pool.null_block] * (layout.units - len(slots))
        self._preempt(request)
        self._rpc(sparse_calls.leave, [request.request_id])

    def _errors(self, call: Any, *args: Any) -> str:
        return str(next(filter(None, self._rpc(call, *args)), ""))

    # ------------------------------------------------------------------ leave

    def _fall_back(self, request: Any) -> None:
        """A request whose last step may have missed too much of its attention decodes densely from now on."""
        reading = self._reading[request.request_id]
        limit = self._settings.sparse_most_unread
        if reading.worst <= limit or request.num_preemptions != reading.preemptions:
            return
        logger.warning(
            "%s: an estimated %.2f of its attention was not read: it is dense from now on",
            request.request_id,
            reading.worst,
        )
        self._dense[request.request_id] = f"an estimated {reading.worst:.2f} of its attention was not read"
        self.counters["sparse_fallbacks_total"] += 1
        self._preempt(request)
        self._leave([request.request_id])

    def _preempt(self, request: Any) -> None:
        preempt(self._scheduler, request)
        self._rpc(calls.forget_outputs, [request.request_id])

    def _leave(self, names: Sequence[str]) -> None:
        for name in names:
            self._told[name] = self._reading.pop(name)
            self._told[name].prefix.readers -= 1
        self._rpc(sparse_calls.leave, list(names))
        self._forget_aborted()

    def _stay_dense(self, name: str, why: str) -> None:
        self._forget_aborted()
        self._dense[name] = why
        self.counters["sparse_refused_total"] += 1
        logger.info("%s: stays dense: %s", name, why)

    def _forget_aborted(self) -> None:
        """Those that will never have an answer."""
        alive = self._scheduler.requests
        self._dense = {name: why for name, why in self._dense.items() if name in alive}
        self._told = {name: reading for name, reading in self._told.items() if name in alive}

    def _answer(self, output: Any) -> None:
        name = output.request_id
        reading = self._reading.get(name) or self._told.pop(name, None)
        why = self._dense.pop(name, "")
        told: dict[str, Any] = {}
        if reading is not None:
            told = {
                "sparse": str(reading.ask.budget),
                "sparse_tokens": reading.steps,
                "units": reading.units,
                "selected_units": reading.selected,
                "slots": reading.slots,
                "unread": round(reading.unread / max(1, reading.steps), 4),
                "unread_most": round(reading.worst, 4),
                "read_units": reading.read,
                "failed_units": reading.failed,
            }
        if why:
            told["dense"] = why
        if told:
            output.kv_transfer_params = {**(output.kv_transfer_params or {}), "polder": told}


def _is_computed(request: Any) -> bool:
    """Whether all its tokens but the last have KV, or will have when the steps under way have ended."""
    computed = request.num_computed_tokens
    return bool(computed >= request.num_prompt_tokens and computed >= request.num_tokens - 1)
