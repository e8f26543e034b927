"""What an engine's core and the broker agree on about tiers, before the KV cache exists. Imports nothing of vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polder.broker.client import status
from polder.broker.core import HOST
from polder.broker.wire import Hello, Welcome
from polder.engines.vllm.compat import installed_version
from polder.engines.vllm.plans import TierPlan
from polder.engines.vllm.process import here
from polder.engines.vllm.rank.geometry import KvGeometry
from polder.engines.vllm.settings import EngineSettings
from polder.errors import ConfigError
from polder.tiers.namespace import Namespace, config_digest, cpu_isa, weights_fingerprint

__all__ = ["CONNECTOR", "SPEC", "agree_on_tiers", "check_caching"]

CONNECTOR = "PolderConnector"
SPEC = "PolderOffloadingSpec"
UNKNOWN = "unknown"


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
    from polder.engines.vllm.tiers.disk import disk_plan
    from polder.engines.vllm.tiers.manager import TierAgreement
    from polder.engines.vllm.tiers.worker import caches_prefixes

    check_caching([vllm_config.cache_config.enable_prefix_caching, *rpc(caches_prefixes)])
    transfer = vllm_config.kv_transfer_config
    transfer.kv_load_failure_policy = "recompute"
    _check_extra_config(transfer.kv_connector_extra_config)
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
    names = _namespace(vllm_config, kv_cache_config, ranks, hello.devices[0])
    if settings.disks:
        _check_lasting(vllm_config, names)
    namespace = names.digest()
    plan = TierPlan(
        tiers=settings.tiers,
        capacities=tuple(capacity[tier] for tier in settings.tiers),
        shard_bytes=shard_bytes,
        host_pages=tuple(tuple(pages[:host_pages]) for pages in welcome.host),
        number=os.getpid(),
        namespace=namespace,
        disk=disk_plan(settings, shard_bytes=shard_bytes, namespace=namespace, ranks=ranks),
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
    here.tier_agreement = agreement
    return plan


def _check_extra_config(extra: Mapping[str, Any]) -> None:
    if extra.get("sync_load_budget_bytes"):
        # Since vLLM 0.33: loads within a step, which has no way to report that one has failed.
        raise ConfigError(
            "PolderConnector loads between steps only: remove sync_load_budget_bytes from kv_connector_extra_config"
        )


def check_caching(caching: Sequence[bool]) -> None:
    """`caching`: what vLLM decided in the core and in each worker. All decisions are made by now: the platform's before
    the model is loaded, that of a layer's backend in the worker that loads it, that of a layer without causal attention
    in the core.

    Raises ConfigError where prefixes are not cached: a tier would give hits that vLLM's own cache must not give.
    """
    if not all(caching):
        raise ConfigError(
            "this engine does not cache prefixes: --no-enable-prefix-caching was given, or vLLM switched it off, for this model "
            "would compute something else with it (its log says why). Then a tier must not return KV either: remove POLDER_TIERS"
        )


def _namespace(vllm_config: Any, kv_cache_config: Any, ranks: int, device: str) -> Namespace:
    model, cache = vllm_config.model_config, vllm_config.cache_config
    groups = [
        (type(g.kv_cache_spec).__name__, g.kv_cache_spec.page_size_bytes, len(g.layer_names))
        for g in kv_cache_config.kv_cache_groups
    ]
    return Namespace(
        model=str(model.model),
        weights=weights_fingerprint(str(model.model), model.revision, _cached(model)) or UNKNOWN,
        config=config_digest(
            model.hf_config.to_dict(),
            architecture=model.architecture,
            computed_in=str(model.dtype),  # a KV cache of 8 bits does not tell
            quantization=model.quantization,
            context=model.max_model_len if "longrope" in repr(model.hf_config.to_dict()) else None,
        ),
        dtype=str(model.dtype if cache.cache_dtype == "auto" else cache.cache_dtype),
        layout=f"{getattr(cache, 'kv_cache_layout', None)} {groups}",
        block_tokens=kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size,
        isa=cpu_isa() if device.startswith("cpu") else device.partition(":")[0],
        shard=f"*/{ranks}",
        software=f"vllm {installed_version()}",
    )


def _cached(model: Any) -> Path | None:
    """The configuration in the hub's cache, by which a branch says at which commit it was."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(str(model.model), "config.json", revision=model.revision)
    except HFValidationError:  # no name of a hub's
        return None
    return Path(found) if isinstance(found, str) else None


def _check_lasting(vllm_config: Any, names: Namespace) -> None:
    """What a disk keeps outlives the engine, so whatever computed it must have a name. Raises ConfigError where it has
    none."""
    if names.weights == UNKNOWN:
        raise ConfigError(
            f"disk tier: nothing tells the weights of {names.model} from others that may come in their place: serve a folder with "
            f"its weights, or name a commit (--revision), or leave the tier disk out"
        )
    if vllm_config.lora_config is not None:
        raise ConfigError(
            "disk tier: vLLM knows a LoRA adapter by its name alone, and one trained anew would be served the old one's KV after "
            "a restart: leave out --enable-lora or the tier disk"
        )
