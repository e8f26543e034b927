"""The core's book of stored prefixes: which there are, who reads them, and which one makes room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from polder.sparse.budget import Layout
from polder.sparse.methods import Method

__all__ = ["Entry", "StoredPrefixes"]

MORE_TAIL = 8
"""A stored prefix serves a longer prompt if what follows it is at most an eighth of the prompt's own units."""
SPARE = 4
"""One part in so many of the disks is not counted on: pages are spread by chance, and the last of a layer is not full."""


@dataclass(kw_only=True)
class Entry:
    """A stored prefix."""

    layout: Layout
    readers: int = 0


class StoredPrefixes:
    """Keys are vLLM's hashes of the last block before the tail, which stand for all tokens up to there."""

    def __init__(self, limit_bytes: int, block_bytes: int, disk_bytes: int = 0) -> None:
        """Of one rank. `block_bytes`: in all layers. `disk_bytes`: of all disks; 0: units lie in host memory."""
        self._limit_bytes, self._block_bytes, self._disk_bytes = limit_bytes, block_bytes, disk_bytes
        self._entries: dict[bytes, Entry] = {}
        """The least recently used first."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def used_bytes(self) -> int:
        return sum(self._bytes(entry.layout) for entry in self._entries.values())

    def find(self, hashes: Sequence[bytes], wanted: Layout, method: Method) -> tuple[bytes, Layout] | None:
        """The longest stored prefix of a prompt whose blocks have these hashes."""
        for end in range(wanted.end_block, 0, -1):
            if (wanted.end_block - end) * MORE_TAIL > wanted.units or end > len(hashes):
                break
            key = _key(hashes[end - 1], method)
            if key in self._entries and self._entries[key].layout.end_block == end:
                return key, self._entries[key].layout
        return None

    def add(self, hashes: Sequence[bytes], layout: Layout, method: Method, name: str) -> tuple[bytes, list[bytes]]:
        """(its key, those that made room). An empty key: there is no room. `name`: without hashes, nobody else finds it."""
        evicted: list[bytes] = []
        for key in [key for key, entry in self._entries.items() if not entry.readers]:
            if self._fits(layout):
                break
            evicted.append(key)
            self.remove(key)
        if not self._fits(layout):
            return b"", evicted
        key = _key(hashes[layout.end_block - 1] if len(hashes) >= layout.end_block else name.encode(), method)
        self._entries[key] = Entry(layout=layout)
        return key, evicted

    def remove(self, key: bytes) -> None:
        del self._entries[key]

    def clear(self) -> list[bytes]:
        """Forgets all, whoever reads them. Returns their keys."""
        keys = list(self._entries)
        self._entries = {}
        return keys

    def use(self, key: bytes) -> Entry:
        """One more request reads it, until it lowers `readers` again."""
        entry = self._entries[key] = self._entries.pop(key)
        entry.readers += 1
        return entry

    def _fits(self, layout: Layout) -> bool:
        units = layout.units + sum(entry.layout.units for entry in self._entries.values())
        on_disks = units * self._block_bytes * SPARE // (SPARE - 1)
        in_memory = self.used_bytes + self._bytes(layout)
        return in_memory <= self._limit_bytes and (not self._disk_bytes or on_disks <= self._disk_bytes)

    def _bytes(self, layout: Layout) -> int:
        """Host memory: the units where there are no disks, and a byte for two channels of each key, which is an eighth
        of the KV in bfloat16 and a sixteenth in float32."""
        return layout.units * self._block_bytes * (1 if self._disk_bytes else 9) // 8


def _key(content: bytes, method: Method) -> bytes:
    return method.encode() + bytes(content)
