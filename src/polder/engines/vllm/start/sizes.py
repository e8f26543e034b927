"""How large an engine's KV cache is: in vLLM's configuration, and as the broker is told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from polder.broker.wire import Hello
from polder.engines.vllm.core.lender import lent_geometry
from polder.engines.vllm.rank.geometry import KvGeometry, places_of, unit_blocks, units_of_request
from polder.engines.vllm.settings import EngineSettings
from polder.engines.vllm.window.agreement import WindowAgreement, agree_on_window, units_with_window
from polder.errors import BudgetError, ConfigError
from polder.tiers.peer.lending import table_bytes
from polder.units import format_bytes

__all__ = ["Sizes", "hello_of", "sizes_of"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """A KV cache of the ceiling's size, in whole units."""

    configs: list[Any]
    """vLLM's KVCacheConfig of each rank."""
    geometry: KvGeometry
    regular_units: int
    """The ceiling; windowed units lie above it."""
    window: WindowAgreement | None

    @property
    def block_tokens(self) -> list[int]:
        """Tokens of a block, for each KV cache group."""
        return [group.kv_cache_spec.block_size for group in self.configs[0].kv_cache_groups]


def sizes_of(
    get_configs: Callable[..., list[Any]],
    vllm_config: Any,
    kv_cache_specs: list[Any],
    settings: EngineSettings,
    *,
    ceiling_bytes: int,
    page_bytes: int,
) -> Sizes:
    """The most whole units that fit `ceiling_bytes` a rank, and the windowed ones above them. Raises BudgetError,
    ConfigError.

    `get_configs`: vLLM's get_kv_cache_configs.
    """
    cache = vllm_config.cache_config
    asked = cache.num_gpu_blocks_override
    store_bytes = settings.window_bytes // len(kv_cache_specs)
    try:
        # What is windowed has all of its bytes in the store, so this is what vLLM can have blocks for.
        memory = [ceiling_bytes + store_bytes] * len(kv_cache_specs)
        configs = get_configs(vllm_config, kv_cache_specs, memory)
        places = [place for config in configs for place in places_of(config)]
        if not places:
            raise ConfigError("this model has no KV cache: nothing to make elastic")
        blocks = unit_blocks(places, page_bytes)
        regular = units = min(config.num_blocks for config in configs) // blocks
        if store_bytes:
            regular, units = units_with_window(
                configs[0], settings, ceiling_bytes=ceiling_bytes, store_bytes=store_bytes, blocks_of_unit=blocks
            )
        if regular < 1:
            raise BudgetError(
                f"one unit of this model's KV cache is {blocks} blocks and does not fit {format_bytes(ceiling_bytes)}: "
                f"raise the KV budget, or use smaller pages"
            )
        cache.num_gpu_blocks_override = units * blocks
        configs = get_configs(vllm_config, kv_cache_specs, memory)
    except ValueError as error:
        raise BudgetError(f"KV budget of {format_bytes(ceiling_bytes)} a rank is too small: {error}") from error
    finally:
        cache.num_gpu_blocks_override = asked
    geometries = [KvGeometry.of(config, page_bytes, blocks) for config in configs]
    for geometry in geometries:
        geometry.check()
    if len({geometry.pages_per_unit for geometry in geometries}) > 1:
        raise ConfigError("ranks of this engine hold different numbers of layers: elastic KV needs them equal")
    window = agree_on_window(settings, configs[0], geometries[0], regular)
    return Sizes(configs=configs, geometry=geometries[0], regular_units=regular, window=window)


def hello_of(vllm_config: Any, settings: EngineSettings, sizes: Sizes, devices: list[str]) -> Hello:
    """What the broker is told of this KV cache. Raises BudgetError for a floor below one request's need, or above the
    ceiling."""
    geometry, window, model = sizes.geometry, sizes.window, vllm_config.model_config
    unit_bytes, block_tokens = geometry.unit_bytes, sizes.block_tokens
    least = units_of_request(model.max_model_len, block_tokens, geometry.unit_blocks)
    if window is not None:
        least = window.least_held(least, model.max_model_len)
    floor = least
    if settings.kv_floor_bytes is not None:
        floor = settings.kv_floor_bytes // unit_bytes
        if floor < least:
            raise BudgetError(
                f"POLDER_KV_FLOOR={format_bytes(settings.kv_floor_bytes)} is less than one request of max_model_len "
                f"{model.max_model_len} needs: give at least {format_bytes(least * unit_bytes)}, or lower --max-model-len"
            )
    if floor > sizes.regular_units:
        raise BudgetError(
            f"the floor of {format_bytes(floor * unit_bytes)} is over the ceiling of "
            f"{format_bytes(sizes.regular_units * unit_bytes)} a rank: raise the KV budget, or lower --max-model-len"
        )
    page_bytes = geometry.page_bytes
    return Hello(
        engine=settings.engine,
        model=str(model.served_model_name or model.model),
        devices=devices,
        page_bytes=page_bytes,
        pages_per_unit=geometry.pages_per_unit,
        unit_tokens=geometry.unit_blocks * min(block_tokens) // len(block_tokens),
        floor_units=floor,
        ceiling_units=sizes.regular_units,
        share_units=max(1, settings.kv_share_bytes // unit_bytes) if settings.kv_share_bytes is not None else 0,
        host_pages=settings.host_bytes // len(devices) // page_bytes + (window.store_pages if window else 0),
        table_bytes=table_bytes(lent_geometry(geometry, len(devices))) if settings.lend_bytes else 0,
    )
