"""How many layers' weights may be streamed, and how many segments that wins (Oneiros, SoCC 2025, section 4).

m of n layers rotate: they are evenly spaced and share m - alpha slots, which frees alpha segments. Every rotating layer
is copied to the device again in every pass.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["RotationSize", "choose_rotation", "pass_seconds"]


class RotationSize(NamedTuple):
    """`rotating` layers (m) share `slots` slots, so `alpha` = rotating - slots segments are free. All zero: nothing
    rotates."""

    alpha: int
    rotating: int
    slots: int


NONE = RotationSize(0, 0, 0)


def pass_seconds(
    layers: int, rotating: int, slots: int, step_s: float, layer_load_s: float, copy_share: float = 0.0
) -> float:
    """Seconds of a pass over `layers` layers, which takes `step_s` when none rotates.

    `copy_share`: what a load takes from computing, as a share of its own time. On a GPU that is one part in a hundred:
    the copy engine writes to memory that layers are read from. On a CPU it is the part of the cores that copy.

    One slot: each load has its own gap to hide in and stalls for the rest. Even spacing of m layers over n leaves gaps
    of floor(n/m) and ceil(n/m) layers. Two slots: one is filled while the other's layer computes, so the link alone is
    the limit.
    """
    step_s += copy_share * rotating * layer_load_s
    if slots > 1:
        return max(step_s, rotating * layer_load_s)
    layer_s = step_s / layers
    gap, longer = divmod(layers, rotating)
    stall = (rotating - longer) * max(0.0, layer_load_s - (gap - 1) * layer_s)
    return step_s + stall + longer * max(0.0, layer_load_s - gap * layer_s)


def choose_rotation(
    layers: int, step_s: float, layer_load_s: float, slowdown_allowed: float = 0.0, copy_share: float = 0.0
) -> RotationSize:
    """The most segments that can be freed while a pass takes at most `step_s` x (1 + `slowdown_allowed`).

    One slot frees m - 1 segments but leaves less time for each load; two slots free m - 2 but may rotate more layers.
    The choice that frees more wins, and of equal ones that with fewer rotating layers. Nothing rotates when the link is
    too slow, or when a time was never measured (0).
    """
    if layer_load_s <= 0 or step_s <= 0:
        return NONE
    allowed = step_s * (1 + slowdown_allowed)
    found = (
        RotationSize(rotating - slots, rotating, slots)
        for slots in (1, 2)
        for rotating in range(slots + 1, layers + 1)
        if pass_seconds(layers, rotating, slots, step_s, layer_load_s, copy_share) <= allowed
    )
    return max(found, key=lambda r: (r.alpha, -r.rotating), default=NONE)
