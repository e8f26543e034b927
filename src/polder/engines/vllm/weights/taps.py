"""What takes the place of vLLM's functions that load, read or replace weights in a worker. hooks.py has the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from polder.engines.vllm.process import here
from polder.engines.vllm.settings import settings_of
from polder.errors import ConfigError

__all__ = ["create_offloader", "load_model", "read_weights", "update_weights"]


def create_offloader(stock: Callable[[Any], Any], offload_config: Any) -> Any:
    from vllm.config import get_current_vllm_config

    vllm_config = get_current_vllm_config()
    settings = settings_of(vllm_config)
    if settings is None or settings.weights == "resident":
        return stock(offload_config)
    from polder.engines.vllm.weights.offloader import open_offloader

    return open_offloader(vllm_config, settings)


def load_model(stock: Callable[..., None], runner: Any, *args: Any, **kwargs: Any) -> None:
    import vllm.v1.worker.gpu_model_runner as gpu_model_runner

    stock(runner, *args, **kwargs)
    gpu_model_runner.get_offloader().post_init()


def update_weights(stock: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    settings = settings_of(worker.vllm_config)
    if settings is not None and settings.weights == "elastic":
        raise ConfigError(
            "weights cannot be replaced while this engine serves with elastic weights: their host copy would keep the "
            "old ones. Start it anew, or serve it with resident weights"
        )
    if settings is not None and settings.disks and here.tiers is not None:
        here.tiers.stop_disks()  # their namespace names the old weights
    return stock(worker, *args, **kwargs)


def read_weights(stock: Callable[..., Any], worker: Any, *args: Any, **kwargs: Any) -> Any:
    """Reads all weights at once: those of a model that sleeps have no memory, and layers that are streamed share
    theirs."""
    settings = settings_of(worker.vllm_config)
    if settings is not None and settings.weights == "elastic":
        raise ConfigError(
            f"{stock.__name__} does not work with elastic weights: serve the model with resident ones for it"
        )
    return stock(worker, *args, **kwargs)
