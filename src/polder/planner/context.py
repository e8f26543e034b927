"""How long a context can be when most layers' KV of some of its blocks is outside the device: SwiftCache, section 3.2.

A **regular** block has the KV of all L layers in local memory. A **windowed** block has local room for w layers, which
rotate: the KV of layer l is copied in before the layer's attention. The KV of all L layers of a windowed block is in
external memory: the host's, or an idle neighbour's. The paper has w = 1. With w = 2 the next layer's copy runs under
the present layer's attention.

Streaming costs time in every step, so a context gets no more windowed blocks than it needs; a short context is all
regular.
"""

from __future__ import annotations

from dataclasses import dataclass

from polder.errors import BudgetError, ConfigError
from polder.planner.model_shape import ModelShape

__all__ = ["Capacity"]


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """Room for KV. Raises ConfigError for a window that is no window."""

    block_tokens: int
    layers: int
    window_layers: int = 1
    """w"""
    local_layer_blocks: int
    """K_master, equation (3): blocks of a single layer that local memory holds."""
    external_blocks: int = 0
    """Sum of K_i, equation (2): blocks of all layers that external memory holds."""

    def __post_init__(self) -> None:
        if not 1 <= self.window_layers <= self.layers:
            raise ConfigError(f"window: {self.window_layers} of {self.layers} layers; write a number from 1 to that")

    @classmethod
    def of_bytes(
        cls, shape: ModelShape, *, local_bytes: int, external_bytes: int, block_tokens: int, window_layers: int = 1
    ) -> Capacity:
        block_bytes = block_tokens * shape.kv_bytes_of_layer  # M_block, equation (1)
        return cls(
            block_tokens=block_tokens,
            layers=shape.layers,
            window_layers=window_layers,
            local_layer_blocks=max(0, local_bytes) // block_bytes,
            external_blocks=max(0, external_bytes) // (block_bytes * shape.layers),
        )

    @property
    def windowed_blocks(self) -> int:
        """N_LSC, equation (4): the most windowed blocks. min(sum K_i, floor(K_master / w))."""
        return min(self.external_blocks, self.local_layer_blocks // self.window_layers)

    @property
    def regular_blocks(self) -> int:
        """N_RC, equation (5): regular blocks beside these. floor((K_master - w sum K_i) / L), 0 if negative."""
        return max(0, self.local_layer_blocks - self.window_layers * self.external_blocks) // self.layers

    @property
    def longest_tokens(self) -> int:
        """(N_LSC + N_RC) B"""
        return (self.windowed_blocks + self.regular_blocks) * self.block_tokens

    def at_once(self, context_tokens: int) -> int:
        """How many sequences of so many tokens fit together."""
        return (self.windowed_blocks + self.regular_blocks) // self.blocks(context_tokens)

    def blocks(self, context_tokens: int) -> int:
        if context_tokens < 1:
            raise ConfigError(f"context: {context_tokens} tokens; write a number above 0")
        return -(-context_tokens // self.block_tokens)

    def windowed(self, context_tokens: int, sequences: int = 1) -> int:
        """The fewest windowed blocks with which n = `sequences` contexts fit: ceil((n L - K_master) / (L - w)), 0 if n
        L fits.

        Raises BudgetError with the longest context possible when they do not fit.
        """
        blocks = sequences * self.blocks(context_tokens)
        missing = max(0, blocks * self.layers - self.local_layer_blocks)
        won = self.layers - self.window_layers  # layer blocks that one windowed block leaves free
        windowed = 0 if missing == 0 else -(-missing // won) if won else blocks + 1
        if windowed > min(blocks, self.external_blocks):
            raise BudgetError(
                f"{sequences} x {context_tokens:,} tokens do not fit: they need {blocks:,} blocks of {self.block_tokens} tokens "
                f"and {self.layers} layers; local memory holds {self.local_layer_blocks:,} blocks of one layer, external memory "
                f"{self.external_blocks:,} blocks. The longest context possible is {self.longest_tokens:,} tokens"
            )
        return windowed
