"""The bytes of KV blocks as plain keys and values, and back.

A backend lays a block out as its kernel wants it: on a CPU that depends on the instruction set. Writing is left to the
backend's own op, which works on any buffer. For reading, the op is asked once where each number goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from polder.errors import ConfigError

__all__ = ["BlockFormat"]

DIGIT = 128
"""Numbers up to this are exact in bfloat16 and float16."""


class BlockFormat:
    """How one attention layer of vLLM's writes its blocks."""

    def __init__(self, name: str, layer: Any) -> None:
        """Raises ConfigError when what is written is not what is read: with quantised KV."""
        self._layer, impl = layer, layer.impl
        self.cache: torch.Tensor = layer.kv_cache
        _, self.kv_heads, self.block_tokens, twice = self.cache.shape
        self.d = twice // 2
        self.scale: float = impl.scale
        self._where = self._probe()

    @property
    def block_bytes(self) -> int:
        return int(self.cache[0].numel() * self.cache.element_size())

    def plain(self, blocks: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of these blocks of the cache: two of [KV heads, n * block tokens, d]. Between two passes."""
        found = self.cache[torch.tensor(blocks, dtype=torch.int64)].reshape(len(blocks), -1)[:, self._where]
        found = found.view(len(blocks), 2, self.kv_heads, self.block_tokens, self.d).permute(1, 2, 0, 3, 4)
        keys, values = found.reshape(2, self.kv_heads, -1, self.d).unbind()
        return keys, values

    def pack(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """The inverse of `plain`, in a buffer of its own."""
        blocks = torch.empty(
            (keys.shape[1] // self.block_tokens, *self.cache.shape[1:]),
            dtype=self.cache.dtype,
            device=self.cache.device,
        )
        self._write(keys.transpose(0, 1).contiguous(), values.transpose(0, 1).contiguous(), blocks)
        return blocks

    def _write(self, keys: torch.Tensor, values: torch.Tensor, blocks: torch.Tensor) -> None:
        impl = self._layer.impl
        slots = torch.arange(len(keys), dtype=torch.int64, device=keys.device)
        type(impl).do_kv_cache_update(impl, self._layer, keys, values, blocks, slots)

    def _probe(self) -> torch.Tensor:
        """Where each number of a block lies: [2 * KV heads * block tokens * d], keys first."""
        shape = self.block_tokens, self.kv_heads, self.d
        half = int(np.prod(shape))
        numbers = torch.arange(2 * half).view(2, self.kv_heads, self.block_tokens, self.d).transpose(1, 2)
        found, weight = torch.zeros(2 * half, dtype=torch.int64), 1
        while weight < 2 * half:
            digits = ((numbers // weight) % DIGIT).to(self.cache.dtype).to(self.cache.device)
            block = torch.zeros((1, *self.cache.shape[1:]), dtype=self.cache.dtype, device=self.cache.device)
            self._write(digits[0].contiguous(), digits[1].contiguous(), block)
            found += block.flatten().to("cpu", torch.int64) * weight
            weight *= DIGIT
        if not torch.equal(found.sort().values, torch.arange(2 * half)):
            raise ConfigError(
                "sparse reading does not know how this backend writes KV (is it quantised?): remove POLDER_SPARSE"
            )
        return found.argsort()
