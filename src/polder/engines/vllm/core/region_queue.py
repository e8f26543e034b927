"""vLLM's queue of free blocks with two regions: windowed blocks behind all regular ones, so that they are used last.

A block's age decides within its region only. Where a regular block is free, be it one with cached KV, no windowed one
is given out: its copies would cost time in every step, a cached prefix only when it is asked for again.
"""

from __future__ import annotations

from typing import Any

from vllm.v1.core.kv_cache_utils import FreeKVCacheBlockQueue

__all__ = ["RegionQueue"]


class RegionQueue(FreeKVCacheBlockQueue):  # type: ignore[misc]
    """Takes the place of a pool's free_block_queue before its first request, with the blocks that are free then."""

    def __init__(self, blocks: list[Any], first_windowed: int) -> None:
        """`first_windowed`: the lowest id of a windowed block; all above it are windowed."""
        self._first_id = first_windowed
        self._border: Any = None  # the first windowed block of the list
        super().__init__([block for block in blocks if block.block_id < first_windowed])
        self.append_n([block for block in blocks if block.block_id >= first_windowed])

    @property
    def free_windowed(self) -> int:
        """Counts them: for decisions between steps, not for every step."""
        count, block = 0, self._border
        while block is not None and block is not self.fake_free_list_tail:
            count, block = count + 1, block.next_free_block
        return count

    def popleft(self) -> Any:
        if self.fake_free_list_head.next_free_block is self._border:
            self._step(self._border)
        return super().popleft()

    def popleft_n(self, n: int) -> list[Any]:
        found: list[Any] = super().popleft_n(n)
        if found and self._windowed(found[-1]):
            first = self.fake_free_list_head.next_free_block
            self._border = None if first is self.fake_free_list_tail else first
        return found

    def remove(self, block: Any) -> None:
        if block is self._border:
            self._step(block)
        super().remove(block)

    def append(self, block: Any) -> None:
        self.append_n([block])

    def append_n(self, blocks: list[Any]) -> None:
        regular = [block for block in blocks if not self._windowed(block)]
        windowed = [block for block in blocks if self._windowed(block)]
        self._insert(regular, self._border or self.fake_free_list_tail)
        self._insert(windowed, self.fake_free_list_tail)
        if windowed and self._border is None:
            self._border = windowed[0]

    def prepend_n(self, blocks: list[Any]) -> None:
        super().prepend_n([block for block in blocks if not self._windowed(block)])
        windowed = [block for block in blocks if self._windowed(block)]
        self._insert(windowed, self._border or self.fake_free_list_tail)
        if windowed:
            self._border = windowed[0]

    def _windowed(self, block: Any) -> bool:
        return bool(block.block_id >= self._first_id)

    def _step(self, border: Any) -> None:
        following = border.next_free_block
        self._border = None if following is self.fake_free_list_tail else following

    def _insert(self, blocks: list[Any], before: Any) -> None:
        previous = before.prev_free_block
        for block in blocks:
            previous.next_free_block, block.prev_free_block = block, previous
            previous = block
        previous.next_free_block, before.prev_free_block = before, previous
        self.num_free_blocks += len(blocks)
