"""`polder serve`: checks, starts the broker, the models and one endpoint, and ends all of them."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import uvicorn

from polder.broker import client
from polder.broker.transport import find_stale
from polder.errors import BudgetError, ConfigError, EnvironmentFault
from polder.serve.check import Estimates, ask_vllm, check_model, faults
from polder.serve.child import Backoff, ChildStatus, Event
from polder.serve.control import Order, carried_out
from polder.serve.disks import make_folders
from polder.serve.fleet import Fleet, Model
from polder.serve.gateway import make_app
from polder.serve.keys import VARIABLE, fleet_key
from polder.serve.listening import listen
from polder.serve.logs import keep_logs
from polder.serve.machine import look
from polder.serve.runtime import SOCKET_NAME, runtime_dir
from polder.serve.specs import Place, broker_spec, model_spec
from polder.serve.supervisor import Supervisor

__all__ = ["run"]

DRAIN_S = 5  # open requests get this long once the fleet is told to stop
UNPLANNED = ("ended", "silent", "failed")
"""Events after which the logs are kept."""


def run(
    fleet: Fleet,
    reload: Callable[[], Fleet],
    report: Callable[[Event], None],
    *,
    memory_check: Estimates = "refuse",
    socket_path: Path | None = None,
    log_dir: Path | None = None,
) -> None:
    """Serves until SIGINT or SIGTERM. Must run in the main thread.

    `reload` reads the fleet file again, for models that are added or restarted; those are checked as `memory_check`
    says. `report` gets every start and death,
    from several threads, one at a time. Raises AddressInUse, ConfigError and EnvironmentFault before anything is
    started, and EnvironmentFault when a child never becomes ready.
    """
    with listen(fleet.server.host, fleet.server.port) as listener, runtime_dir() as private:
        path = socket_path or private / SOCKET_NAME
        find_stale(path)  # raises when no broker can be started there
        logs = log_dir or private
        try:
            logs.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write logs to {logs}: {error.strerror}") from error
        make_folders(model.settings.disks for model in fleet.models)
        key = fleet_key(fleet.server.api_key)
        place = Place(socket=path, logs=logs, private=private, engine_key=secrets.token_urlsafe(32) if key else "")
        running = _Running(fleet, reload, report, place, memory_check)
        server = uvicorn.Server(
            uvicorn.Config(
                make_app(
                    running.models,
                    socket=path,
                    children=running.children,
                    key=key,
                    engine_key=place.engine_key,
                    allowed_origins=fleet.server.allowed_origins,
                ),
                log_config=None,  # warnings go to stderr as they are
                access_log=False,
                timeout_keep_alive=fleet.server.keep_alive_s,
                timeout_graceful_shutdown=DRAIN_S,
            )
        )
        running.server = server
        with carried_out(path, running.carry_out), _ended_by_signals(server):
            try:
                running.hear(Event(child="gateway", kind="started", pid=os.getpid(), detail=running.greeting()))
                running.broker.start()
                if running.broker_is_up():
                    running.models.start()
                    server.run(sockets=[listener])
            finally:
                running.models.stop()
                running.broker.stop(grace_s=5.0)
                path.unlink(missing_ok=True)
        if running.unplanned or running.awaited:
            kept = f"logs in {keep_logs(private) if log_dir is None else logs}"
            if running.given_up:
                raise EnvironmentFault(f"{', '.join(running.given_up)} did not start; {kept}")
            running.hear(
                Event(child="gateway", kind="stopped", pid=None, detail=f"stopped; {running.trouble()}: {kept}")
            )


class _Running:
    """A fleet while it runs: what its children and its operator do to it."""

    def __init__(
        self,
        fleet: Fleet,
        reload: Callable[[], Fleet],
        report: Callable[[Event], None],
        place: Place,
        memory_check: Estimates,
    ) -> None:
        self._fleet, self._reload, self._report, self._place = fleet, reload, report, place
        self._memory_check = memory_check
        self._one_at_a_time = threading.Lock()
        self.awaited = {model.name for model in fleet.models}  # without them it is not up yet
        self.server: uvicorn.Server | None = None
        self.given_up: list[str] = []
        self.unplanned = False
        self.broker = Supervisor(
            [broker_spec(fleet.broker(place.socket), place)], self.hear, backoff=Backoff(most_s=2.0)
        )
        self.models = Supervisor(
            [model_spec(model, fleet, place) for model in fleet.models],
            self.hear,
            # Two engines that load together on one GPU each count the other's allocations as their own.
            starts_at_once=1 if fleet.device.startswith("cuda") else None,
        )

    def children(self) -> list[ChildStatus]:
        return [*self.broker.status(), *self.models.status()]

    def hear(self, event: Event) -> None:
        self.unplanned |= event.kind in UNPLANNED
        with self._one_at_a_time:
            self._report(event)
        if event.kind == "failed" and (event.child in self.awaited or event.child in self.broker):
            self.given_up.append(event.child)
            if self.server is not None:
                self.server.should_exit = True
        if event.kind == "ready" and event.child in self.awaited:
            self.awaited.discard(event.child)
            if not self.awaited:
                detail = f"ready, try\n{_example(self._fleet)}"
                self.hear(Event(child="gateway", kind="ready", pid=os.getpid(), detail=detail))

    def trouble(self) -> str:
        """Why the logs are kept. Who ends a start that takes too long looks there for the reason."""
        return "a child had died" if self.unplanned else f"not ready yet: {', '.join(sorted(self.awaited))}"

    def greeting(self) -> str:
        names = ", ".join(model.name for model in self._fleet.models)
        place = self._place
        return f"{self._fleet.server.url}/v1 for {names}; broker on {place.socket}; logs in {place.logs}"

    def broker_is_up(self) -> bool:
        """Waits for the broker. False when the fleet was told to stop, or the broker was given up."""
        while self.server is not None and not self.server.should_exit:
            if self.broker.status()[0].state == "ready":
                return True
            time.sleep(0.02)
        return False

    def carry_out(self, order: Order) -> str:
        """Returns what was done. Raises UsageError, and EnvironmentFault when the model does not start."""
        if order.verb == "list":
            return msgspec.json.encode(self.children()).decode()
        if order.verb == "remove":
            self.awaited.discard(order.model)
            self.models.remove(order.model)
            return f"{order.model}: removed"
        model = self._model(order.model)
        self._check(model, order.verb)
        make_folders([model.settings.disks])
        spec = model_spec(model, self._fleet, self._place)
        self.awaited.discard(order.model)  # if it does not start, the others serve on
        if order.verb == "restart":
            self.models.replace(spec)
        else:
            self.models.add(spec)
        while True:
            found = [child for child in self.models.status() if child.name == order.model]
            if found and found[0].state == "ready":
                return f"{order.model}: ready"
            if not found or found[0].state == "failed":
                if found and order.verb == "add":
                    self.models.remove(order.model)
                raise EnvironmentFault(f"{order.model}: {found[0].last_exit if found else 'removed while it started'}")
            if self.server is None or self.server.should_exit:
                raise EnvironmentFault("the fleet is being ended")
            time.sleep(0.2)

    def _model(self, name: str) -> Model:
        """A model of the fleet file as it is now. Raises ConfigError when it is not there, or when more has changed."""
        fleet = self._reload()
        if replace(fleet, models=()) != replace(self._fleet, models=()):
            raise ConfigError("[server] or [memory] of the fleet file has changed: that needs a restart of the fleet")
        found = [model for model in fleet.models if model.name == name]
        if not found:
            raise ConfigError(f"the fleet file has no model {name!r}: add a [[model]] with this name")
        return found[0]

    def _check(self, model: Model, verb: str) -> None:
        """What `polder serve` checks before it starts. Raises BudgetError with what to change."""
        untaken_bytes = None
        if verb == "add":
            devices = client.status(self._place.socket).devices
            device = next(found for found in devices if found.device == self._fleet.device)
            untaken_bytes = device.free_pages * device.page_bytes
        machine = look(self._fleet.device)
        found = list(check_model(model, self._fleet, machine, ask_vllm, untaken_bytes=untaken_bytes))
        if unmet := faults(found, self._memory_check):
            raise BudgetError("; ".join(unmet))


def _example(fleet: Fleet) -> str:
    """A command that asks the first model."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(fleet.server.host, fleet.server.host)
    key = f' -H "Authorization: Bearer ${VARIABLE}"' if fleet_key(fleet.server.api_key) else ""
    body = json.dumps({"model": fleet.models[0].name, "prompt": "Hello", "max_tokens": 16})
    url = f"{replace(fleet.server, host=host).url}/v1/completions"
    return f"curl {url}{key} -H 'Content-Type: application/json' -d '{body}'"


@contextlib.contextmanager
def _ended_by_signals(server: uvicorn.Server) -> Iterator[None]:
    """SIGINT, SIGTERM and the end of the terminal end the server, also before it runs. Later ones change nothing while
    the children are ended.

    While it runs, uvicorn has handlers of its own; afterwards it raises what it caught, which ends in these handlers.
    """

    def ask(number: int, frame: object) -> None:
        server.should_exit = True

    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup ignores it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
