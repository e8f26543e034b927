"""Before the KV cache exists: agree with the broker on its size, and tell the workers.

Runs in the engine core, inside vLLM's own start-up, in place of `get_kv_cache_configs`: vLLM is asked for a cache of
the ceiling's size, rounded to whole units, so that every check of its own (a request of max_model_len must fit) is made
against it; the broker is asked for the floor; the workers get the plan that their `allocate_kv_cache` follows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from polder.broker.core import HOST
from polder.engines.vllm.agreement import Agreement
from polder.engines.vllm.plans import SparsePlan, WeightsFound, WorkerPlan
from polder.engines.vllm.rank import calls
from polder.engines.vllm.settings import EngineSettings
from polder.engines.vllm.start.broker import LocalBroker, ask_sizes, say_hello
from polder.engines.vllm.start.limits import check_kv_cache, check_supported
from polder.engines.vllm.start.sizes import Sizes, hello_of, sizes_of
from polder.engines.vllm.tiers.agreement import agree_on_tiers
from polder.errors import ConfigError
from polder.units import format_bytes

__all__ = ["negotiate"]

logger = logging.getLogger("polder.engine")


def negotiate(
    core: Any,
    settings: EngineSettings,
    get_kv_cache_configs: Callable[..., list[Any]],
    vllm_config: Any,
    kv_cache_specs: list[Any],
) -> tuple[list[Any], Agreement]:
    """vLLM's KV cache configs for the ceiling, and the agreement. Raises BudgetError, ConfigError,
    BrokerUnavailable."""

    def rpc(function: Any, *arguments: Any) -> list[Any]:
        found: list[Any] = core.model_executor.collective_rpc(function, args=arguments)
        return found

    check_supported(vllm_config, settings)
    devices: list[str] = rpc(calls.device_name)
    socket = settings.broker
    if socket is None:
        core.polder_local_broker = _local_broker(settings, devices)
        socket = core.polder_local_broker.socket
    page_bytes, most_bytes = ask_sizes(socket, devices, rpc(calls.device_uuid))
    sizes = sizes_of(
        get_kv_cache_configs,
        vllm_config,
        kv_cache_specs,
        settings,
        ceiling_bytes=min(settings.kv_ceiling_bytes or most_bytes, most_bytes),
        page_bytes=page_bytes,
    )
    check_kv_cache(vllm_config, sizes.configs[0])
    model, window = vllm_config.model_config, sizes.window
    if window is not None and model.original_max_model_len == -1:
        # It is "auto", and vLLM does not know that windowed units take room.
        model.max_model_len = min(model.max_model_len, window.longest_tokens)
    weights = _weights(settings, rpc)
    hello = replace(hello_of(vllm_config, settings, sizes, devices), reserve_bytes=rpc(calls.reserve_bytes))
    if weights is not None:
        hello = replace(hello, layers=weights.layers, layer_pages=weights.layer_pages, streams=weights.streams)
    channel, welcome = say_hello(socket, hello)
    agreement = Agreement(
        settings=settings,
        hello=hello,
        welcome=welcome,
        channel=channel,
        socket=socket,
        geometry=sizes.geometry,
        block_tokens=sizes.block_tokens,
        weights=weights,
        window=window,
    )
    rpc(calls.prepare, _plan(agreement, vllm_config, sizes, rpc))
    logger.info(
        "%s: elastic KV, %d tokens a unit of %s, floor %d, share %d, ceiling %d units",
        hello.engine,
        hello.unit_tokens,
        format_bytes(sizes.geometry.unit_bytes),
        hello.floor_units,
        welcome.share_units,
        hello.ceiling_units,
    )
    return sizes.configs, agreement


def _local_broker(settings: EngineSettings, devices: list[str]) -> LocalBroker:
    assert settings.kv_budget_bytes is not None
    budget = dict.fromkeys(devices, settings.kv_budget_bytes)
    if settings.host_bytes or settings.window_bytes:
        budget[HOST] = settings.host_bytes + settings.window_bytes
    return LocalBroker(budget, settings.page_bytes)


def _plan(agreement: Agreement, vllm_config: Any, sizes: Sizes, rpc: Callable[..., list[Any]]) -> WorkerPlan:
    settings, hello, welcome = agreement.settings, agreement.hello, agreement.welcome
    tiers = agree_on_tiers(
        vllm_config, settings, sizes.configs[0], hello, welcome, agreement.socket, sizes.geometry, rpc
    )
    return WorkerPlan(
        broker=agreement.socket,
        engine=hello.engine,
        generation=welcome.generation,
        page_bytes=hello.page_bytes,
        units=tuple(range(agreement.held_units)),
        pages=tuple(tuple(pages) for pages in welcome.held.kv),
        unit_blocks=sizes.geometry.unit_blocks,
        links=settings.links,
        faults=settings.faults,
        tiers=tiers,
        window=None if sizes.window is None else sizes.window.plan(welcome.host),
        sparse=SparsePlan(disks=settings.sparse_disks, ranks=len(hello.devices)) if settings.sparse_bytes else None,
    )


def _weights(settings: EngineSettings, rpc: Callable[..., list[Any]]) -> WeightsFound | None:
    if settings.weights == "resident":
        return None
    from polder.engines.vllm.weights.calls import describe

    ranks: list[WeightsFound | None] = rpc(describe)
    if ranks[0] is None or len({(rank.layers, rank.layer_pages) for rank in ranks if rank is not None}) > 1:
        raise ConfigError("this model has no decoder layers whose weights can move: remove POLDER_WEIGHTS")
    found = ranks[0]
    logger.info(
        "%s: elastic weights, %d layers of %d pages, %s move, %s stay a rank",
        settings.engine,
        found.layers,
        found.layer_pages,
        format_bytes(found.moved_bytes),
        format_bytes(found.resident_bytes),
    )
    return found
