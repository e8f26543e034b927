"""Lending within an engine core: the lender's table comes from the broker, and its blocks are offered, taken back and zeroed."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from polder.broker.client import fetch_table
from polder.broker.wire import FetchTable, Neighbours, Welcome
from polder.engines.vllm.core.blocks import BlockUnits
from polder.engines.vllm.core.lender import Lender
from polder.engines.vllm.core.own_table import OwnTable
from polder.engines.vllm.core.subsystem import Subsystem, UnitPages
from polder.engines.vllm.rank import calls
from polder.engines.vllm.start.negotiate import Agreement
from polder.tiers.peer.circuit_breaker import ASK_TIMEOUT_S

__all__ = ["Lending", "open_lending"]


class Lending(Subsystem):
    def __init__(
        self,
        lender: Lender,
        own_table: OwnTable,
        blocks: BlockUnits,
        *,
        pages: Callable[[], UnitPages],
        useful_units: Callable[[float], int],
        zero: Callable[[list[int]], object],
    ) -> None:
        """`pages`: of all units that the engine holds. `useful_units(now)`: units of cache beyond which more saves next to nothing.
        `zero(blocks)` makes the workers zero blocks before the next step."""
        self._lender, self._own_table, self._blocks = lender, own_table, blocks
        self._pages, self._useful_units, self._zero = pages, useful_units, zero
        own_table.ask()

    def after_schedule(self, output: Any) -> None:
        dirty = self._lender.take_dirty()
        if dirty:  # bytes of another model: read as numbers they may be NaN
            self._zero(dirty)

    def on_wake(self) -> None:
        fd = self._own_table.take()
        if fd is not None:
            self._lender.open(fd, self._pages())

    def on_neighbours(self, message: Neighbours) -> None:
        self._lender.on_neighbours(message.cores)

    def on_welcome(self, message: Welcome, *, new_broker: bool) -> None:
        if new_broker:
            self._lender.close()  # the new broker knows nothing of what was lent
            self._own_table.ask()

    def on_step(self, steps: Sequence[tuple[int, float]], now: float) -> None:
        self._lender.note_used(self._blocks.busy_blocks)

    def on_tick(self, now: float) -> None:
        usable = self._blocks.usable_blocks
        useful = self._useful_units(now) * usable // len(self._blocks.mapped)
        self._lender.tick(now, self._blocks.busy_blocks, usable, useful)

    def on_mapped(self, pages: UnitPages) -> None:
        self._lender.mapped(pages)

    def before_unmap(self, units: Sequence[int]) -> None:
        self._lender.unmapped(units)

    def stats(self, now: float) -> dict[str, float]:
        return self._lender.stats()

    def check_integrity(self) -> None:
        self._lender.check_integrity()

    def close(self) -> None:
        self._own_table.close()
        self._lender.close()


def open_lending(
    scheduler: Any,
    blocks: BlockUnits,
    agreement: Agreement,
    wake: Callable[[], None],
    *,
    workers: Any,
    pages: Callable[[], UnitPages],
    useful_units: Callable[[float], int],
) -> Lending:
    """Lending as the engine's settings want it. `workers`: vLLM's executor. For the others see Lending and OwnTable."""

    def before_offer(free: list[int]) -> None:
        """Free blocks are about to get others' bytes: returns when no step reads or writes them any more.

        A step under way may still write a block of a request that has ended. And behind a sliding window a kernel may load a block
        that no request has, together with one that it reads; what it loads is multiplied by zero, which makes NaN of NaN.
        """
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        groups = scheduler.kv_cache_config.kv_cache_groups
        if not all(isinstance(group.kv_cache_spec, FullAttentionSpec) for group in groups):
            workers.collective_rpc(calls.forget_blocks, args=(free,))
        elif scheduler.vllm_config.max_concurrent_batches > 1:
            workers.collective_rpc(calls.await_steps)

    def zero(dirty: list[int]) -> None:
        # Not awaited: workers do it between the step before and this one. `new_block_ids_to_zero` would be vLLM's way, but
        # most of its runners are not ready for it, or pass some layers over.
        workers.collective_rpc(calls.zero_blocks, args=(dirty,), non_block=True)

    name, devices = agreement.hello.engine, agreement.hello.devices
    lender = Lender(
        scheduler.kv_cache_manager.block_pool,
        blocks.holders,
        agreement.geometry,
        len(devices),
        agreement.settings.lend_bytes,
        before_offer=before_offer,
    )
    question = FetchTable(engine=name, lender=name)
    own_table = OwnTable(functools.partial(fetch_table, agreement.socket, question, timeout_s=ASK_TIMEOUT_S), wake)
    return Lending(lender, own_table, blocks, pages=pages, useful_units=useful_units, zero=zero)
