"""How long a context can be when only some layers' KV of some blocks is local: the capacities of SwiftCache, section 3.2.

Two kinds of blocks. A **regular** block has the KV of all L layers in local memory. A **windowed** block has room for w layers
there, which rotate: layer l's KV comes in before its attention, and all L layers' KV lies in external memory (the host's, or
an idle neighbour's). The paper has one local layer (w = 1, its Layer Stream Cache beside its Regular Cache); two let the next
layer's copy run under the present layer's attention.

Short contexts stay wholly regular: streaming costs time in every step, so a context gets no more windowed blocks than it needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from polder.errors import BudgetError, ConfigError

__all__ = [
    "Capacity",
    "Regions",
    "block_bytes_of_layer",
    "contexts_at_once",
    "full_blocks",
    "local_layer_blocks",
    "longest_context",
    "regular_blocks",
    "split",
    "window_blocks",
]


def block_bytes_of_layer(block_tokens: int, kv_heads: int, head_dim: int, element_bytes: int) -> int:
    """M_block, equation (1): bytes of one block of one layer, keys and values. 2 B H_kv D_kv d_type."""
    return 2 * block_tokens * kv_heads * head_dim * element_bytes


def full_blocks(worker_bytes: int, layer_block_bytes: int, layers: int) -> int:
    """K_i, equation (2): blocks of all layers that `worker_bytes` of external memory hold. floor(C_worker / (M_block L))."""
    return max(0, worker_bytes) // (layer_block_bytes * layers)


def local_layer_blocks(master_bytes: int, layer_block_bytes: int) -> int:
    """K_master, equation (3): blocks of a single layer that local memory holds. floor(C_master / M_block)."""
    return max(0, master_bytes) // layer_block_bytes


@dataclass(frozen=True, kw_only=True)
class Capacity:
    """What there is for KV. Raises ConfigError for a window that is no window."""

    block_tokens: int
    layers: int
    window_layers: int = 1
    """w, local layers of a windowed block."""
    local_layer_blocks: int
    """K_master."""
    external_blocks: int = 0
    """Sum of K_i over all external memory."""

    def __post_init__(self) -> None:
        if not 1 <= self.window_layers <= self.layers:
            raise ConfigError(f"window: {self.window_layers} of {self.layers} layers; write a number from 1 to that")

    @property
    def longest_blocks(self) -> int:
        return window_blocks(self) + regular_blocks(self)


def window_blocks(capacity: Capacity) -> int:
    """N_LSC, equation (4): the most windowed blocks. min(sum K_i, floor(K_master / w))."""
    return min(capacity.external_blocks, capacity.local_layer_blocks // capacity.window_layers)


def regular_blocks(capacity: Capacity) -> int:
    """N_RC, equation (5): regular blocks beside the most windowed ones. floor((K_master - w sum K_i) / L), 0 if negative."""
    windowed = capacity.window_layers * capacity.external_blocks
    return max(0, capacity.local_layer_blocks - windowed) // capacity.layers


def longest_context(capacity: Capacity) -> int:
    """(N_LSC + N_RC) B, in tokens."""
    return capacity.longest_blocks * capacity.block_tokens


def contexts_at_once(context_tokens: int, capacity: Capacity) -> int:
    """How many sequences of so many tokens fit together."""
    return capacity.longest_blocks // _blocks(context_tokens, capacity)


@dataclass(frozen=True, kw_only=True)
class Regions:
    """Where some sequences' blocks go."""

    block_tokens: int
    regular_blocks: int
    windowed_blocks: int

    @property
    def windowed_tokens(self) -> int:
        return self.windowed_blocks * self.block_tokens

    @property
    def windowed_part(self) -> float:
        blocks = self.regular_blocks + self.windowed_blocks
        return self.windowed_blocks / blocks if blocks else 0.0


def split(context_tokens: int, capacity: Capacity, *, sequences: int = 1) -> Regions:
    """The fewest windowed blocks with which `sequences` contexts fit: W = ceil((n L - K_master) / (L - w)), none if n L fits.

    Raises BudgetError with the longest context possible when none fits.
    """
    blocks = sequences * _blocks(context_tokens, capacity)
    missing = max(0, blocks * capacity.layers - capacity.local_layer_blocks)
    won = capacity.layers - capacity.window_layers  # layer blocks that one block leaves free by being windowed
    windowed = 0 if missing == 0 else -(-missing // won) if won else blocks + 1
    if windowed > min(blocks, capacity.external_blocks):
        raise BudgetError(
            f"{sequences} x {context_tokens:,} tokens do not fit: {blocks:,} blocks of {capacity.block_tokens} tokens and "
            f"{capacity.layers} layers, against local memory for {capacity.local_layer_blocks:,} layer blocks and external memory "
            f"for {capacity.external_blocks:,} blocks; the longest context possible is {longest_context(capacity):,} tokens"
        )
    return Regions(block_tokens=capacity.block_tokens, regular_blocks=blocks - windowed, windowed_blocks=windowed)


def _blocks(context_tokens: int, capacity: Capacity) -> int:
    if context_tokens < 1:
        raise ConfigError(f"context: {context_tokens} tokens; write a number above 0")
    return -(-context_tokens // capacity.block_tokens)
