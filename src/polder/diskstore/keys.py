"""Keys of pages as arrays, and a hash table from keys to slots that works on whole batches.

A key has 16 bytes, kept as two 64-bit words. A Python dict of a million keys takes 150 MB and a second to fill. This
table takes 16 bytes a slot besides the keys themselves, and a tenth of a second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from polder.arrays import IntArray
from polder.errors import ConfigError, IntegrityError

__all__ = ["KEY_BYTES", "KeyTable", "Keys", "distinct", "key_array", "mix", "page_seeds", "part_seeds"]

Keys = npt.NDArray[np.uint64]
"""[n, 2] the little-endian words of n keys."""

KEY_BYTES = 16
_EMPTY, _REMOVED = -1, -2
_ODD = np.uint64(0x9E3779B97F4A7C15)
_ODD_TOO = np.uint64(0xC2B2AE3D27D4EB4F)


def key_array(keys: Sequence[bytes]) -> Keys:
    """[n, 2] n keys of bytes as an array. Raises ConfigError unless every key has 16 bytes."""
    if any(len(key) != KEY_BYTES for key in keys):
        raise ConfigError(f"a key has {next(len(k) for k in keys if len(k) != KEY_BYTES)} bytes: 16 are needed")
    return np.frombuffer(b"".join(keys), dtype="<u8").reshape(-1, 2).astype(np.uint64)


def mix(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Hashes each word. Different words give different hashes, and every bit of a word affects every bit of its hash.

    Checksums of stored pages depend on this function, so it must not change.
    """
    words = (words ^ (words >> np.uint64(32))) * _ODD
    words = (words ^ (words >> np.uint64(29))) * _ODD_TOO
    mixed: npt.NDArray[np.uint64] = words ^ (words >> np.uint64(32))
    return mixed


def page_seeds(keys: Keys, generations: npt.NDArray[np.uint64], namespace: int) -> npt.NDArray[np.uint64]:
    """[n] seeds of the pages' checksums. Bytes of another key, write or namespace have another seed, so they do not
    verify."""
    first = mix(keys[:, 0] ^ np.uint64(namespace & (2**64 - 1)))
    return mix(mix(first ^ keys[:, 1]) ^ generations)


def part_seeds(seeds: npt.NDArray[np.uint64], parts: IntArray) -> npt.NDArray[np.uint64]:
    """Seeds of the checksums of parts. The bytes of another part of the page do not verify either."""
    return mix(seeds ^ parts.astype(np.uint64))


def distinct(keys: Keys) -> IntArray:
    """[m] the row of the first occurrence of each key, in rising order."""
    if len(keys) < 2:
        return np.arange(len(keys))
    order = np.lexsort((keys[:, 1], keys[:, 0]))
    ordered = keys[order]
    first = np.concatenate(([True], (ordered[1:] != ordered[:-1]).any(axis=1)))
    rows: IntArray = np.sort(order[first])  # lexsort is stable, so the first of equals is the first row
    return rows


class KeyTable:
    """Which slot a key is in. Open addressing with linear probing; all keys of a batch probe in step.

    The keys lie in the caller's array, one row for each slot, and must not change while they are in the table.
    """

    def __init__(self, keys: Keys) -> None:
        """`keys`: [slots, 2] with less than 2^31 slots. The table starts empty."""
        self._keys = keys
        size = 1 << max(4, (3 * len(keys)).bit_length())  # between a quarter and a half full, so that probes are short
        self._cells: npt.NDArray[np.int32] = np.full(size, _EMPTY, dtype=np.int32)
        self._mask = size - 1
        self._removed = 0
        self.count = 0

    def find(self, keys: Keys) -> IntArray:
        """[n] slots, -1 where a key is absent."""
        if not self.count:  # the key array may have no rows at all
            return np.full(len(keys), -1, dtype=np.int64)
        slots, _ = self._probe(keys)
        return slots

    def add(self, slots: IntArray) -> None:
        """Adds the keys of these slots. They are distinct and not in the table."""
        self._place(slots)
        self.count += len(slots)

    def remove(self, slots: IntArray) -> None:
        """Removes the keys of these slots. Raises IntegrityError unless each is in the table with its slot."""
        found, cells = self._probe(self._keys[slots])
        if not np.array_equal(found, slots):
            raise IntegrityError(f"{int((found != slots).sum())} of {len(slots)} pages are not where their keys say")
        self._cells[cells] = _REMOVED
        self._removed += len(slots)
        self.count -= len(slots)
        if self._removed > len(self._cells) // 4:
            held = self._cells[self._cells >= 0].astype(np.int64)
            self._cells[:] = _EMPTY
            self._removed = 0
            self._place(held)

    def _probe(self, keys: Keys) -> tuple[IntArray, IntArray]:
        """For each key its slot, or -1, and the cell where the search ended."""
        at = self._home(keys)
        slots = self._cells[at].astype(np.int64)
        same = (slots >= 0) & (self._keys[np.maximum(slots, 0)] == keys).all(axis=1)
        found: IntArray = np.where(same, slots, -1)
        left = np.flatnonzero((slots != _EMPTY) & ~same)
        while len(left):
            at[left] = (at[left] + 1) & self._mask
            slots = self._cells[at[left]].astype(np.int64)
            same = (slots >= 0) & (self._keys[np.maximum(slots, 0)] == keys[left]).all(axis=1)
            found[left[same]] = slots[same]
            left = left[(slots != _EMPTY) & ~same]
        return found, at

    def _place(self, slots: IntArray) -> None:
        at = self._home(self._keys[slots])
        left = np.arange(len(slots))
        while len(left):
            cells = at[left]
            free = self._cells[cells] < 0
            self._removed -= len(np.unique(cells[free & (self._cells[cells] == _REMOVED)]))
            # Where several keys want the same cell, the last one gets it and the others go on.
            self._cells[cells[free]] = slots[left[free]]
            left = left[~free | (self._cells[cells] != slots[left])]
            at[left] = (at[left] + 1) & self._mask

    def _home(self, keys: Keys) -> IntArray:
        home: IntArray = (mix(keys[:, 0] ^ mix(keys[:, 1])) & np.uint64(self._mask)).astype(np.int64)
        return home
