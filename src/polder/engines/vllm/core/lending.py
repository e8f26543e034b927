"""Lending within an engine core: the lender's table comes from the broker, and its blocks are offered, taken back and zeroed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from polder.broker.wire import Neighbours, Welcome
from polder.engines.vllm.core.blocks import BlockUnits
from polder.engines.vllm.core.lender import Lender
from polder.engines.vllm.core.own_table import OwnTable
from polder.engines.vllm.core.subsystem import Subsystem, UnitPages

__all__ = ["Lending"]


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
