"""The entry point (`vllm.general_plugins`): replacements in vLLM, effective only when this engine is to be elastic, and a
connector.

vLLM calls `register` in every process it starts, sometimes more than once. In a process that is not configured by the environment
the patches still have to be in place, because additional-config is known only later; they look it up when they run, and do exactly
what vLLM does if the engine is stock.

| replaced                                | process | why                                                            |
|-----------------------------------------|---------|----------------------------------------------------------------|
| engine.core.get_kv_cache_configs        | core    | the cache's virtual size: whole units up to the ceiling        |
| EngineCore._initialize_kv_caches        | core    | tells the above which core it works for                        |
| EngineCore._initialize_effective_...    | core    | first call after the scheduler exists. __init__ itself cannot  |
|  ..._attention_block_size               |         | be wrapped: plugins are loaded inside it (core.py:129)         |
| EngineCoreProc._handle_client_request   | core    | WAKEUP between two steps: grants and recalls are handled there |
| EngineCoreProc._process_engine_step     | core    | demand after each step                                         |
| EngineCore.shutdown                     | core    | close the broker's line                                        |
| EngineCore.reset_prefix_cache           | core    | tiers forget what the engine's own cache is told to forget     |
| EngineCore.add_lora,                    | core    | an adapter loaded again from changed files has other hashes    |
|  _gen_lora_extra_hash_keys              |         |  (adapters.py; with tiers only)                                |
| Executor.__init__                       | core    | a window: CUDA graphs are piecewise, before workers compile    |
| allocate_kv_cache (V1 and V2 runner)    | worker  | the KV buffer is a span with pages under it                    |
| create_offloader (V1 and V2 runner)     | worker  | elastic weights: decoder layers over pages that come and go    |
| CPUModelRunner.load_model               | worker  | calls the offloader's post_init, as the GPU runners do         |
| gpu_worker.request_memory               | worker  | the second engine on a device gets what is free, not an error  |
| Worker.reload_weights and the two ways  | worker  | elastic weights: refused, the host copy would keep the old     |
|  to update them                         |         | ones, and they would come back in mid-answer; a disk tier      |
|                                         |         | takes nothing more, for its namespace names the old ones       |
| Worker.compute_weight_checksums and the | worker  | elastic weights: refused, they may not be there                |
|  two ways to save them                  |         |                                                                |
| dispatch_cpu_unquantized_gemm           | worker  | elastic weights: packed weights as tensors (cpu_linear.py)     |
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from typing import Any

from polder.broker.client import request
from polder.broker.wire import Stock
from polder.engines.vllm.compat import check_seams, check_version, installed_version
from polder.engines.vllm.process import here
from polder.engines.vllm.settings import EngineSettings, read_settings
from polder.errors import ConfigError
from polder.metrics import checked

__all__ = ["register"]

logger = logging.getLogger("polder.engine")


def register() -> None:
    """Patches vLLM in this process. Raises UnsupportedVersion if the engine is to be elastic and this vLLM was never tested."""
    if here.patched:
        return
    here.patched = True
    version = installed_version()
    configured = read_settings({}, default_name="engine") is not None
    try:
        check_version(version)
        check_seams()
    except Exception:
        if configured:
            raise
        # Stock engines must run with any vLLM; one configured by additional-config is refused when that is read.
        logger.debug("vLLM %s is not supported: Polder stays out of the way", version)
        _refuse_later()
        return
    _patch()


def _settings(vllm_config: Any) -> EngineSettings | None:
    additional = vllm_config.additional_config
    names = vllm_config.model_config.served_model_name
    name = names[0] if isinstance(names, list) else names or vllm_config.model_config.model
    return read_settings(additional if isinstance(additional, dict) else {}, default_name=str(name))


def _refuse_later() -> None:
    import vllm.v1.engine.core as engine_core

    initialize = engine_core.EngineCore._initialize_kv_caches

    def refusing(self: Any, vllm_config: Any) -> Any:
        if _settings(vllm_config) is not None:
            check_version(installed_version())
            check_seams()
        return initialize(self, vllm_config)

    engine_core.EngineCore._initialize_kv_caches = refusing


def _patch() -> None:
    import vllm.v1.engine.core as engine_core
    import vllm.v1.worker.cpu_model_runner as cpu_runner
    import vllm.v1.worker.gpu.attn_utils as v2_runner
    import vllm.v1.worker.gpu.model_runner as v2_model_runner
    import vllm.v1.worker.gpu_model_runner as v1_runner
    import vllm.v1.worker.gpu_worker as gpu_worker

    from polder.engines.vllm.rank import memory

    _patch_start(engine_core)
    _patch_loop(engine_core)
    _patch_forgetting(engine_core.EngineCore)
    _patch_executor()
    _patch_offloader(v1_runner, v2_model_runner, cpu_runner)
    _patch_updates(gpu_worker.Worker)
    _patch_memory(gpu_worker)
    _register_connector()
    # Both modules import the function by name, so both names are replaced.
    v1_runner.allocate_kv_cache = memory.allocate_kv_cache
    v2_runner.allocate_kv_cache = memory.allocate_kv_cache


def _patch_executor() -> None:
    from vllm.v1.executor.abstract import Executor

    stock_init = Executor.__init__

    @functools.wraps(stock_init)
    def init(self: Any, vllm_config: Any) -> None:
        settings = _settings(vllm_config)
        if settings is not None and settings.window_bytes:
            from polder.engines.vllm.window.limits import limit_graphs

            limit_graphs(vllm_config)
        stock_init(self, vllm_config)

    Executor.__init__ = init


def _patch_offloader(v1_runner: Any, v2_runner: Any, cpu_runner: Any) -> None:
    from vllm.config import get_current_vllm_config

    stock_create, load_model = v1_runner.create_offloader, cpu_runner.CPUModelRunner.load_model

    def create_offloader(offload_config: Any) -> Any:
        vllm_config = get_current_vllm_config()
        settings = _settings(vllm_config)
        if settings is None or settings.weights == "resident":
            return stock_create(offload_config)
        from polder.engines.vllm.weights.offloader import open_offloader

        return open_offloader(vllm_config, settings)

    @functools.wraps(load_model)
    def load_model_and_move(self: Any, *args: Any, **kwargs: Any) -> None:
        load_model(self, *args, **kwargs)
        v1_runner.get_offloader().post_init()

    v1_runner.create_offloader = create_offloader
    v2_runner.create_offloader = create_offloader
    cpu_runner.CPUModelRunner.load_model = load_model_and_move


def _patch_memory(gpu_worker: Any) -> None:
    from vllm.config import get_current_vllm_config_or_none

    stock = gpu_worker.request_memory

    def request_memory(init_snapshot: Any, cache_config: Any, external_weight_memory: int = 0) -> int:
        """Bytes of the device that this engine may use. vLLM refuses to start unless its part of the whole device is free; beside
        engines that share the device it gets what is free, for its KV cache is the broker's."""
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is None or _settings(vllm_config) is None:
            return int(stock(init_snapshot, cache_config, external_weight_memory))
        alone = copy.copy(init_snapshot)
        alone.free_memory = init_snapshot.total_memory
        return min(int(stock(alone, cache_config, external_weight_memory)), int(init_snapshot.free_memory))

    gpu_worker.request_memory = request_memory


def _patch_updates(worker_class: Any) -> None:
    for name in ("reload_weights", "start_weight_update", "update_weights", "reset_weights"):
        setattr(worker_class, name, _watched_update(getattr(worker_class, name)))
    for name in ("compute_weight_checksums", "save_sharded_state", "save_tensorized_model"):
        setattr(worker_class, name, _reader(getattr(worker_class, name)))


def _watched_update(stock: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(stock)
    def update(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = _settings(self.vllm_config)
        if settings is not None and settings.weights == "elastic":
            raise ConfigError(
                "weights cannot be replaced while this engine serves with elastic weights: their host copy would keep the "
                "old ones. Start it anew, or serve it with resident weights"
            )
        if settings is not None and settings.disks and here.tiers is not None:
            here.tiers.stop_disks()  # their namespace names the old weights
        return stock(self, *args, **kwargs)

    return update


def _reader(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Reads all weights at once: those of a model that sleeps have no memory, and layers that are streamed share theirs."""

    @functools.wraps(stock)
    def read(self: Any, *args: Any, **kwargs: Any) -> Any:
        settings = _settings(self.vllm_config)
        if settings is not None and settings.weights == "elastic":
            raise ConfigError(
                f"{stock.__name__} does not work with elastic weights: serve the model with resident ones for it"
            )
        return stock(self, *args, **kwargs)

    return read


def _register_connector() -> None:
    """By name, in every process: the API server rebuilds a connector's metrics from its registered class (see
    tiers/connector.py)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    from polder.engines.vllm.tiers.agreement import CONNECTOR, SPEC

    package = "polder.engines.vllm"
    KVConnectorFactory.register_connector(CONNECTOR, f"{package}.tiers.connector", CONNECTOR)
    OffloadingSpecFactory.register_spec(SPEC, f"{package}.tiers.manager", SPEC)


def _patch_start(engine_core: Any) -> None:
    import vllm.v1.core.kv_cache_utils as kv_cache_utils

    from polder.engines.vllm.core.elastic import ElasticCore
    from polder.engines.vllm.start.negotiate import negotiate
    from polder.engines.vllm.tiers.adapters import AdapterEpochs

    core_class = engine_core.EngineCore
    stock_configs = engine_core.get_kv_cache_configs
    initialize, scheduler_ready = (
        core_class._initialize_kv_caches,
        core_class._initialize_effective_attention_block_size,
    )
    starting: list[Any] = []

    @functools.wraps(stock_configs)  # so that the seam looks the same when it is checked again
    def get_kv_cache_configs(vllm_config: Any, kv_cache_specs: Any, available_memory: Any, *groups: Any) -> Any:
        """`groups`: since vLLM 0.33 those of all ranks together; they are the same for any amount of memory."""
        settings = _settings(vllm_config) if starting else None
        if settings is None:
            return stock_configs(vllm_config, kv_cache_specs, available_memory, *groups)
        if not any(kv_cache_specs):
            _serve_as_stock(settings)
            return stock_configs(vllm_config, kv_cache_specs, available_memory, *groups)
        core = starting[-1]
        if not hasattr(core, "input_queue"):
            raise ConfigError(
                "elastic KV needs the engine core in its own process: unset VLLM_ENABLE_V1_MULTIPROCESSING=0"
            )

        def configs_for(vllm_config: Any, kv_cache_specs: Any, available_memory: Any) -> Any:
            return stock_configs(vllm_config, kv_cache_specs, available_memory, *groups)

        configs, core.polder_agreement = negotiate(core, settings, configs_for, vllm_config, kv_cache_specs)
        return configs

    def initialize_kv_caches(self: Any, vllm_config: Any) -> Any:
        starting.append(self)
        try:
            return initialize(self, vllm_config)
        finally:
            starting.pop()

    def scheduler_is_ready(self: Any) -> None:
        scheduler_ready(self)
        agreement = getattr(self, "polder_agreement", None)
        if agreement is not None:
            wakeup = engine_core.EngineCoreRequestType.WAKEUP
            self.polder = ElasticCore(self, agreement, wake=lambda: self.input_queue.put_nowait((wakeup, None)))
            if self.polder.tiers is not None:
                self.polder_adapters = AdapterEpochs()
                stock_keys = kv_cache_utils._gen_lora_extra_hash_keys
                kv_cache_utils._gen_lora_extra_hash_keys = self.polder_adapters.hash_keys(stock_keys)

    engine_core.get_kv_cache_configs = get_kv_cache_configs
    core_class._initialize_kv_caches = initialize_kv_caches
    core_class._initialize_effective_attention_block_size = scheduler_is_ready


def _patch_forgetting(core_class: Any) -> None:
    reset, add_lora = core_class.reset_prefix_cache, core_class.add_lora

    @functools.wraps(reset)
    def reset_prefix_cache(self: Any, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """What a user makes the engine forget the tiers forget, too: weights may have been replaced in a way that nobody told."""
        done = bool(reset(self, reset_running_requests, reset_connector))
        elastic = getattr(self, "polder", None)
        if done and not reset_connector and elastic is not None and elastic.tiers is not None:
            done = bool(self.scheduler.reset_connector_cache())
            elastic.tiers.seal_disks()
        return done

    @functools.wraps(add_lora)  # vLLM reads the annotations, to decode what comes from its front end
    def add_adapter(self: Any, lora_request: Any) -> bool:
        done = bool(add_lora(self, lora_request))
        adapters = getattr(self, "polder_adapters", None)
        if done and adapters is not None:
            adapters.loaded(lora_request)
        return done

    def polder_forget_local(self: Any) -> bool:
        """A utility for tests and benches: forgets the engine's own prefix cache and leaves the tiers as they are."""
        return bool(reset(self, False, False))

    core_class.reset_prefix_cache = reset_prefix_cache
    core_class.add_lora = add_adapter
    core_class.polder_forget_local = polder_forget_local


def _serve_as_stock(settings: EngineSettings) -> None:
    """For a model without a KV cache, such as BERT: it needs nothing from the broker, but who waits for it there must know.

    Raises ConfigError when more than its KV cache was to be elastic, and BrokerUnavailable.
    """
    wanted = {
        "POLDER_TIERS": settings.tiers,
        "POLDER_WINDOW": settings.window_bytes,
        "POLDER_WEIGHTS=elastic": settings.weights == "elastic",
    }
    for name, value in wanted.items():
        if value:
            raise ConfigError(f"this model has no KV cache, so {name} does nothing for it: remove it")
    logger.warning("%s: this model has no KV cache: it is served as by stock vLLM", settings.engine)
    if settings.broker is not None:
        request(settings.broker, Stock(engine=settings.engine, reason="this model has no KV cache"))


def _patch_loop(engine_core: Any) -> None:
    core_class, process_class = engine_core.EngineCore, engine_core.EngineCoreProc
    handle, step, shutdown = (
        process_class._handle_client_request,
        process_class._process_engine_step,
        core_class.shutdown,
    )
    kinds = engine_core.EngineCoreRequestType

    def handle_client_request(self: Any, request_type: Any, request: Any) -> None:
        handle(self, request_type, request)
        elastic = getattr(self, "polder", None)
        if elastic is not None:
            if request_type == kinds.WAKEUP:
                elastic.on_wake()
            elif request_type == kinds.ADD:
                elastic.on_request()
            elif request_type == kinds.ABORT:
                elastic.on_abort()

    def process_engine_step(self: Any) -> bool:
        elastic = getattr(self, "polder", None)
        if elastic is None:
            return bool(step(self))
        executed = bool(step(self))
        elastic.on_step()
        return executed

    def shut_down(self: Any) -> None:
        shutdown(self)
        for name in ("polder", "polder_local_broker"):
            if getattr(self, name, None) is not None:
                getattr(self, name).close()

    def polder_check(self: Any) -> dict[str, float]:
        """A utility any client of the engine can call: checks the laws now and returns the counters."""
        self.polder.check_integrity()
        return checked(self.polder._stats() | self.polder.exact_stats())

    def polder_give_up(self: Any, segments: int) -> None:
        """A utility for tests and benches: gives weights of so many layers up as if the broker had asked for them."""
        self.polder.give_up(segments)

    core_class.polder_check = polder_check
    core_class.polder_give_up = polder_give_up
    process_class._handle_client_request = handle_client_request
    process_class._process_engine_step = process_engine_step
    core_class.shutdown = shut_down
