"""What an engine's core and its workers agree on about the window, before the KV cache exists. To import it needs no
vLLM."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from polder.engines.vllm.plans import WindowPlan
from polder.engines.vllm.rank.geometry import KvGeometry, places_of
from polder.engines.vllm.settings import EngineSettings
from polder.errors import BudgetError, ConfigError
from polder.units import format_bytes
from polder.window.regions import WindowShape

__all__ = ["WindowAgreement", "agree_on_window", "units_with_window"]


@dataclass(frozen=True, kw_only=True)
class WindowAgreement:
    """Sizes, and the names of the layers."""

    shape: WindowShape
    unit_blocks: int
    unit_pages: int
    """Pages of a unit on one rank."""
    regular_units: int
    """The ceiling: windowed units lie above it."""
    block_tokens: int
    block_bytes: int
    """Bytes of a block in one layer."""
    layers: tuple[tuple[str, int], ...]
    """Name of each attention layer, and where its block 0 begins, in the order of execution."""

    @property
    def unit_bytes(self) -> int:
        """Bytes of a unit on one rank."""
        return self.shape.layers * self.unit_blocks * self.block_bytes

    @property
    def store_pages(self) -> int:
        """Host pages of one rank."""
        return self.shape.store_units * self.unit_pages

    def least_held(self, wanted_units: int, max_model_len: int) -> int:
        """The floor in units. Raises BudgetError when a request of `max_model_len` has no room, with what would be
        possible."""
        try:
            return self.shape.least_held(wanted_units, self.regular_units)
        except BudgetError as error:
            raise BudgetError(
                f"max_model_len {max_model_len} has no room: {format_bytes(self.regular_units * self.unit_bytes)} of KV on the "
                f"device and {format_bytes(self.shape.store_units * self.unit_bytes)} in POLDER_WINDOW hold "
                f"{self.longest_tokens} tokens with {self.shape.window_layers} of {self.shape.layers} layers local. Raise the KV "
                f"budget or POLDER_WINDOW, keep fewer layers local (POLDER_WINDOW_LAYERS), or lower --max-model-len"
            ) from error

    @property
    def longest_tokens(self) -> int:
        """The longest request that can have room."""
        return (self.shape.most(self.regular_units) * self.unit_blocks - 1) * self.block_tokens

    def plan(self, host: Sequence[Sequence[int]]) -> WindowPlan:
        """`host`: this engine's host pages per rank, the window's last."""
        return WindowPlan(
            window_layers=self.shape.window_layers,
            layers=self.layers,
            block_bytes=self.block_bytes,
            block_tokens=self.block_tokens,
            first_block=self.regular_units * self.unit_blocks,
            blocks=self.shape.store_units * self.unit_blocks,
            host_pages=tuple(tuple(pages[-self.store_pages :]) for pages in host),
        )


def units_with_window(
    config: Any, settings: EngineSettings, *, ceiling_bytes: int, store_bytes: int, blocks_of_unit: int
) -> tuple[int, int]:
    """(regular units, all units) of a rank that has `ceiling_bytes` on the device and `store_bytes` in the store.

    Raises ConfigError for a model whose KV cache cannot be windowed, BudgetError for a store without room for a unit.
    """
    layers, block_bytes = _layers(config, settings)
    unit_bytes = len(layers) * blocks_of_unit * block_bytes
    regular = ceiling_bytes // unit_bytes
    windowed = min(store_bytes // unit_bytes, max(0, regular - 1) * (len(layers) // settings.window_layers))
    if not windowed:
        raise BudgetError(
            f"POLDER_WINDOW={format_bytes(settings.window_bytes)} is less than one unit of {format_bytes(unit_bytes)} a rank, or "
            f"the KV budget has not two: raise them, or use smaller pages"
        )
    return regular, regular + windowed


def agree_on_window(
    settings: EngineSettings, config: Any, geometry: KvGeometry, regular_units: int
) -> WindowAgreement | None:
    """None for an engine without a window."""
    if not settings.window_bytes:
        return None
    layers, block_bytes = _layers(config, settings)
    return WindowAgreement(
        shape=WindowShape(
            layers=len(layers), window_layers=settings.window_layers, store_units=geometry.units - regular_units
        ),
        unit_blocks=geometry.unit_blocks,
        unit_pages=geometry.pages_per_unit,
        regular_units=regular_units,
        block_tokens=config.kv_cache_groups[0].kv_cache_spec.block_size,
        block_bytes=block_bytes,
        layers=layers,
    )


def _layers(config: Any, settings: EngineSettings) -> tuple[tuple[tuple[str, int], ...], int]:
    """(name, offset of block 0) of each layer in the order of execution, and the bytes of a block of one. Raises
    ConfigError."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    found: list[tuple[str, int]] = []
    for tensor, place in zip(config.kv_cache_tensors, places_of(config), strict=True):
        if place.block_outermost and place.layers > 1:
            raise ConfigError("POLDER_WINDOW needs a KV layout with the layers outermost")
        found += [(name, place.offset + at * place.layer_stride) for at, name in enumerate(tensor.layers)]
    strides = {place.block_stride for place in places_of(config)}
    offsets = {offset for _, offset in found}
    if len(config.kv_cache_groups) != 1 or len(strides) != 1 or len(offsets) != len(found):
        raise ConfigError("POLDER_WINDOW works with models of one kind of attention only: remove it for this model")
    spec = config.kv_cache_groups[0].kv_cache_spec
    # Blocks that leave a sliding window stay in the workers' block tables, and a pass would load them: their units may be closed.
    # What is derived from full attention leaves blocks behind as well (R-SWA), or has no `forward` to hook (MLA).
    if type(spec) is not FullAttentionSpec or spec.sliding_window or spec.attention_chunk_size:
        raise ConfigError(
            "POLDER_WINDOW works with full attention only, not with sliding windows, chunks or MLA: remove it for this model"
        )
    if settings.window_layers * 2 > len(found):
        raise ConfigError(
            f"POLDER_WINDOW_LAYERS={settings.window_layers} of {len(found)} layers makes no room: keep at most half of them local"
        )
    return tuple(sorted(found, key=lambda layer: _number(layer[0]))), strides.pop()


def _number(name: str) -> int:
    """The number of a decoder layer: "model.layers.11.self_attn.attn" -> 11."""
    number = re.search(r"\.(\d+)\.", name)
    if number is None:
        raise ConfigError(f"POLDER_WINDOW cannot tell the place of the layer {name!r}")
    return int(number[1])
