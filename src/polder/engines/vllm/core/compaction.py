"""Which blocks stay, which move and which are evicted when units are given up. A pure function over arrays.

Giving up n units leaves room for (units - n) * G blocks. Busy blocks stay; of the free ones, those that vLLM would
evict last stay as long as there is room, so a shrink costs exactly the coldest part of the prefix cache, wherever it
lies:

    units        | 0: null B  . |  1: c  B  C |  2: c  .  B |  3: C  c  C |        B busy, C hot, c cold cached, . empty
    give up one  | 0: null B  B |  1: C' B  C |  2: given up |  3: C  C' C | ...  moves fill places of evicted blocks

Victims are the units with the fewest blocks to save. A unit with a block that must not be moved (the null block, or one
whose every holder is not known) is never a victim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Compaction", "plan_compaction"]

Ids = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Compaction:
    units: Ids
    """Given up, at most as many as asked for."""
    evicted: Ids
    """Cached free blocks whose contents are lost, coldest first."""
    parked: Ids
    """Free blocks of `units` that leave the free queue; with the sources they are all of the units' blocks."""
    sources: Ids
    targets: Ids
    """Block sources[i] moves to targets[i], which is evicted or empty. Sources lie in `units`, targets do not."""


def plan_compaction(
    *, count: int, mapped_units: Ids, unit_blocks: int, busy: Ids, immovable: Ids, free_coldest_first: Ids, cached: Mask
) -> Compaction:
    """Plans to give up `count` units, or as many as can be without losing a busy block.

    `busy` and `free_coldest_first` together name every block of `mapped_units` once; `immovable` is part of `busy`;
    `cached[i]` says whether free_coldest_first[i] holds reusable KV.
    """
    nothing = np.empty(0, dtype=np.int64)
    fixed_units = np.unique(immovable // unit_blocks)
    room_for = (len(mapped_units) * unit_blocks - len(busy)) // unit_blocks
    count = min(count, room_for, len(mapped_units) - len(fixed_units))
    if count <= 0:
        return Compaction(units=nothing, evicted=nothing, parked=nothing, sources=nothing, targets=nothing)
    room = (len(mapped_units) - count) * unit_blocks - len(busy)
    reusable = free_coldest_first[cached]
    lost = max(0, len(reusable) - room)
    survivors = np.concatenate([busy, reusable[lost:]])
    to_save = np.bincount(survivors // unit_blocks, minlength=int(mapped_units.max()) + 1)
    candidates = mapped_units[~np.isin(mapped_units, fixed_units)]
    # Fewest to save first; among equals the highest, so that the low ones stay together.
    order = np.lexsort((-candidates, to_save[candidates]))
    units = np.sort(candidates[order[:count]])
    sources = survivors[np.isin(survivors // unit_blocks, units)]
    spare = free_coldest_first[~np.isin(free_coldest_first, survivors)]
    leaving = np.isin(spare // unit_blocks, units)
    return Compaction(
        units=units,
        evicted=reusable[:lost],
        parked=spare[leaving],
        sources=sources,
        targets=spare[~leaving][: len(sources)],
    )
