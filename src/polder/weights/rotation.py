"""Which layers give up their memory, and which of them share what is left (Oneiros, "uniform interval" placement).

A pass computes layers 0 .. n - 1, then the next pass begins: the layers lie on a circle. To win the memory of `won`
layers, m evenly spaced layers share m - won slots, so that each fetch can overlap with the layers in between. All m
layers are fetched in each pass.

    one slot     m = won + 1. A fetch begins when the rotating layer before has ended.
                 It is hidden while it takes at most n/m - 1 layers.
    two slots    m = won + 2, double buffering. A fetch begins one rotating layer earlier.
                 It is hidden while it takes at most n/m layers, for one more fetch per pass.

With two slots and an odd m the slots cannot alternate around the circle: the last rotating layer and the first share a
slot, and that one fetch has the shorter time. Every slot has two layers or more: a layer alone in one would not rotate.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from polder.errors import ConfigError

__all__ = ["Rotation", "spread"]


def spread(layers: int, count: int) -> tuple[int, ...]:
    """`count` of `layers` layers, evenly spaced on the circle: floor((k + 1/2) * layers / count). Gaps differ by 1 at
    most."""
    return tuple((2 * k + 1) * layers // (2 * count) for k in range(count))


@dataclass(frozen=True, kw_only=True)
class Rotation:
    """Layers `rotating`, in rising order, take turns in `slots` slots; the others have a segment each. None and 0: all
    do."""

    layers: int
    rotating: tuple[int, ...] = ()
    slots: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError for what cannot be."""
        if self.layers < 1 or not _rising((-1, *self.rotating, self.layers)):
            raise ConfigError(f"layers {self.rotating} cannot rotate in a model of {self.layers} layers")
        if len(self.rotating) < 2 * self.slots or (self.slots < 1 and self.rotating) or self.slots < 0:
            raise ConfigError(f"{len(self.rotating)} layers in {self.slots} slots: a slot needs two layers or more")

    @classmethod
    def winning(cls, layers: int, won: int, *, slots: int) -> Rotation:
        """`won` + `slots` layers, evenly spaced, in `slots` slots. Raises ConfigError when there are not so many
        layers."""
        if not 1 <= won <= layers - slots:
            raise ConfigError(
                f"{won} of {layers} layers cannot be won with {slots} slots: win 1 to {layers - slots} of them"
            )
        return cls(layers=layers, rotating=spread(layers, won + slots), slots=slots)

    @classmethod
    def holding(cls, layers: int, segments: int) -> Rotation:
        """A rotation that runs in `segments` segments, for callers without measurements.

        One slot while that leaves a fetch as long to hide as two would: layers/(won+1) - 1 >= layers/(won+2), which is
        (won+1) * (won+2) <= layers. A measured choice is the planner's. Raises ConfigError unless 1 <= segments <=
        layers.
        """
        if not 1 <= segments <= layers:
            raise ConfigError(f"{segments} segments for {layers} layers: hold 1 to {layers} of them")
        won = layers - segments
        if won == 0:
            return cls(layers=layers)
        one = won == 1 or (won + 1) * (won + 2) <= layers or won + 2 > layers
        return cls.winning(layers, won, slots=1 if one else 2)

    @property
    def won(self) -> int:
        """Segments that a model without rotation would need on top."""
        return len(self.rotating) - self.slots

    @property
    def segments(self) -> int:
        return self.layers - self.won

    @cached_property
    def homes(self) -> tuple[int, ...]:
        """For each layer the lowest layer that shares its memory: itself when it is resident or the first of its
        slot."""
        homes = list(range(self.layers))
        for k, layer in enumerate(self.rotating):
            homes[layer] = self.rotating[k % self.slots]
        return tuple(homes)


def _rising(values: Iterable[int]) -> bool:
    return all(low < high for low, high in pairwise(values))
