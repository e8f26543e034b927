"""The systems under test: the same models with the same bytes, once in fixed parts, once elastic.

All arms answer on one gateway (the same code) and start engines by `vllm serve` with the same arguments and
environment. They differ in one thing: a stock engine has its blocks fixed at the start, an elastic one is given a
broker.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, Self

import httpx

from polder.bench.harness.engines import EnginePlan, fleet_toml
from polder.bench.harness.machine import check_engine
from polder.bench.harness.scrape import REPORTED, Samples, cache_samples
from polder.broker import client
from polder.errors import EnvironmentFault
from polder.serve.keys import VARIABLE
from polder.serve.process import ManagedProcess, ProcessSpec, free_port
from polder.serve.specs import vllm_serve

__all__ = ["REPORT_S", "Arm", "ArmGroup", "ArmPool", "ArmSpec", "Engine", "Serving", "serves"]

READY_TIMEOUT_S = 900.0
ANSWER_TIMEOUT_S = 30.0
STOP_S = 40.0
"""Until an arm's processes are killed: `polder serve` gives its own children 15 s."""
REPORT_S = 1.3
"""Engines ask their workers for figures once a second, and report to the broker."""


class Engine(Protocol):
    @property
    def name(self) -> str: ...

    def describe(self) -> dict[str, Any]:
        """For the conditions of a result."""


class Serving(Protocol):
    """How an arm serves its engines."""

    @property
    def system(self) -> Literal["stock", "polder"]:
        """Plain `vllm serve`, each with fixed memory, or `polder serve` with a fleet file: a broker and the same
        engines, elastic."""

    @property
    def engines(self) -> Sequence[Engine]: ...

    def stock(self, number: int, port: int, logs: Path) -> ProcessSpec:
        """One engine as plain vLLM."""

    def fleet_file(self, port: int) -> str: ...

    def make(self, name: str, logs: Path, runtime: Path) -> Arm: ...


class ArmSpec(NamedTuple):
    """Models that the bench makes, with a fixed number of blocks or under one budget."""

    system: Literal["stock", "polder"]
    engines: Sequence[EnginePlan]

    def make(self, name: str, logs: Path, runtime: Path) -> Arm:
        """The arm, not started."""
        return Arm(name, self, logs, runtime)

    def fleet_file(self, port: int) -> str:
        return fleet_toml(self.engines, port)

    def stock(self, number: int, port: int, logs: Path) -> ProcessSpec:
        engine = self.engines[number]
        return vllm_serve(
            engine.model_path(),
            name=engine.name,
            port=port,
            args=(
                *("--max-model-len", str(engine.max_model_len)),
                *("--num-gpu-blocks-override", str(engine.blocks)),
                *engine.arguments(),
            ),
            # No plugins are loaded: what runs is vLLM without Polder.
            env=engine.environment() | {"VLLM_PLUGINS": ""},
            cpus=engine.cpus,
            log_path=logs / f"{engine.name}.log",
        )


class Arm:
    """Engines behind one endpoint. Start, wait until ready, use, stop."""

    quiet_s: ClassVar[float] = 1.2
    """Pause before another arm is measured: vLLM's processes spin for a second after their last message."""

    def __init__(self, name: str, spec: Serving, logs: Path, runtime: Path) -> None:
        """Logs go to a folder of its name. `runtime`: short (a socket's path has at most 107 bytes), private."""
        self.name, self._spec, self.engines = name, spec, tuple(spec.engines)
        self.broker = runtime / f"{name}.sock" if spec.system == "polder" else None
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        """The gateway, which routes by model name."""
        self.urls: dict[str, str] = {}
        """Engine -> its own address, behind the gateway; known once the arm is ready."""
        self._logs = logs / name
        self._processes: list[ManagedProcess] = []

    def start(self) -> None:
        """Starts all processes; returns at once."""
        self._logs.mkdir(parents=True, exist_ok=True)
        for old in self._logs.glob("*.log"):
            old.unlink()
        self._processes = list(map(ManagedProcess, self._stock() if self.broker is None else self._polder()))
        for process in self._processes:
            process.start()

    def wait_ready(self) -> None:
        """Returns when every engine answers. Raises EnvironmentFault with the end of a log."""
        for process in self._processes:
            process.wait_ready(READY_TIMEOUT_S)
        self.check()
        if self.broker is not None:
            self.urls = {name: _listening_url(child["pid"]) for name, child in self._children().items()}

    def check(self) -> None:
        """Raises EnvironmentFault when a process has died since the start."""
        for process in self._processes:
            if not process.alive():
                what = f"{self.name}/{process.spec.name}"
                raise EnvironmentFault(f"{what} died with {process.returncode}{process.why()}")
        died = [name for name, child in self._children().items() if child["restarts"] or child["state"] != "ready"]
        if died:
            raise EnvironmentFault(f"{', '.join(died)} of {self.name} died{self._processes[0].why()}")

    def stop(self) -> None:
        """Ends everything the arm started."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.stop(STOP_S)

    def reset_prefix_caches(self) -> None:
        """Empties all prefix caches and the tiers behind them; waits for requests that are still being aborted."""
        for engine in self.engines:
            deadline = time.monotonic() + ANSWER_TIMEOUT_S
            url = f"{self.urls[engine.name]}/reset_prefix_cache?reset_external=true"
            while not httpx.post(url, timeout=ANSWER_TIMEOUT_S, trust_env=False).json()["success"]:
                if time.monotonic() > deadline:
                    raise EnvironmentFault(f"{self.name}/{engine.name} did not empty its prefix cache")
                time.sleep(0.1)

    def samples(self) -> Samples:
        """What each engine counts: its /metrics of preemptions, caches and tiers, and what it reports to the broker."""
        reported: Samples = {}
        if self.broker is not None:
            time.sleep(REPORT_S)
            for status in client.status(self.broker).engines:
                reported[status.engine] = {REPORTED + name: value for name, value in status.stats.items()}
        return {engine.name: self.scrape(engine.name) | reported.get(engine.name, {}) for engine in self.engines}

    def scrape(self, engine: str) -> dict[str, float]:
        """The engine's /metrics."""
        return cache_samples(_get(f"{self.urls[engine]}/metrics").text)

    def _stock(self) -> list[ProcessSpec]:
        """The engines, and Polder's gateway before them."""
        ports = {engine.name: free_port() for engine in self.engines}
        self.urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        pairs = (f"{name}={url}" for name, url in self.urls.items())
        return [
            *(
                self._stock_engine(number, engine.name, ports[engine.name])
                for number, engine in enumerate(self.engines)
            ),
            self._python("gateway", "polder.bench.harness.gateway", str(self._port), *pairs),
        ]

    def _stock_engine(self, number: int, name: str, port: int) -> ProcessSpec:
        return replace(self._spec.stock(number, port, self._logs), is_ready=partial(serves, self.urls[name], name))

    def _polder(self) -> list[ProcessSpec]:
        fleet_file = self._logs / "fleet.toml"
        fleet_file.write_text(self._spec.fleet_file(self._port))
        options = ("--socket", str(self.broker), "--log-dir", str(self._logs))
        return [self._python("polder serve", "polder.cli.main", "serve", str(fleet_file), *options)]

    def _python(self, name: str, module: str, *words: str) -> ProcessSpec:
        """A process that answers on the arm's port, to all who ask."""
        return ProcessSpec(
            name=name,
            argv=(sys.executable, "-m", module, *words),
            env={VARIABLE: ""},
            log_path=self._logs / f"{name.split()[-1]}.log",
            health_url=f"{self.url}/health",
        )

    def _children(self) -> dict[str, dict[str, Any]]:
        """What the gateway says of the processes that `polder serve` supervises: the engines and the broker."""
        return {child["name"]: child for child in _get(f"{self.url}/health").json()["children"]}


def _get(url: str) -> httpx.Response:
    return httpx.get(url, timeout=ANSWER_TIMEOUT_S, trust_env=False)


def serves(url: str, model: str) -> bool:
    """Whether that model answers there. Another program may have taken the port before the engine came to it."""
    try:
        return any(served["id"] == model for served in _get(f"{url}/v1/models").json()["data"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError):
        return False


def _listening_url(pid: int) -> str:
    """Address of a `vllm serve` child: the gateway does not tell, its command line does. Empty for the broker."""
    _, _, port = Path(f"/proc/{pid}/cmdline").read_text().partition("\0--port\0")
    return f"http://127.0.0.1:{port.partition(chr(0))[0]}" if port else ""


@dataclass(frozen=True)
class ArmGroup:
    """Arms that are compared with each other, and may be up together."""

    spec: Callable[[str], Serving]
    """By the arm's name."""
    suffix: str = ""
    """Added to the names of their folders of logs."""
    at_most: int = 1
    """Up at a time."""
    prepare: Callable[[Arm], None] = lambda _: None
    """Called once for every started arm, before its first use."""


class ArmPool:
    """Arms that come up when they are asked for and stay up: more engines than a machine holds can still be compared.
    An arm that is up and not asked takes memory and no CPU. Not thread-safe. Within `with`, whatever happens, no arm is
    left at the end."""

    def __init__(self, logs: Path, say: Callable[[str], None]) -> None:
        self.served: dict[str, Sequence[Engine]] = {}
        """All arms that were up -> their engines."""
        self._logs, self._say = logs, say
        self._group: ArmGroup | None = None
        self._up: dict[str, Arm] = {}
        """Least recently asked for first."""

    def __enter__(self) -> Self:
        self._runtime = TemporaryDirectory(prefix="polder-bench-")
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._runtime.cleanup()

    def get(self, group: ArmGroup, name: str) -> Arm:
        """The arm, up and prepared. Stops arms of another group, and the one that was asked for longest ago where too
        many would be up. Raises EnvironmentFault."""
        if group != self._group:
            self.stop()
            self._group = group
        arm = self._up.pop(name, None)
        if arm is None:
            self.stop(down_to=group.at_most - 1)
            self._say(f"starting {name}{group.suffix}")
            check_engine()
            arm = group.spec(name).make(name + group.suffix, self._logs, Path(self._runtime.name))
            self.served[arm.name] = arm.engines
            self._up[name] = arm  # before it starts: whatever happens, it is ended
            arm.start()
            arm.wait_ready()
            group.prepare(arm)
        self._up[name] = arm
        return arm

    def stop(self, *, down_to: int = 0) -> None:
        """Ends the arms that were asked for longest ago, until so many are left."""
        while len(self._up) > down_to:
            self._up.pop(next(iter(self._up))).stop()
