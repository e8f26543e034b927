"""Second copies again, after a disk was lost: in the background, a batch at a time, the pages used last first."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from polder.swarm.io import Arena
from polder.swarm.store import DiskStore

__all__ = ["restore_copies"]


def restore_copies(store: DiskStore, lost: int, scratch: Arena, most_pages: int) -> Iterator[int]:
    """Gives pages that had a copy on disk `lost`, and have one left, another one: of its `most_pages` pages used last.

    The caller draws the next batch when its disks are idle. Each yields how many pages of it have two copies now; a batch goes
    through `scratch`, which nobody else uses meanwhile. It ends early when a request hangs on that memory.
    """
    keys = store.by_recency(lost)[:most_pages]
    width = len(scratch.addresses)
    for at in range(0, len(keys), width):
        if np.isin(store.unsettled(), scratch.addresses).any():
            return
        places = store.lookup(keys[at : at + width])
        single = np.flatnonzero(places.present.sum(axis=1) == 1)
        some = places.keys[single]
        addresses = scratch.addresses[: len(single)]
        target = store.spread(some, store.writable & ~places.present[single])
        source = np.where(target >= 0, places.present[single].argmax(axis=1), -1)
        here = store.read(store.lookup(some), addresses, source)
        yield int(store.write(some[here], addresses[here], target[here]).sum())
