"""How many units are windowed: as few as let the longest context in.

A held unit has pages for all L layers of its blocks. It is either regular, and its blocks are read where they are, or a
donor: its pages are w layers of L // w windowed units, whose blocks cost copies in every pass. So with h units held and
c of them donors there is room for

    h - c + min(c * (L // w), S)        units of blocks, S being those that the store has room for

which is SwiftCache's equations 1 to 5 in units, with w slots for one (section 3.2; in blocks: planner/context_plan.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from polder.errors import BudgetError

__all__ = ["WindowShape"]


@dataclass(frozen=True, kw_only=True)
class WindowShape:
    """The sizes of one engine's window."""

    layers: int
    window_layers: int
    store_units: int
    """Windowed units that the store has room for."""

    @property
    def units_of_donor(self) -> int:
        return self.layers // self.window_layers

    def room(self, held: int, donors: int) -> int:
        """Units of blocks that there is room for."""
        return held - donors + min(donors * self.units_of_donor, self.store_units)

    def donors_for(self, held: int, wanted: int) -> int | None:
        """The fewest donors that make room for `wanted` units; None: there is no such number.

        At least one unit stays regular: the null block is in it.
        """
        return next((c for c in range(held) if self.room(held, c) >= wanted), None)

    def windowed_blocks(self, blocks: int, held: int, unit_blocks: int) -> int:
        """How many blocks of a context of `blocks` blocks, alone on the engine, are windowed.

        Counts as the engine does: a unit is kept to spare where that is possible, and one block is the null block.
        """
        wanted = -(-(blocks + 1) // unit_blocks)
        if wanted < held:
            return 0
        donors = self.donors_for(held, wanted + 1)
        if donors is None:
            donors = self.donors_for(held, wanted) or 0
        return max(0, blocks + 1 - (held - donors) * unit_blocks)

    def most(self, held: int) -> int:
        """Units of blocks that there is room for with the best number of donors."""
        return max(self.room(held, donors) for donors in range(max(1, held)))

    def least_held(self, wanted: int, ceiling: int) -> int:
        """The fewest held units with which `wanted` units can have room. Raises BudgetError when `ceiling` is too
        few."""
        for held in range(1, ceiling + 1):
            if self.donors_for(held, wanted) is not None:
                return held
        raise BudgetError(
            f"{wanted} units of KV have no room: {ceiling} on the device and {self.store_units} in the window's store hold "
            f"{self.most(ceiling)} with {self.window_layers} of {self.layers} layers local"
        )
