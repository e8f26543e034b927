"""How many layers' weights may be streamed, and how many segments that wins.

Symbols as in the papers: n layers, m of them rotating at even spacing over m - alpha slots, so that alpha segments are won; T_T the
time to bring one layer back, T_compute that of a whole pass with all layers resident, t_layer = T_compute / n. Every rotating
layer is read again in every pass, so a pass loads m layers (Oneiros, SoCC 2025, section 4: "how many", "which layers").

For what a device can bear in principle, before anything was measured: w bytes a layer, H bytes/s of device memory, B of the
link, T0 the step with nothing streamed. A streamed layer is written to memory once more than a resident one, and must come
through the link within the step: T(R) = max(T0 + R w/H, R w/B).
"""

from __future__ import annotations

import math
from typing import NamedTuple

__all__ = [
    "Rotation",
    "choose_rotation",
    "double_buffer_hides",
    "loads_hidden",
    "most_streamed",
    "most_streamed_within",
    "pass_seconds",
    "single_slot_hides",
    "step_seconds",
]


class Rotation(NamedTuple):
    """`rotating` layers (m) share `slots` slots; `alpha` = rotating - slots segments are won. All zero: nothing rotates."""

    alpha: int
    rotating: int
    slots: int


NONE = Rotation(0, 0, 0)


def loads_hidden(layer_load_s: float, compute_s: float) -> int:
    """N, the largest with T_T x N <= T_compute: loads that a pass hides. 0 for a load time that was never measured (0)."""
    if layer_load_s <= 0 or compute_s <= 0:
        return 0
    loads = math.floor(compute_s / layer_load_s)
    return loads if layer_load_s * loads <= compute_s else loads - 1  # the quotient may have been rounded up


def step_seconds(
    t0_s: float, layers_streamed: int, layer_bytes: int, memory_bytes_per_s: float, link_bytes_per_s: float
) -> float:
    """T(R) = max(T0 + R w/H, R w/B): seconds of a step that streams R layers."""
    streamed = layers_streamed * layer_bytes
    return max(t0_s + streamed / memory_bytes_per_s, streamed / link_bytes_per_s)


def most_streamed(
    layers: int, t0_s: float, layer_bytes: int, memory_bytes_per_s: float, link_bytes_per_s: float
) -> int:
    """R_max = floor(T0 (B/w) / (1 - B/H)), at most `layers`: the step does not wait for the link. All, if B >= H."""
    if link_bytes_per_s >= memory_bytes_per_s:
        return layers
    most = t0_s * (link_bytes_per_s / layer_bytes) / (1 - link_bytes_per_s / memory_bytes_per_s)
    return min(layers, math.floor(most))


def most_streamed_within(
    layers: int,
    target_s: float,
    t0_s: float,
    layer_bytes: int,
    memory_bytes_per_s: float,
    link_bytes_per_s: float,
) -> int:
    """R_slo, at most `layers`: the largest R with T(R) <= `target_s`, the time between tokens that is promised.

    R_slo = T_slo B / w, and as long as T0 + R w/H stays within it too: a step that is late already streams nothing.
    """
    by_link = target_s * link_bytes_per_s / layer_bytes
    by_memory = (target_s - t0_s) * memory_bytes_per_s / layer_bytes
    return max(0, min(layers, math.floor(min(by_link, by_memory))))


def single_slot_hides(layers: int, rotating: int, layer_load_s: float, layer_compute_s: float) -> bool:
    """alpha + 1, one slot: a load waits for the previous rotating layer to finish. T_T <= (n/m - 1) t_layer."""
    return layer_load_s <= (layers / rotating - 1) * layer_compute_s


def double_buffer_hides(layers: int, rotating: int, layer_load_s: float, layer_compute_s: float) -> bool:
    """alpha + 2, two slots: one is filled while the other's layer computes. T_T <= (n/m) t_layer."""
    return layer_load_s <= layers / rotating * layer_compute_s


def pass_seconds(
    layers: int, rotating: int, slots: int, step_s: float, layer_load_s: float, copy_share: float = 0.0
) -> float:
    """Seconds of a pass over `layers` layers that takes `step_s` when none rotates.

    `copy_share`: what a load takes from computing, as a share of its own time. On a GPU that is B/H, a part in a hundred: the copy
    engine writes to memory that layers are read from (the term R w/H above). On a CPU it is the part of the cores that copy.

    One slot: each load has its own gap to hide in and stalls for the rest. Even spacing of m layers over n leaves gaps of
    floor(n/m) and ceil(n/m) layers, and the shorter ones count as what they are, so this is never less than what the
    formula of `single_slot_hides` says with the mean gap. Two slots: the link alone is the limit, max(T_compute, m T_T).
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
) -> Rotation:
    """The most segments that can be won while a pass takes at most `step_s` x (1 + `slowdown_allowed`).

    One slot wins m - 1 segments but leaves each load a shorter time, two win m - 2 of more layers: whichever wins more, and of
    two that win as much the one that streams fewer layers. Nothing rotates when the link is too slow for it to win anything, or
    when a time was never measured (0).
    """
    if layer_load_s <= 0 or step_s <= 0:
        return NONE
    allowed = step_s * (1 + slowdown_allowed)
    found = (
        Rotation(rotating - slots, rotating, slots)
        for slots in (1, 2)
        for rotating in range(slots + 1, layers + 1)
        if pass_seconds(layers, rotating, slots, step_s, layer_load_s, copy_share) <= allowed
    )
    return max(found, key=lambda r: (r.alpha, -r.rotating), default=NONE)
