"""LoRA adapters that are loaded again: blocks that were computed with the former weights must not be found any more.

vLLM's block hash names an adapter by its name and path. When the files at that path are replaced and loaded in place,
the hash stays the same: vLLM warns that its own prefix cache keeps blocks of the former weights, and a tier would keep
them for much longer. So with tiers the hash also holds an epoch, which rises when an adapter is loaded again from files
that have changed. An adapter that was loaded once has epoch 0, and exactly vLLM's hashes.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["AdapterEpochs"]

Files = tuple[tuple[str, int, int], ...]
"""(name, bytes, time of the last change in ns) of each file."""


class AdapterEpochs:
    """One for an engine core. Thread-safe: requests are hashed by another thread than the one that loads adapters."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._files: dict[tuple[str, str], Files | None] = {}  # by name and path
        self._epochs: dict[tuple[str, str], int] = {}
        self._in_place: Any = None  # of the request hashed last

    def loaded(self, adapter: Any) -> None:
        """The workers have loaded this LoRARequest. A hub's name counts as changed, for nothing tells what it stands
        for now."""
        name = adapter.lora_name, adapter.lora_path
        files = _files(Path(adapter.lora_path))
        with self._lock:
            if name in self._files and (files is None or files != self._files[name]):
                self._epochs[name] = self._epochs.get(name, 0) + 1
            self._files[name] = files

    def hash_keys(self, stock: Callable[[Any], list[tuple[Any, ...]]], request: Any) -> list[tuple[Any, ...]]:
        """vLLM's `_gen_lora_extra_hash_keys` with the epoch added, where it is above 0."""
        found = stock(request)
        adapter = request.lora_request
        if not adapter:
            return found
        name = adapter.lora_name, adapter.lora_path
        if adapter.load_inplace and adapter is not self._in_place:
            self._in_place = adapter  # the workers load it for each such request
            self.loaded(adapter)
        elif name not in self._files:
            self.loaded(adapter)  # loaded by its first request
        epoch = self._epochs.get(name, 0)
        return [(*key, epoch) for key in found] if epoch else found


def _files(path: Path) -> Files | None:
    """None when the path is not there."""
    try:
        if path.is_dir():
            return tuple((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in sorted(path.iterdir()))
        return ((path.name, path.stat().st_size, path.stat().st_mtime_ns),)
    except OSError:
        return None
