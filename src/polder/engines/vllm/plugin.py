"""The entry point (`vllm.general_plugins`): puts Polder's taps on vLLM, and registers its connector.

vLLM calls `register` in every process it starts, sometimes more than once. hooks.py has the table of all that is
replaced.
"""

from __future__ import annotations

import logging

from polder.engines.vllm import hooks
from polder.engines.vllm.compat import check_seams, check_version, installed_version
from polder.engines.vllm.process import here
from polder.engines.vllm.settings import read_settings

__all__ = ["register"]

logger = logging.getLogger("polder.engine")


def register() -> None:
    """Patches vLLM in this process. Raises UnsupportedVersion if the engine is to be elastic and this vLLM was never
    tested."""
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
    hooks.install()
    _register_connector()


def _refuse_later() -> None:
    import vllm.v1.engine.core as engine_core

    from polder.engines.vllm.start.taps import refuse_unsupported

    hooks.replace(engine_core.EngineCore, "_initialize_kv_caches", refuse_unsupported)


def _register_connector() -> None:
    """By name, in every process: the API server rebuilds a connector's metrics from its registered class (see
    tiers/connector.py)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.v1.kv_offload.factory import OffloadingSpecFactory

    from polder.engines.vllm.tiers.agreement import CONNECTOR, SPEC

    package = "polder.engines.vllm"
    KVConnectorFactory.register_connector(CONNECTOR, f"{package}.tiers.connector", CONNECTOR)
    OffloadingSpecFactory.register_spec(SPEC, f"{package}.tiers.manager", SPEC)
