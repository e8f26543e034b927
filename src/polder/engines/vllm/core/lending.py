"""A lender on a running engine: its table comes from the broker, and blocks that come back dirty are zeroed by the
workers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from polder.broker.client import fetch_table
from polder.broker.wire import FetchTable, Welcome
from polder.engines.vllm.agreement import Agreement
from polder.engines.vllm.core.blocks import BlockUnits
from polder.engines.vllm.core.lender import Lender
from polder.engines.vllm.core.own_table import OwnTable
from polder.engines.vllm.core.subsystem import UnitPages
from polder.engines.vllm.rank import calls
from polder.tiers.peer.circuit_breaker import ASK_TIMEOUT_S

__all__ = ["Lending"]


class Lending(Lender):
    def __init__(
        self,
        scheduler: Any,
        blocks: BlockUnits,
        agreement: Agreement,
        wake: Callable[[], None],
        *,
        workers: Any,
        pages: Callable[[], UnitPages],
        useful_units: Callable[[float], int],
    ) -> None:
        """`workers`: vLLM's executor. `pages()`: of all units that the engine holds. For the others see Lender and
        OwnTable."""
        name, ranks = agreement.hello.engine, len(agreement.hello.devices)
        super().__init__(
            scheduler.kv_cache_manager.block_pool,
            blocks,
            agreement.geometry,
            ranks,
            agreement.settings.lend_bytes,
            useful_units=useful_units,
            before_offer=self._await_readers,
        )
        self._scheduler, self._workers, self._pages = scheduler, workers, pages
        self._former: set[int] = set()  # units with pages of a former broker
        question = FetchTable(engine=name, lender=name)
        self._own_table = OwnTable(
            functools.partial(fetch_table, agreement.socket, question, timeout_s=ASK_TIMEOUT_S), wake
        )
        self._own_table.ask()

    def after_schedule(self, output: Any) -> None:
        dirty = self.take_dirty()
        if dirty:
            self._zero(dirty)

    def on_wake(self) -> None:
        fd = self._own_table.take()
        if fd is not None:
            # By the numbers of former pages the broker would make new ones, beyond its budget.
            self.open(fd, {unit: pages for unit, pages in self._pages().items() if unit not in self._former})

    def on_welcome(self, message: Welcome, *, new_broker: bool) -> None:
        if new_broker:
            super().close()  # the new broker knows nothing of what was lent
            self._former = set(self._pages())
            self._own_table.ask()

    def before_unmap(self, units: Sequence[int]) -> None:
        super().before_unmap(units)
        self._former.difference_update(units)

    def close(self) -> None:
        self._own_table.close()
        super().close()

    def _await_readers(self, free: list[int]) -> None:
        """Free blocks are about to get others' bytes: returns when no step reads or writes them any more.

        A step under way may still write a block of a request that has ended. And behind a sliding window a kernel may
        load a block that no request has, together with one that it reads. It multiplies these values by zero, but zero
        times NaN is NaN.
        """
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        groups = self._scheduler.kv_cache_config.kv_cache_groups
        if not all(isinstance(group.kv_cache_spec, FullAttentionSpec) for group in groups):
            self._workers.collective_rpc(calls.forget_blocks, args=(free,))
        elif self._scheduler.vllm_config.max_concurrent_batches > 1:
            self._workers.collective_rpc(calls.await_steps)

    def _zero(self, dirty: list[int]) -> None:
        """Does not wait: the workers zero the blocks between the step before and this one.

        vLLM's own way would be `new_block_ids_to_zero`, but most of its runners are not ready for it, or pass some
        layers over.
        """
        self._workers.collective_rpc(calls.zero_blocks, args=(dirty,), non_block=True)
