"""Grants and recalls of KV pages, carried out by the workers, in the order of the laws.

    grow    workers map and zero the pages   ->  block ids join the free queue  ->  Grown
    shrink  block ids leave queue and hashes ->  workers move, fence, unmap     ->  Returned

Each is one RPC, which vLLM's own queue orders with the steps: no step ever runs with blocks whose pages are not mapped.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from polder.broker.wire import Grant, Grown, Hello, Message, Pages, Recall, Returned
from polder.engines.vllm.core.blocks import BlockUnits
from polder.engines.vllm.core.resident import ResidentWeights
from polder.engines.vllm.core.subsystem import Subsystem
from polder.engines.vllm.core.transfers import Transfers
from polder.engines.vllm.rank import calls

__all__ = ["Resizing"]

logger = logging.getLogger("polder.engine")


class Resizing:
    """One engine core's. Its methods run between two steps."""

    def __init__(
        self,
        blocks: BlockUnits,
        hello: Hello,
        *,
        rpc: Callable[..., list[Any]],
        send: Callable[[Message], None],
        subsystems: Sequence[Subsystem],
        transfers: Transfers,
        weights: ResidentWeights,
        counters: dict[str, float],
    ) -> None:
        """`hello`: floor and sizes. Counts in `counters`."""
        self._blocks, self._hello, self._rpc, self._send = blocks, hello, rpc, send
        self._subsystems, self._transfers, self._weights = subsystems, transfers, weights
        self._counters = counters
        self._recalls: list[Recall] = []
        """Not carried out yet."""
        self.generation = 0
        """The broker's, which the workers need with page numbers."""
        self.pages: dict[int, list[list[int]]] = {}
        """Unit -> its pages, per rank, as the broker numbers them."""

    def book(self, generation: int, units: Sequence[int], pages: Pages) -> None:
        """The broker's account of these units, after Hello."""
        self.generation, self.pages = generation, self._by_unit(units, pages)

    def held(self) -> Pages:
        """All pages per rank, by rising unit."""
        return self._by_rank([self.pages[unit] for unit in sorted(self.pages)])

    def grow(self, grant: Grant) -> None:
        """Maps the pages, or gives them back."""
        started = time.perf_counter()
        units = self._blocks.unmapped(grant.units)
        errors = ["already at the ceiling"]
        if len(units) == grant.units:
            errors = list(filter(None, self._rpc(calls.map_units, self.generation, units, grant.pages)))
            if errors:
                self._rpc(calls.unmap_units, self.generation, units)  # some ranks may have mapped theirs
        if errors:
            logger.warning("cannot map %d units: %s", grant.units, "; ".join(errors))
            self._send(Returned(lease=grant.lease, use="kv", pages=grant.pages))
            return
        added = self._by_unit(units, grant.pages)
        self.pages |= added
        for part in self._subsystems:
            part.on_mapped(added)
        self._blocks.offer(units)
        self._send(Grown(lease=grant.lease))
        self._count("grows_total", "grow_seconds_total", "grow_max_seconds", started)

    def recall(self, recall: Recall) -> None:
        """To be carried out by `settle`."""
        self._recalls.append(recall)

    def settle(self) -> None:
        """Gives recalled memory back, as soon as no transfer of the tiers reads or writes a block that may have to
        move."""
        if not self._recalls:
            return
        if self._transfers.busy:
            self._transfers.hold()  # no new ones; the engine keeps stepping until the last has ended
            return
        recalls, self._recalls = self._recalls, []
        for recall in recalls:
            self.shrink(recall)
        self._transfers.resume()

    def shrink(self, recall: Recall) -> None:
        """Gives up as many units as it can, at most as many as the broker wants."""
        started = time.perf_counter()
        for part in self._subsystems:
            part.before_shrink()
        asleep = self._weights.asleep
        # Requests of a model that was paused: their memory goes too, if whoever runs now needs it.
        floor = 1 if asleep else self._hello.floor_units - len(self._blocks.donors)
        if recall.preempt or asleep:
            await_steps = functools.partial(self._rpc, calls.await_steps)
            done = self._blocks.shrink_preempting(recall.units, max(1, floor), await_steps)
        else:
            done = self._blocks.shrink(recall.units, max(1, floor))
        if done.preempted:
            self._rpc(calls.forget_outputs, done.preempted)
        units, plan = done.plan.units.tolist(), done.plan
        if units:
            for part in self._subsystems:
                part.before_unmap(units)
            self._rpc(calls.unmap_units, self.generation, units, plan.sources.tolist(), plan.targets.tolist())
        pages = self._by_rank([self.pages.pop(unit) for unit in units])
        self._send(Returned(lease=recall.lease, use="kv", pages=pages, short=recall.units - len(units)))
        self._counters["evicted_blocks_total"] += done.evicted_blocks
        self._counters["migrated_blocks_total"] += done.migrated_blocks
        self._counters["giveback_preemptions_total"] += len(done.preempted)
        if units:
            self._count("shrinks_total", "shrink_seconds_total", "shrink_max_seconds", started)

    def _count(self, times: str, seconds: str, longest: str, started: float) -> None:
        elapsed = time.perf_counter() - started
        self._counters[times] += 1
        self._counters[seconds] += elapsed
        self._counters[longest] = max(self._counters[longest], elapsed)

    def _by_unit(self, units: Sequence[int], pages: Pages) -> dict[int, list[list[int]]]:
        size = self._hello.pages_per_unit
        return {unit: [rank[i * size : (i + 1) * size] for rank in pages] for i, unit in enumerate(units)}

    def _by_rank(self, units: list[list[list[int]]]) -> Pages:
        """The pages of some units, per rank."""
        return [[page for unit in units for page in unit[rank]] for rank in range(len(self._hello.devices))]
