"""Everybody in the engine core who keeps ids of KV blocks, so that all of them are told when blocks get other ids.

A block's id changes when a unit is given up and its blocks move out of the way, and when a windowed block becomes a
regular one. A block's bytes are lost when its unit goes, when it is the target of a move, and when it is lent. In each
of these cases `BlockHolders.renumber` is called once, between two steps, before the next step is scheduled.

| who keeps ids                        | is told by                                                                    |
|--------------------------------------|-------------------------------------------------------------------------------|
| the requests' block lists            | BlockHolders itself                                                           |
| vLLM's block pool: hashes, queue     | BlockUnits, block by block, as it moves them                                  |
| the KV connector (offloading)        | registered here at the start; a connector that cannot be told is refused      |
| the lender                           | registers here                                                                |
| the window: blocks that came home    | registers here                                                                |
| the model runners' block tables      | block_tables.py, in the RPC that moves the bytes                              |
| jobs of the tiers under way          | nobody: blocks move only while there are none (Resizing.settle)               |
| steps launched and not yet answered  | nobody: workers run them before the RPC, and their outputs name no blocks     |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from polder.engines.vllm.core.compaction import Ids
from polder.errors import ConfigError

__all__ = ["BlockHolders", "NewIds"]

NewIds = NDArray[np.int64]
"""`new[old]` for every block id: its id from now on, 0 (the null block) if its bytes are lost."""


class BlockHolders:
    """The holders of one scheduler. Lives in the core's thread."""

    def __init__(self, scheduler: Any) -> None:
        """Raises ConfigError for a KV connector without `renumber_blocks`."""
        self._pool = scheduler.kv_cache_manager.block_pool
        self._managers = scheduler.kv_cache_manager.coordinator.single_type_managers
        self._holders: list[Callable[[NewIds], None]] = []
        self._connector: Any = getattr(scheduler, "connector", None)
        if self._connector is not None:
            renumber = getattr(self._connector, "renumber_blocks", None)
            if not callable(renumber):
                raise ConfigError(
                    f"elastic KV moves blocks, and {type(self._connector).__name__} keeps block ids of its own that nobody "
                    f"could correct: remove --kv-transfer-config, or use PolderConnector"
                )
            self.register(renumber)
        self.register(self._renumber_requests)

    def register(self, holder: Callable[[NewIds], None]) -> None:
        """`holder(new)` is called at every change, with an array as long as the block pool."""
        self._holders.append(holder)

    def renumber(self, moved: Mapping[int, int], lost: Iterable[int] = ()) -> None:
        """Tells all holders. `moved`: old id -> new id; `lost`: ids whose bytes are gone (targets of moves may be among
        them)."""
        lost = list(lost)
        if not moved and not lost:
            return
        new = np.arange(len(self._pool.blocks), dtype=np.int64)
        new[lost] = 0
        new[list(moved.values())] = 0  # what was in a target is lost, and nobody must take the block that came for it
        new[list(moved)] = list(moved.values())
        for holder in self._holders:
            holder(new)

    def unknown(self, busy: Ids) -> Ids:
        """Those of the busy blocks that have a holder besides the requests' block lists, and so must stay where they
        are.

        Such blocks are the null block, frees that vLLM defers, and what a connector keeps.
        """
        held = np.zeros(len(self._pool.blocks), dtype=np.int64)
        for manager in self._managers:
            for blocks in manager.req_to_blocks.values():
                for block in blocks:
                    held[block.block_id] += 1
            for block in _kept_apart(manager):
                held[block.block_id] = -1
        references = np.array([self._pool.blocks[i].ref_cnt for i in busy.tolist()], dtype=np.int64)
        found: Ids = busy[np.not_equal(references, held[busy]) | np.equal(busy, int(self._pool.null_block.block_id))]
        return found

    def in_transfer(self) -> set[int]:
        """Blocks that jobs under way read or write: they must be neither moved nor lent."""
        found: set[int] = self._connector.blocks_in_transfer() if self._connector is not None else set()
        return found

    def _renumber_requests(self, new: NewIds) -> None:
        """The requests' lists hold block objects, which other ones take the place of."""
        changed = set(np.flatnonzero((new != np.arange(len(new))) & (new != 0)).tolist())  # what is lost was nobody's
        for manager in self._managers:
            for blocks in manager.req_to_blocks.values():
                for at, block in enumerate(blocks):
                    if block.block_id in changed:
                        blocks[at] = self._pool.blocks[new[block.block_id]]


def _kept_apart(manager: Any) -> list[Any]:
    """Blocks that one of vLLM's managers remembers beside the requests' lists: sources of copies, and states of
    recurrent layers that are to be handed on. They stay where they are."""
    kept: list[Any] = []
    for name in ("_partial_hit_reqs", "_producer_partial_tail_reqs", "residency_changes"):
        for value in getattr(manager, name, {}).values():
            parts = value.values() if isinstance(value, dict) else value
            kept += [part for part in parts if hasattr(part, "block_id")]
    for name in ("_pending_cow_copies", "_pending_boundary_state_offloads"):
        kept += [part for entry in getattr(manager, name, ()) for part in entry if hasattr(part, "block_id")]
    return kept
