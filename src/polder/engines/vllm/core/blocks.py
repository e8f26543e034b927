"""The scheduler's side of a resize: which block ids vLLM may use.

vLLM's BlockPool is made for the virtual size (the ceiling). Blocks of units without pages are parked: they are in no
queue and in no hash table. The pool stays vLLM's own class, so prefix hits, KV events, partial blocks and metrics work
as they do in stock vLLM.

Everything here runs between two steps, in the engine core's thread, and moves no byte. The caller, resizing.py, keeps
the order of the laws: physical before logical to grow, logical before physical to shrink.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from polder.engines.vllm import hooks
from polder.engines.vllm.core.compaction import Compaction, Ids, plan_compaction
from polder.engines.vllm.core.holders import BlockHolders
from polder.engines.vllm.core.preemption import free_deferred, last_loaded, last_running, preempt, unload
from polder.errors import IntegrityError

__all__ = ["BlockUnits", "BusyBlocks", "Shrink"]


@dataclass(frozen=True, kw_only=True)
class Shrink:
    """What a shrink did to the logical side, and what the workers must do now."""

    plan: Compaction
    evicted_blocks: int
    migrated_blocks: int
    preempted: tuple[str, ...]
    """Requests that lost their blocks. A step under way may still compute a token for them, which is dropped."""


class BusyBlocks(enum.Enum):
    """What may happen to blocks of running requests when their unit is given up."""

    MOVE = "move"
    """The runner's block tables can be rewritten."""
    STAY = "stay"
    """They cannot: requests in the way are preempted instead."""


class BlockUnits:
    """Grows and shrinks one live BlockPool by units of `unit_blocks` block ids."""

    def __init__(
        self, scheduler: Any, unit_blocks: int, mapped_units: list[int], busy: BusyBlocks, *, windowed_units: int = 0
    ) -> None:
        """Parks the blocks of all units that are not mapped. Before the first request. The last `windowed_units` are
        windowed.

        Raises ConfigError for a KV connector that cannot be told when blocks move.
        """
        self._busy_rule = busy
        self._scheduler = scheduler
        self.holders = BlockHolders(scheduler)
        """All who must be told when blocks get other ids."""
        self._manager = scheduler.kv_cache_manager
        self._pool = self._manager.block_pool
        self.unit_blocks = unit_blocks
        all_units = self._pool.num_gpu_blocks // unit_blocks
        self.virtual_units: int = all_units - windowed_units
        self.first_windowed: int = self.virtual_units * unit_blocks
        """The lowest windowed block, if there are any."""
        self.mapped: list[int] = sorted(mapped_units)
        """Regular units in use."""
        self.donors: dict[int, list[int]] = {}
        """Regular unit that is not in use, since its pages lie under windowed units -> these units, whose blocks are in
        use.

        Blocks of windowed units cost copies in every pass; their ids lie above all others.
        """
        if windowed_units:
            from polder.engines.vllm.core.region_queue import RegionQueue

            queue = RegionQueue(self._pool.free_block_queue.get_all_free_blocks(), self.first_windowed)
            hooks.put(self._pool, "free_block_queue", queue)
        for block in self._blocks(set(range(all_units)) - set(self.mapped)):
            self._pool.free_block_queue.remove(block)
        self._resized()

    # ------------------------------------------------------------------ sizes

    @property
    def windowed(self) -> list[int]:
        """Windowed units in use."""
        return [unit for units in self.donors.values() for unit in units]

    @property
    def held_units(self) -> int:
        """Regular units whose pages this engine has, in use or not."""
        return len(self.mapped) + len(self.donors)

    @property
    def usable_units(self) -> int:
        return len(self.mapped) + sum(map(len, self.donors.values()))

    @property
    def usable_blocks(self) -> int:
        return self.usable_units * self.unit_blocks

    @property
    def free_regular(self) -> int:
        """Free and not windowed; counted."""
        queue = self._pool.free_block_queue
        return int(queue.num_free_blocks - (queue.free_windowed if self.donors else 0))

    @property
    def busy_blocks(self) -> int:
        """Blocks that running requests hold, the null block included."""
        return int(self.usable_blocks - self._pool.get_num_free_blocks())

    @property
    def cached_blocks(self) -> int:
        return len(self._pool.cached_block_hash_to_block)

    def unmapped(self, count: int) -> list[int]:
        """The lowest `count` units that have no pages."""
        held = self.donors.keys() | self.mapped
        return [unit for unit in range(self.virtual_units) if unit not in held][:count]

    # ------------------------------------------------------------------ grow

    def offer(self, units: list[int]) -> None:
        """The units' pages are mapped and zeroed: their blocks may be used, before any cached block is evicted."""
        self._pool.free_block_queue.prepend_n(self._blocks(units))
        self.mapped = sorted([*self.mapped, *units])
        self._resized()

    # ------------------------------------------------------------------ windowed units

    def open(self, donors: dict[int, list[int]]) -> None:
        """Pages of regular units that are not in use lie under windowed ones: these may be used, when all others
        are."""
        self._pool.free_block_queue.append_n(self._blocks(unit for units in donors.values() for unit in units))
        self.donors |= donors
        self._resized()

    def close(self, donors: list[int]) -> int:
        """Takes windowed units out of use, of which no block is busy. Returns how many cached blocks were lost."""
        evicted = 0
        blocks = self._blocks(unit for donor in donors for unit in self.donors.pop(donor))
        self._pool._notify_reuse(blocks)
        for block in blocks:
            evicted += self._pool._maybe_evict_cached_block(block)
            self._pool.free_block_queue.remove(block)
        self._resized()
        self.holders.renumber({}, lost=[block.block_id for block in blocks])
        return evicted

    def idle_donors(self) -> list[int]:
        """Donors whose windowed units have no busy block."""
        return [
            donor for donor, units in self.donors.items() if all(block.ref_cnt == 0 for block in self._blocks(units))
        ]

    def windowed_of(self, request_id: str) -> list[int]:
        """Ids of the windowed blocks that a request holds."""
        return [
            block.block_id
            for manager in self._manager.coordinator.single_type_managers
            for block in manager.req_to_blocks.get(request_id, ())
            if block.block_id >= self.first_windowed
        ]

    def bring_home(self, sources: list[int]) -> list[int]:
        """Busy windowed blocks become regular ones, the coldest free of these: their ids. None is brought if not all
        can be."""
        free = [b for b in self._pool.free_block_queue.get_all_free_blocks() if b.block_id < self.first_windowed]
        ids = np.array(sources, dtype=np.int64)
        if len(free) < len(sources) or self._busy_rule is BusyBlocks.STAY or len(self._immovable(ids)):
            return []
        moved: dict[int, int] = {}
        self._pool._notify_reuse(free[: len(sources)])
        for source, target in zip(sources, free, strict=False):
            self._pool._maybe_evict_cached_block(target)
            self._move(self._pool.blocks[source], target)
            self._pool.free_block_queue.append(self._pool.blocks[source])
            moved[source] = target.block_id
        self.holders.renumber(moved)
        return list(moved.values())

    # ------------------------------------------------------------------ shrink

    def shrink(self, count: int, floor_units: int) -> Shrink:
        """Takes up to `count` units out of use without disturbing a running request."""
        return self._apply(self._plan(min(count, len(self.mapped) - floor_units)), preempted=())

    def shrink_preempting(self, count: int, floor_units: int, await_steps: Callable[[], object]) -> Shrink:
        """The same, preempting requests from the back of the queue until `count` units can go: those that run, then
        those that wait with KV from a tier.

        A request may be in a step under way, whose writes vLLM waits for before it frees the blocks, if a connector
        could fill them meanwhile. `await_steps` returns when all steps launched so far are over: then the blocks are
        free at once.
        """
        count = min(count, len(self.mapped) - floor_units)
        preempted: list[str] = []
        while len((plan := self._plan(count)).units) < count:
            if getattr(self._scheduler, "deferred_frees", None):
                await_steps()
                free_deferred(self._scheduler)
            elif self._scheduler.running:
                request = last_running(self._scheduler)
                preempt(self._scheduler, request)
                preempted.append(str(request.request_id))
            elif loaded := last_loaded(self._scheduler):
                unload(self._scheduler, loaded)
            else:
                break
        return self._apply(plan, preempted=tuple(preempted))

    def check_integrity(self) -> None:
        """Raises IntegrityError unless mapped blocks = busy + free, and nothing of an unmapped unit is in use or
        cached."""
        free = {block.block_id for block in self._pool.free_block_queue.get_all_free_blocks()}
        mapped = {block.block_id for block in self._blocks([*self.mapped, *self.windowed])}
        busy = {b.block_id for b in self._pool.blocks if b.ref_cnt > 0 or b.is_null}
        if len(free) != self._pool.get_num_free_blocks() or free & busy or free | busy != mapped:
            raise IntegrityError(
                f"{len(mapped)} blocks mapped, {len(busy)} busy, {len(free)} free, {len((free | busy) ^ mapped)} out of place"
            )
        stray = [b.block_id for b in self._pool.blocks if b.block_id not in mapped and b.block_hash is not None]
        if stray:
            raise IntegrityError(f"blocks {stray[:8]} are cached, but not mapped")

    # ------------------------------------------------------------------ inside

    def _blocks(self, units: Iterable[int]) -> list[Any]:
        size = self.unit_blocks
        return [block for unit in units for block in self._pool.blocks[unit * size : (unit + 1) * size]]

    def _resized(self) -> None:
        # Read by get_usage(), reset_prefix_cache() and admission only; ids still run up to the virtual size.
        self._pool.num_gpu_blocks = self.usable_blocks
        self._manager.watermark_blocks = int(self._scheduler.scheduler_config.watermark * self.usable_blocks)

    def _plan(self, count: int) -> Compaction:
        everything = self._pool.free_block_queue.get_all_free_blocks()
        free_blocks = [block for block in everything if block.block_id < self.first_windowed]
        free = np.array([b.block_id for b in free_blocks], dtype=np.int64)
        mapped_units = np.array(self.mapped, dtype=np.int64)
        ids = (mapped_units[:, None] * self.unit_blocks + np.arange(self.unit_blocks)).ravel()
        busy = np.setdiff1d(ids, free, assume_unique=True)
        return plan_compaction(
            count=count,
            mapped_units=mapped_units,
            unit_blocks=self.unit_blocks,
            busy=busy,
            immovable=self._immovable(busy),
            free_coldest_first=free,
            cached=np.array([b.block_hash is not None for b in free_blocks], dtype=np.bool_),
        )

    def _immovable(self, busy: Ids) -> Ids:
        return busy if self._busy_rule is BusyBlocks.STAY else self.holders.unknown(busy)

    def _apply(self, plan: Compaction, preempted: tuple[str, ...]) -> Shrink:
        pool, queue = self._pool, self._pool.free_block_queue
        evicted = 0
        gone = set(plan.units.tolist())
        if pool._reuse_watchers:
            touched = np.concatenate([plan.evicted, plan.parked, plan.sources, plan.targets])
            pool._notify_reuse([pool.blocks[i] for i in touched.tolist()])
        for number in plan.evicted.tolist():
            evicted += pool._maybe_evict_cached_block(pool.blocks[number])  # the hash entries go, KV events are sent
        for number in plan.parked.tolist():
            queue.remove(pool.blocks[number])
        moved = dict(zip(plan.sources.tolist(), plan.targets.tolist(), strict=True))
        for source, target in moved.items():
            self._move(pool.blocks[source], pool.blocks[target])
        self.holders.renumber(moved, lost=[*plan.evicted.tolist(), *plan.parked.tolist()])
        self.mapped = [unit for unit in self.mapped if unit not in gone]
        self._resized()
        return Shrink(plan=plan, evicted_blocks=evicted, migrated_blocks=len(moved), preempted=preempted)

    def _move(self, source: Any, target: Any) -> None:
        """`target`, free and unhashed, becomes what `source` is: same references, same hashes, same place in the free
        queue."""
        self._pool.free_block_queue.remove(target)
        if source.ref_cnt > 0:
            target.ref_cnt, source.ref_cnt = source.ref_cnt, 0
        else:
            # Not by remove + append: the place in the queue is the block's age, which decides what is evicted first.
            before, after = source.prev_free_block, source.next_free_block
            target.prev_free_block, target.next_free_block = before, after
            before.next_free_block = after.prev_free_block = target
            source.prev_free_block = source.next_free_block = None
        self._pool.move_block_hashes(source, target)
