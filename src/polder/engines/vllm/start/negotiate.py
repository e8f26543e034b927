"""Before the KV cache exists: agree with the broker on its size, and tell the workers.

Runs in the engine core, inside vLLM's own start-up, in place of `get_kv_cache_configs`: vLLM is asked for a cache of the ceiling's
size, rounded to whole units, so that every check of its own (a request of max_model_len must fit) is made against it; the broker is
asked for the floor; the workers get the plan that their `allocate_kv_cache` follows.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from polder.broker.client import status
from polder.broker.config import BrokerConfig
from polder.broker.core import HOST
from polder.broker.server import BrokerServer
from polder.broker.transport import Channel
from polder.broker.wire import DeviceStatus, Hello, Refused, Welcome
from polder.engines.vllm.core.lender import lent_geometry
from polder.engines.vllm.plans import WeightsFound, WorkerPlan
from polder.engines.vllm.rank import calls
from polder.engines.vllm.rank.geometry import KvGeometry, unit_blocks, units_of_request
from polder.engines.vllm.rank.memory import geometry_of, places_of
from polder.engines.vllm.settings import EngineSettings
from polder.engines.vllm.start.kv_limits import check_kv_cache
from polder.engines.vllm.tiers.agreement import CONNECTOR, agree_on_tiers
from polder.engines.vllm.window.agreement import WindowAgreement, agree_on_window, with_window
from polder.engines.vllm.window.limits import check_window
from polder.errors import BrokerUnavailable, BudgetError, ConfigError, ProtocolError
from polder.tiers.peer.lending import table_bytes
from polder.units import format_bytes

__all__ = ["Agreement", "LocalBroker", "check_devices", "check_supported", "negotiate"]

logger = logging.getLogger("polder.engine")

BROKER_PATIENCE_S = 10.0  # a broker that starts together with its engines
FLOOR_PATIENCE_S = 60.0  # the others giving a newcomer's floor back


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What broker and engine agreed on."""

    hello: Hello
    welcome: Welcome
    channel: Channel
    socket: Path
    unit_blocks: int
    block_tokens: int
    groups: int
    geometry: KvGeometry
    lend_bytes: int
    weights: WeightsFound | None
    """None: they stay where they are."""
    tbt_goal_s: float | None
    window: WindowAgreement | None


class LocalBroker:
    """The in-process broker of an engine that shares with nobody: same code, own thread, abstract socket."""

    def __init__(self, device_bytes: dict[str, int], page_bytes: int) -> None:
        self.socket = Path(f"@polder-{os.getpid()}-{os.urandom(4).hex()}")
        config = BrokerConfig(socket=self.socket, devices=device_bytes, page_bytes=page_bytes)
        self._server = BrokerServer(config)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._server.run, args=(self._stop,), name="polder-broker", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=5.0)
        self._server.close()


def negotiate(
    core: Any,
    settings: EngineSettings,
    get_kv_cache_configs: Callable[..., list[Any]],
    vllm_config: Any,
    kv_cache_specs: list[Any],
) -> tuple[list[Any], Agreement]:
    """vLLM's KV cache configs for the ceiling, and the agreement. Raises BudgetError, ConfigError, BrokerUnavailable."""
    check_supported(vllm_config, settings)
    devices = [str(name) for name in core.model_executor.collective_rpc(calls.device_name)]
    uuids = [str(uuid) for uuid in core.model_executor.collective_rpc(calls.device_uuid)]
    socket = settings.broker
    if socket is None:
        assert settings.kv_budget_bytes is not None
        budget = dict.fromkeys(devices, settings.kv_budget_bytes)
        if settings.host_bytes or settings.window_bytes:
            budget[HOST] = settings.host_bytes + settings.window_bytes
        core.polder_local_broker = LocalBroker(budget, settings.page_bytes)
        socket = core.polder_local_broker.socket
    page_bytes, most_bytes = _ask_sizes(socket, devices, uuids)
    ceiling_bytes = min(settings.kv_ceiling_bytes or most_bytes, most_bytes)
    store_bytes = settings.window_bytes // len(devices)
    configs, blocks_of_unit, regular_units = _configs_of_units(
        get_kv_cache_configs, vllm_config, kv_cache_specs, ceiling_bytes, page_bytes, settings, store_bytes
    )
    check_kv_cache(vllm_config, configs[0])
    geometry = geometry_of(configs[0], page_bytes, blocks_of_unit)
    window = agree_on_window(settings, configs[0], geometry, regular_units)
    model = vllm_config.model_config
    if (
        window is not None and model.original_max_model_len == -1
    ):  # "auto": vLLM does not know that windowed units take room
        model.max_model_len = min(model.max_model_len, window.longest_tokens(regular_units))
    hello, block_tokens = _hello(vllm_config, settings, configs[0], geometry, devices, regular_units, window)
    hello = replace(hello, reserve_bytes=core.model_executor.collective_rpc(calls.reserve_bytes))
    weights = _weights(core, settings)
    if weights is not None:
        hello = replace(hello, layers=weights.layers, layer_pages=weights.layer_pages, streams=weights.streams)
    channel, welcome = _say_hello(socket, hello)

    def rpc(function: Any, *arguments: Any) -> list[Any]:
        found: list[Any] = core.model_executor.collective_rpc(function, args=arguments)
        return found

    plan = WorkerPlan(
        broker=socket,
        engine=hello.engine,
        generation=welcome.generation,
        page_bytes=page_bytes,
        units=tuple(range(len(welcome.held.kv[0]) // hello.pages_per_unit)),
        pages=tuple(tuple(pages) for pages in welcome.held.kv),
        unit_blocks=blocks_of_unit,
        tiers=agree_on_tiers(vllm_config, settings, configs[0], hello, welcome, socket, geometry, rpc),
        window=None if window is None else window.plan(welcome.host, settings),
    )
    core.model_executor.collective_rpc(calls.prepare, args=(plan,))
    logger.info(
        "%s: elastic KV, %d tokens a unit of %s, floor %d, share %d, ceiling %d units",
        hello.engine,
        hello.unit_tokens,
        format_bytes(hello.pages_per_unit * page_bytes),
        hello.floor_units,
        welcome.share_units,
        hello.ceiling_units,
    )
    agreement = Agreement(
        hello=hello,
        welcome=welcome,
        channel=channel,
        socket=socket,
        unit_blocks=blocks_of_unit,
        block_tokens=block_tokens,
        groups=len(configs[0].kv_cache_groups),
        geometry=geometry,
        lend_bytes=settings.lend_bytes,
        tbt_goal_s=settings.tbt_goal_s,
        weights=weights,
        window=window,
    )
    return configs, agreement


def _weights(core: Any, settings: EngineSettings) -> WeightsFound | None:
    if settings.weights == "resident":
        return None
    from polder.engines.vllm.weights import offloader

    ranks: list[WeightsFound | None] = core.model_executor.collective_rpc(offloader.describe)
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


def check_supported(vllm_config: Any, settings: EngineSettings) -> None:
    """Raises ConfigError for what elastic KV does not work with yet; docs/failures.md lists it."""
    transfer = vllm_config.kv_transfer_config
    if transfer is not None and transfer.kv_connector != CONNECTOR:
        raise ConfigError(
            f"elastic KV does not work together with {transfer.kv_connector} yet: remove --kv-transfer-config"
        )
    if bool(settings.tiers) != (transfer is not None):
        flag = f'--kv-transfer-config \'{{"kv_connector":"{CONNECTOR}","kv_role":"kv_both"}}\''
        raise ConfigError(f"an engine with POLDER_TIERS needs {flag}, and one without must not have it")
    if settings.window_bytes:
        check_window(vllm_config, settings)
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        raise ConfigError("elastic KV does not work with pipeline parallelism yet")
    if vllm_config.parallel_config.data_parallel_size > 1:
        raise ConfigError("elastic KV does not work with --data-parallel-size above 1 yet: run one server per replica")
    if vllm_config.model_config.enable_sleep_mode:
        raise ConfigError("elastic KV replaces --enable-sleep-mode for the KV cache: remove that option")


def _ask_sizes(socket: Path, devices: list[str], uuids: list[str]) -> tuple[int, int]:
    """The broker's page size, and the bytes that one rank could get at most. `devices`, `uuids`: of each rank."""
    deadline = time.monotonic() + BROKER_PATIENCE_S
    while True:
        try:
            known = {d.device: d for d in status(socket).devices}
            break
        except BrokerUnavailable:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
    check_devices(devices, uuids, known)
    pages = min(known[device].total_pages // devices.count(device) for device in devices)
    page_bytes = known[devices[0]].page_bytes
    return page_bytes, pages * page_bytes


def check_devices(devices: Sequence[str], uuids: Sequence[str], known: Mapping[str, DeviceStatus]) -> None:
    """Raises ConfigError unless the broker has each rank's device, by its name and by its UUID where both sides know that."""
    for device, uuid in zip(devices, uuids, strict=True):
        other = next((name for name, their in known.items() if uuid and their.uuid == uuid and name != device), None)
        if other is not None:
            raise ConfigError(
                f"this engine's {device} is the broker's {other}: they have different CUDA_VISIBLE_DEVICES. Start both with the "
                f"same, and choose the engine's GPU by --device-ids {other.removeprefix('cuda:')}"
            )
        if device not in known:
            raise ConfigError(
                f"this engine runs on {device}, and the broker has {', '.join(known)}: add --device {device}=SIZE"
            )
        theirs = known[device].uuid
        if uuid and theirs and uuid != theirs:
            raise ConfigError(
                f"{device} is GPU {uuid} for this engine and GPU {theirs} for the broker: start both with the same "
                f"CUDA_VISIBLE_DEVICES, and choose the engine's GPU by --device-ids"
            )


def _configs_of_units(
    get_configs: Callable[..., list[Any]],
    vllm_config: Any,
    kv_cache_specs: list[Any],
    ceiling_bytes: int,
    page_bytes: int,
    settings: EngineSettings,
    store_bytes: int,
) -> tuple[list[Any], int, int]:
    """vLLM's configs for the most whole units that fit `ceiling_bytes` a rank and for the windowed ones above them, the blocks of a
    unit, and how many units are regular."""
    cache = vllm_config.cache_config
    asked = cache.num_gpu_blocks_override
    try:
        # What is windowed has all of its bytes in the store, so this is what vLLM can have blocks for.
        memory = [ceiling_bytes + store_bytes] * len(kv_cache_specs)
        configs = get_configs(vllm_config, kv_cache_specs, memory)
        places = [place for config in configs for place in places_of(config)]
        if not places:
            raise ConfigError("this model has no KV cache: nothing to make elastic")
        blocks_of_unit = unit_blocks(places, page_bytes)
        units = min(config.num_blocks for config in configs) // blocks_of_unit
        regular = units
        if store_bytes:
            regular, units = with_window(configs, ceiling_bytes, page_bytes, blocks_of_unit, settings, store_bytes)
        if regular < 1:
            raise BudgetError(
                f"one unit of this model's KV cache is {blocks_of_unit} blocks and does not fit {format_bytes(ceiling_bytes)}: "
                f"raise the KV budget, or use smaller pages"
            )
        cache.num_gpu_blocks_override = units * blocks_of_unit
        configs = get_configs(vllm_config, kv_cache_specs, memory)
    except ValueError as error:
        raise BudgetError(f"KV budget of {format_bytes(ceiling_bytes)} a rank is too small: {error}") from error
    finally:
        cache.num_gpu_blocks_override = asked
    geometries = [geometry_of(config, page_bytes, blocks_of_unit) for config in configs]
    for geometry in geometries:
        geometry.check()
    if len({geometry.pages_per_unit for geometry in geometries}) > 1:
        raise ConfigError("ranks of this engine hold different numbers of layers: elastic KV needs them equal")
    return configs, blocks_of_unit, regular


def _hello(
    vllm_config: Any,
    settings: EngineSettings,
    config: Any,
    geometry: KvGeometry,
    devices: list[str],
    regular_units: int,
    window: WindowAgreement | None,
) -> tuple[Hello, int]:
    page_bytes, blocks_of_unit = geometry.page_bytes, geometry.unit_blocks
    unit_bytes = geometry.pages_per_unit * page_bytes
    sizes = [group.kv_cache_spec.block_size for group in config.kv_cache_groups]
    max_model_len = vllm_config.model_config.max_model_len
    least = units_of_request(max_model_len, sizes, blocks_of_unit)
    if window is not None:
        least = window.least_held(least, regular_units, max_model_len)
    floor = least
    if settings.kv_floor_bytes is not None:
        floor = settings.kv_floor_bytes // unit_bytes
        if floor < least:
            raise BudgetError(
                f"POLDER_KV_FLOOR={format_bytes(settings.kv_floor_bytes)} is less than one request of max_model_len "
                f"{max_model_len} needs: give at least {format_bytes(least * unit_bytes)}, or lower --max-model-len"
            )
    if floor > regular_units:
        raise BudgetError(
            f"the floor of {format_bytes(floor * unit_bytes)} is over the ceiling of {format_bytes(regular_units * unit_bytes)} "
            f"a rank: raise the KV budget, or lower --max-model-len"
        )
    hello = Hello(
        engine=settings.engine,
        model=str(vllm_config.model_config.served_model_name or vllm_config.model_config.model),
        devices=devices,
        page_bytes=page_bytes,
        pages_per_unit=geometry.pages_per_unit,
        unit_tokens=blocks_of_unit * min(sizes) // len(sizes),
        floor_units=floor,
        ceiling_units=regular_units,
        share_units=max(1, settings.kv_share_bytes // unit_bytes) if settings.kv_share_bytes is not None else 0,
        host_pages=settings.host_bytes // len(devices) // page_bytes + (window.store_pages if window else 0),
        table_bytes=table_bytes(lent_geometry(geometry, len(devices))) if settings.lend_bytes else 0,
    )
    return hello, min(sizes)


def _say_hello(socket: Path, hello: Hello) -> tuple[Channel, Welcome]:
    deadline = time.monotonic() + FLOOR_PATIENCE_S
    channel = Channel(socket, timeout_s=BROKER_PATIENCE_S)
    try:
        while True:
            channel.send(hello)
            answer = channel.receive()
            if isinstance(answer, Welcome):
                return channel, answer
            if not isinstance(answer, Refused):
                raise ProtocolError(f"the broker answered Hello with {type(answer).__name__}")
            if not answer.retry_s or time.monotonic() > deadline:
                raise BudgetError(answer.reason)
            time.sleep(answer.retry_s)
    except TimeoutError:
        channel.close()
        raise BrokerUnavailable(f"the broker on {socket} did not answer") from None
    except BaseException:
        channel.close()
        raise
