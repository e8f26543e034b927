"""`polder serve`: checks, starts the broker, the models and one endpoint, and ends all of them."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import uvicorn

from polder.broker import client
from polder.broker.config import BROKER_SETTINGS, BrokerConfig
from polder.broker.transport import find_stale
from polder.errors import AddressInUse, BrokerUnavailable, ConfigError, EnvironmentFault
from polder.serve.arguments import option
from polder.serve.disks import make_folders
from polder.serve.fleet import Fleet, Model
from polder.serve.gateway import make_app
from polder.serve.keys import VARIABLE, fleet_key
from polder.serve.presence import Presence
from polder.serve.process import ProcessSpec, free_port, vllm_serve
from polder.serve.runtime import SOCKET_NAME, runtime_dir
from polder.serve.schema import ServerTable
from polder.serve.supervisor import BROKER, Backoff, Event, Supervisor

__all__ = ["broker_spec", "model_spec", "run"]

BROKER_SILENT_S = 60.0
"""A broker that hangs is replaced after so long. Engines survive that, and without a broker sleeping models cannot
wake."""
DRAIN_S = 5  # open requests get this long once the fleet is told to stop
VLLM_SOCKETS = "VLLM_RPC_BASE_PATH"
"""vLLM's name for the folder of its own sockets, /tmp if not set. An engine that is killed leaves them there."""


def run(
    fleet: Fleet, report: Callable[[Event], None], *, socket_path: Path | None = None, log_dir: Path | None = None
) -> None:
    """Serves until SIGINT or SIGTERM. Must run in the main thread.

    `report` gets every start and death, from several threads, one at a time. Raises AddressInUse, ConfigError and
    EnvironmentFault before anything is started, and EnvironmentFault when a child never becomes ready.
    """
    with _listen(fleet.server.host, fleet.server.port) as listener, runtime_dir() as private:
        path = socket_path or private / SOCKET_NAME
        find_stale(path)  # raises when no broker can be started there
        logs = log_dir or private
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write logs to {logs}: {error.strerror}") from error
        make_folders(model.settings.disks for model in fleet.models)
        ports = {model.name: free_port() for model in fleet.models}
        upstreams = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        teams: list[Supervisor] = []
        key = fleet_key(fleet.server.api_key)
        engine_key = secrets.token_urlsafe(32) if key else ""
        app = make_app(
            upstreams,
            socket=path,
            children=lambda: [child for team in teams for child in team.status()],
            key=key,
            engine_key=engine_key,
            allowed_origins=fleet.server.allowed_origins,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                log_level="warning",
                access_log=False,
                timeout_keep_alive=fleet.server.keep_alive_s,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        given_up: list[str] = []
        one_at_a_time = threading.Lock()

        def hear(event: Event) -> None:
            with one_at_a_time:
                report(event)
            if event.kind == "failed":
                given_up.append(f"{event.child}: {event.detail}")
                server.should_exit = True

        broker = Supervisor([broker_spec(fleet.broker(path), logs / "broker.log")], hear, backoff=Backoff(most_s=2.0))
        models = Supervisor(
            [
                _with_key(model_spec(model, fleet, ports[model.name], path, logs, private), engine_key)
                for model in fleet.models
            ],
            hear,
            # Two engines that load together on one GPU each count the other's allocations as their own.
            starts_at_once=1 if fleet.device.startswith("cuda") else None,
        )
        teams += [broker, models]
        with _ended_by_signals(server):
            try:
                place = f"{_address(fleet.server)}/v1 for {', '.join(ports)}; broker on {path}; logs in {logs}"
                hear(Event(child="gateway", kind="started", pid=os.getpid(), detail=place))
                broker.start()
                if _is_up(broker, server):
                    models.start()
                    server.run(sockets=[listener])
            finally:
                models.stop()
                broker.stop(grace_s=5.0)
                path.unlink(missing_ok=True)
        if given_up:
            raise EnvironmentFault("; ".join(given_up))


def _with_key(spec: ProcessSpec, key: str) -> ProcessSpec:
    """vLLM reads the key from the environment, where other users cannot see it as they see arguments. Without one it
    must not take the environment's, which is the fleet's."""
    return replace(spec, env={**spec.env, VARIABLE: key})


def broker_spec(config: BrokerConfig, log_path: Path) -> ProcessSpec:
    """`polder broker` with this configuration."""
    devices = [word for name, size in config.devices.items() for word in ("--device", f"{name}={size}")]
    options = ["--socket", str(config.socket)]
    for given in BROKER_SETTINGS.values():
        value = getattr(config if hasattr(config, given.field) else config.policy, given.field)
        options += [given.option, given.kind.write(value)]
    return ProcessSpec(
        name=BROKER,
        argv=(
            *(sys.executable, "-m", "polder.cli.main", "broker", *devices),
            *options,
        ),
        log_path=log_path,
        is_ready=lambda: _answers(config.socket),
        silent_s=BROKER_SILENT_S,
    )


def model_spec(model: Model, fleet: Fleet, port: int, socket_path: Path, logs: Path, private: Path) -> ProcessSpec:
    own_size = "--kv-cache-memory-bytes"
    sized = "VLLM_CPU_KVCACHE_SPACE" in {**os.environ, **model.env} or option(model.args, own_size) is not None
    # Without this option each CPU engine plans for most of the machine's memory, and the second one refuses to start.
    size = (own_size, str(fleet.budget_bytes)) if fleet.device.startswith("cpu") and not sized else ()
    number = fleet.device.removeprefix("cuda:")
    chosen = option(model.args, "--device-ids") is not None or "CUDA_VISIBLE_DEVICES" in model.env
    # The other GPUs are not hidden: "cuda:1" must be the same device for the broker and its engines.
    gpu = ("--device-ids", number) if fleet.device.startswith("cuda") and int(number) and not chosen else ()
    spec = vllm_serve(
        model.path,
        name=model.name,
        port=port,
        args=(*model.arguments(), *size, *gpu),
        env=_sockets_in(private) | model.environment(socket_path),
        cpus=model.cpus,
        log_path=logs / f"{model.name.replace('/', '%2F')}.log",
    )
    return replace(spec, is_ready=Presence(model.name, socket_path))


def _sockets_in(private: Path) -> dict[str, str]:
    """Puts vLLM's own sockets into the fleet's directory, which is removed at the end, if the path is short enough."""
    try:
        client.check_socket_path(private / str(UUID(int=0)))
    except ConfigError:
        return {}
    return {} if VLLM_SOCKETS in os.environ else {VLLM_SOCKETS: str(private)}


def _address(server: ServerTable) -> str:
    return f"http://{f'[{server.host}]' if ':' in server.host else server.host}:{server.port}"


def _listen(host: str, port: int) -> socket.socket:
    """Opens the endpoint's port before anything heavy is started. Raises AddressInUse, or ConfigError for an unknown
    host."""
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ConfigError(f"server.host {host!r}: {error.strerror}; write an address of this machine") from error
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(1024)  # with SO_REUSEADDR two may bind one port, but only one may listen
    except OSError as error:
        listener.close()
        raise AddressInUse(
            f"cannot listen on {where}: {error.strerror}; stop the process that does, or choose another server.port"
        ) from error
    return listener


def _answers(socket_path: Path) -> bool:
    with contextlib.suppress(BrokerUnavailable):
        client.status(socket_path, timeout_s=1.0)
        return True
    return False


def _is_up(broker: Supervisor, server: uvicorn.Server) -> bool:
    """Waits for the broker. False when the fleet was told to stop, or the broker was given up."""
    while not server.should_exit:
        if broker.status()[0].state == "ready":
            return True
        time.sleep(0.02)
    return False


@contextlib.contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """SIGINT and SIGTERM end the server, also before it runs. Later ones change nothing while the children are ended.

    While it runs, uvicorn has handlers of its own; afterwards it raises what it caught, which ends in these handlers.
    """

    def ask(number: int, frame: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
