"""What is started: the command, the environment and the signs of life of the broker and of each model."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from uuid import UUID

from polder.broker import client
from polder.broker.config import BROKER_SETTINGS, BrokerConfig
from polder.errors import BrokerUnavailable, ConfigError, EnvironmentFault
from polder.serve.arguments import option
from polder.serve.fleet import Fleet, Model
from polder.serve.keys import VARIABLE, EngineGuard
from polder.serve.presence import Presence
from polder.serve.process import PORT, ProcessSpec
from polder.serve.runtime import remake
from polder.serve.supervisor import BROKER

__all__ = ["Place", "broker_spec", "device_arguments", "model_spec", "vllm_serve"]

BROKER_SILENT_S = 60.0
"""A broker that hangs is replaced after so long. Engines survive that, and without a broker sleeping models cannot
wake."""
VLLM_SOCKETS = "VLLM_RPC_BASE_PATH"
"""vLLM's name for the folder of its own sockets, /tmp if not set. An engine that is killed leaves them there."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a fleet runs."""

    socket: Path
    """The broker's."""
    logs: Path
    private: Path
    """A directory of this fleet alone, made again when something has removed it."""
    engine_key: str = ""
    """What engines want of who asks them."""


def broker_spec(config: BrokerConfig, place: Place) -> ProcessSpec:
    """`polder broker` with this configuration."""
    devices = [word for name, size in config.devices.items() for word in ("--device", f"{name}={size}")]
    options = ["--socket", str(config.socket)]
    for given in BROKER_SETTINGS.values():
        value = getattr(config if hasattr(config, given.field) else config.policy, given.field)
        options += [given.option, given.kind.write(value)]
    answers = _BrokerAnswers(config.socket)
    return ProcessSpec(
        name=BROKER,
        argv=(sys.executable, "-m", "polder.cli.main", "broker", *devices, *options),
        log_path=place.logs / "broker.log",
        is_ready=answers,
        silent_s=BROKER_SILENT_S,
        prepare=lambda: answers.begin(place.private),
    )


def model_spec(model: Model, fleet: Fleet, place: Place) -> ProcessSpec:
    if VARIABLE in model.env:
        raise ConfigError(
            f"model {model.name}: env: {VARIABLE}: write server.api_key in place of it, one for all models"
        )
    own_size = "--kv-cache-memory-bytes"
    sized = "VLLM_CPU_KVCACHE_SPACE" in {**os.environ, **model.env} or option(model.args, own_size) is not None
    # Without this option each CPU engine plans for most of the machine's memory, and the second one refuses to start.
    size = (own_size, str(fleet.budget_bytes)) if fleet.device.startswith("cpu") and not sized else ()
    guard = ("--middleware", f"{EngineGuard.__module__}.{EngineGuard.__name__}") if place.engine_key else ()
    spec = vllm_serve(
        model.path,
        name=model.name,
        args=(*model.arguments(), *size, *device_arguments(model, fleet.device), *guard),
        # vLLM reads the key from the environment, where other users cannot see it as they see arguments. Without one it
        # must not take this process's own, which is the fleet's.
        env=_sockets_in(place.private) | model.environment(place.socket) | {VARIABLE: place.engine_key},
        cpus=model.cpus,
        log_path=place.logs / f"{model.name.replace('/', '%2F')}.log",
    )
    return replace(spec, is_ready=Presence(model.name, place.socket), prepare=lambda: remake(place.private))


def device_arguments(model: Model, device: str) -> tuple[str, ...]:
    """What makes vLLM use this device. The other GPUs are not hidden: "cuda:1" must be the same device for the broker
    and its engines."""
    number = device.removeprefix("cuda:")
    chosen = option(model.args, "--device-ids") is not None or "CUDA_VISIBLE_DEVICES" in model.env
    return ("--device-ids", number) if device.startswith("cuda") and int(number) and not chosen else ()


def _sockets_in(private: Path) -> dict[str, str]:
    """Puts vLLM's own sockets into the fleet's directory, which is removed at the end, if the path is short enough."""
    try:
        client.check_socket_path(private / str(UUID(int=0)))
    except ConfigError:
        return {}
    return {} if VLLM_SOCKETS in os.environ else {VLLM_SOCKETS: str(private)}


class _BrokerAnswers:
    """Whether the broker answers. Raises EnvironmentFault when it did since its start, and its socket was removed."""

    def __init__(self, socket: Path) -> None:
        self._socket, self._answered = socket, False

    def begin(self, private: Path) -> None:
        """Before each start."""
        self._answered = False
        remake(private)

    def __call__(self) -> bool:
        with contextlib.suppress(BrokerUnavailable):
            client.status(self._socket, timeout_s=1.0)
            self._answered = True
            return True
        if self._answered and not self._socket.exists():
            raise EnvironmentFault(f"{self._socket} was removed, so nobody can reach it")
        return False


def vllm_serve(
    model_path: Path | str,
    *,
    name: str,
    port: int | str = PORT,
    args: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    cpus: str = "",
    log_path: Path | None = None,
) -> ProcessSpec:
    """`vllm serve` on loopback: the model at `model_path` under the name `name`, on the cores `cpus` (empty: all).

    Without a `port` it gets another one for each start.
    """
    command = Path(sys.executable).with_name("vllm")
    program = (str(command),) if command.exists() else (sys.executable, "-m", "vllm.entrypoints.cli.main")
    own = {"--served-model-name": name, "--host": "127.0.0.1", "--port": str(port)}
    options = [word for option in own.items() for word in option]
    # A log line for each request would grow without bound.
    options.append("--disable-uvicorn-access-log")
    pinned = ("taskset", "--cpu-list", cpus) if cpus else ()
    return ProcessSpec(
        name=name,
        argv=(*pinned, *program, "serve", str(model_path), *options, *args),
        env=dict(env or {}),
        log_path=log_path,
        health_url=f"http://127.0.0.1:{port}/health",
    )
