"""One host copy for all engines of the same weights: found through the broker, compared before it is trusted.

Who comes first writes it, the others map it. The key says what it is believed to be; a copy whose bytes are not those
that this engine has just loaded (weights replaced on disk, another vLLM that packs otherwise) is not used. Without a
broker, and when anything goes wrong with sharing, an engine has a copy of its own.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from polder.broker import client
from polder.broker.wire import CopyFilled
from polder.errors import PolderError, UsageError
from polder.memory.backend import Backend
from polder.weights.host_copy import HostCopy
from polder.weights.store import WeightStore

__all__ = ["copy_key", "open_store"]

logger = logging.getLogger("polder.engine")


def copy_key(vllm_config: Any, rank: int) -> str:
    """The key of one rank's weights: equal keys are believed to be equal weights."""
    import vllm

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    parts = (
        *(model.model, model.revision, model.dtype, model.quantization, vllm.__version__),
        *(parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.enable_expert_parallel, rank),
    )
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def open_store(
    backend: Backend,
    layers: Sequence[Mapping[str, Any]],
    obstacles: Mapping[int, str],
    *,
    broker: Path | None,
    key: str,
) -> WeightStore:
    """A store over its own host copy or over another engine's of the same weights. `obstacles`: see WeightStore."""
    make = functools.partial(WeightStore, backend, layers, obstacles=obstacles)
    if broker is None:
        return make()
    try:
        file, filled = client.fetch_copy(broker, key)
    except PolderError as error:
        logger.info("a host copy of its own: %s", error)
        return make()
    try:
        return _shared(make, len(layers), file) if filled else _first(make, file, broker, key)
    finally:
        os.close(file)


def _first(make: Callable[..., WeightStore], file: int, broker: Path, key: str) -> WeightStore:
    store = make(file=file)
    with contextlib.suppress(PolderError):  # the broker is gone: nobody else will find it
        client.request(broker, CopyFilled(key=key))
    return store


def _shared(make: Callable[..., WeightStore], layers: int, file: int) -> WeightStore:
    try:
        shared = HostCopy.open(file, layers, os.fstat(file).st_size // layers)
    except PolderError as error:
        logger.warning("another engine's host copy cannot be shared: %s", error)
        return make()
    try:
        return make(shared=shared)
    except UsageError as error:
        shared.close()
        logger.warning("a host copy of its own: %s", error)
        return make()
