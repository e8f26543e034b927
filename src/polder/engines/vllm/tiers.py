"""What an engine's core and the broker agree on about tiers, before the KV cache exists. Imports nothing of vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from polder.broker.client import status
from polder.broker.core import HOST
from polder.broker.wire import Hello, Welcome
from polder.engines.vllm.geometry import KvGeometry
from polder.engines.vllm.settings import EngineSettings
from polder.errors import ConfigError
from polder.tiers.namespace import Namespace, cpu_isa, weights_fingerprint

__all__ = ["CONNECTOR", "SPEC", "agree_on_tiers"]

CONNECTOR = "PolderConnector"
SPEC = "PolderOffloadingSpec"


def agree_on_tiers(
    vllm_config: Any,
    settings: EngineSettings,
    kv_cache_config: Any,
    hello: Hello,
    welcome: Welcome,
    broker: Path,
    geometry: KvGeometry,
    rpc: Callable[..., list[Any]],
) -> Any:
    """The workers' TierPlan, with the manager's part noted for later; None for an engine without tiers.

    `rpc`: calls a function in all workers.
    """
    if not settings.tiers:
        return None
    from polder.engines.vllm.tier_disk import disk_plan
    from polder.engines.vllm.tier_manager import TierAgreement, agree
    from polder.engines.vllm.tier_worker import TierPlan

    vllm_config.kv_transfer_config.kv_load_failure_policy = "recompute"
    ranks = len(hello.devices)
    shard_bytes = geometry.size_bytes // geometry.num_blocks
    sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
    if len(sizes) != 1:
        raise ConfigError(f"this model's KV cache groups have blocks of {sorted(sizes)} tokens: tiers need one size")
    page_bytes = geometry.page_bytes
    host_pages = settings.host_bytes // ranks // page_bytes
    host_slots = host_pages * page_bytes // shard_bytes
    if "host" in settings.tiers and not host_slots:
        raise ConfigError(f"POLDER_HOST is too small for one block of {shard_bytes * ranks} bytes: raise it")
    # Lenders come and go later, and what they lend is at most what the devices have.
    lendable = sum(d.total_pages for d in status(broker).devices if d.device != HOST) * page_bytes
    capacity = {"peer": lendable // (shard_bytes * ranks), "host": host_slots, "disk": 0}
    namespace = _namespace(vllm_config, kv_cache_config, ranks, hello.devices[0]).digest()
    plan = TierPlan(
        tiers=settings.tiers,
        capacities=tuple(capacity[tier] for tier in settings.tiers),
        shard_bytes=shard_bytes,
        host_pages=tuple(tuple(pages[:host_pages]) for pages in welcome.host),
        number=os.getpid(),
        namespace=namespace,
        disk=disk_plan(settings, shard_bytes=shard_bytes, namespace=namespace, ranks=ranks),
        links=settings.links,
        faults=settings.faults,
    )
    agreement = TierAgreement(
        plan=plan,
        engine=hello.engine,
        broker=broker,
        ranks=ranks,
        block_tokens=sizes.pop(),
        rpc=rpc,
        disk_writes_bytes=settings.disk_writes_bytes,
    )
    agree(agreement)
    return plan


def _namespace(vllm_config: Any, kv_cache_config: Any, ranks: int, device: str) -> Namespace:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    groups = [
        (type(g.kv_cache_spec).__name__, g.kv_cache_spec.page_size_bytes, len(g.layer_names))
        for g in kv_cache_config.kv_cache_groups
    ]
    return Namespace(
        model=str(model.model),
        weights=weights_fingerprint(Path(model.model), model.revision),
        dtype=str(model.dtype if cache.cache_dtype == "auto" else cache.cache_dtype),
        layout=f"{getattr(cache, 'kv_cache_layout', None)} {groups}",
        block_tokens=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
        isa=cpu_isa() if device.startswith("cpu") else device.partition(":")[0],
        shard=f"*/{ranks}",
    )
