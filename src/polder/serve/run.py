"""`polder serve`: checks, then the broker, then the models, then one endpoint; and all of it away again at the end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from polder.errors import AddressInUse
from polder.serve.fleet import Fleet
from polder.serve.gateway import make_app
from polder.serve.process import ProcessSpec, vllm_serve
from polder.serve.supervisor import Supervisor

__all__ = ["discover_socket", "run"]

POLL_S = 0.25


def run(fleet: Fleet, *, socket_path: Path | None = None, log_dir: Path | None = None) -> None:
    """Serves until SIGINT or SIGTERM. Raises PolderError before anything is started, and when a child cannot start."""
    listener = _listen(fleet.host, fleet.port)
    with listener, _runtime_dir() as runtime:
        path = socket_path or runtime / "broker"
        logs = log_dir or runtime
        logs.mkdir(parents=True, exist_ok=True)
        ports = {model.name: _free_port() for model in fleet.models}
        specs = [_broker(fleet, path, logs)]
        for model in fleet.models:
            specs.append(
                vllm_serve(
                    model.path,
                    name=model.name,
                    port=ports[model.name],
                    args=model.arguments(),
                    env=model.environment(path),
                    log_path=logs / f"{model.name}.log",
                )
            )
        supervisor = Supervisor(specs, _report)
        try:
            for spec in specs:
                supervisor.start(spec.name)
            upstreams = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
            app = make_app(upstreams, socket=path, children=supervisor.status)
            _report(f"http://{fleet.host}:{fleet.port}/v1 for {', '.join(upstreams)}; broker on {path}; logs in {logs}")
            asyncio.run(_serve(app, listener, supervisor))
        finally:
            _report("stopping")
            supervisor.stop()
            path.unlink(missing_ok=True)


async def _serve(app: object, listener: socket.socket, supervisor: Supervisor) -> None:
    config = uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=2)
    server = uvicorn.Server(config)

    async def watch() -> None:
        while True:
            supervisor.poll()
            await asyncio.sleep(POLL_S)

    watching = asyncio.create_task(watch())
    # Our own handlers: uvicorn would raise the signal again after its shutdown, and the children have to be ended first.
    server.capture_signals = contextlib.nullcontext
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: setattr(server, "should_exit", True))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    done, _ = await asyncio.wait({watching, serving}, return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    await asyncio.gather(serving, return_exceptions=True)
    watching.cancel()
    for task in done:
        task.result()


def _broker(fleet: Fleet, path: Path, logs: Path) -> ProcessSpec:
    policy = fleet.policy
    return ProcessSpec(
        name="broker",
        argv=(
            *(sys.executable, "-m", "polder.cli.main", "broker"),
            *(
                "--socket",
                str(path),
                "--device",
                f"{fleet.device}={fleet.budget_bytes}",
                "--page",
                str(fleet.page_bytes),
            ),
            *("--reserve-low", str(policy.reserve_low_ratio), "--reserve-high", str(policy.reserve_high_ratio)),
            *("--hold", str(policy.min_hold_s), "--deadline", str(policy.deadline_s)),
        ),
        log_path=logs / "broker.log",
    )


def _listen(host: str, port: int) -> socket.socket:
    """Takes the endpoint's port before anything heavy starts. Raises AddressInUse."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise AddressInUse(f"cannot listen on {host}:{port}: {error.strerror}. Choose another server.port") from error
    return listener


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _user_dir() -> Path:
    """Where this user's fleets announce themselves: $XDG_RUNTIME_DIR/polder, or /tmp/polder-UID."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "polder" if base else Path(tempfile.gettempdir()) / f"polder-{os.getuid()}"


@contextlib.contextmanager
def _runtime_dir() -> Iterator[Path]:
    """A private directory for this fleet's socket and logs, gone at the end."""
    parent = _user_dir()
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix="f", dir=parent))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            parent.rmdir()  # only if no other fleet runs


def discover_socket() -> Path | None:
    """The broker's socket of the fleet of this user that started last, or None."""
    found = sorted(_user_dir().glob("f*/broker"), key=lambda p: p.stat().st_mtime)
    return found[-1] if found else None


def _report(line: str) -> None:
    print(f"polder: {line}", file=sys.stderr, flush=True)
