"""The systems under test: the same models with the same bytes, once in fixed parts, once elastic.

All arms answer on one gateway (the same code) and start engines by `vllm serve` with the same arguments and
environment. They differ in one thing: a stock engine has its blocks fixed at the start, an elastic one is given a
broker.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import httpx

from polder.bench.harness.engines import EnginePlan, fleet_toml
from polder.bench.harness.scrape import cache_samples
from polder.errors import EnvironmentFault
from polder.serve.process import ManagedProcess, ProcessSpec, free_port
from polder.serve.specs import vllm_serve

__all__ = ["Arm", "ArmPool", "ArmSpec", "PolderArm", "StockArm"]

READY_TIMEOUT_S = 300.0
RESET_TIMEOUT_S = 30.0
STOP_S = 40.0
"""Until an arm's processes are killed: `polder serve` gives its own children 15 s."""


class Arm:
    """Engines behind one endpoint. Start, wait until ready, use, stop."""

    quiet_s: ClassVar[float] = 1.2
    """Pause before another arm is measured: vLLM's processes spin for a second after their last message."""

    def __init__(self, name: str, engines: Sequence[EnginePlan], logs: Path, broker: Path | None = None) -> None:
        """`broker`: socket of the arm's broker, if it has one."""
        self.name, self.engines, self.broker = name, tuple(engines), broker
        self._logs = logs / name
        self._logs.mkdir(parents=True, exist_ok=True)
        for old in self._logs.glob("*.log"):
            old.unlink()
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"
        """The gateway, which routes by model name."""
        self._urls: dict[str, str] = {}
        self._processes: list[ManagedProcess] = []

    def start(self) -> None:
        """Starts all processes; returns at once."""
        for process in self._processes:
            process.start()

    def wait_ready(self) -> None:
        """Returns when every engine answers. Raises EnvironmentFault with the end of a log."""
        for process in self._processes:
            process.wait_ready(READY_TIMEOUT_S)

    def check(self) -> None:
        """Raises EnvironmentFault when an engine has died since the start."""
        for process in self._processes:
            if not process.alive():
                what = f"{self.name}/{process.spec.name}"
                raise EnvironmentFault(f"{what} died with {process.returncode}{process.why()}")

    def stop(self) -> None:
        """Ends everything the arm started."""
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.stop(STOP_S)

    def engine_url(self, engine: str) -> str:
        """The engine's own address, behind the gateway."""
        return self._urls[engine]

    def reset_prefix_caches(self) -> None:
        """Empties all prefix caches and the tiers behind them; waits for requests that are still being aborted."""
        for engine in self.engines:
            deadline = time.monotonic() + RESET_TIMEOUT_S
            url = f"{self.engine_url(engine.name)}/reset_prefix_cache?reset_external=true"
            while not httpx.post(url, timeout=RESET_TIMEOUT_S, trust_env=False).json()["success"]:
                if time.monotonic() > deadline:
                    raise EnvironmentFault(f"{self.name}/{engine.name} did not empty its prefix cache")
                time.sleep(0.1)

    def samples(self) -> dict[str, dict[str, float]]:
        """What each engine's /metrics says of preemptions, caches and tiers."""
        urls = {engine.name: f"{self.engine_url(engine.name)}/metrics" for engine in self.engines}
        return {name: cache_samples(httpx.get(url, timeout=30.0, trust_env=False).text) for name, url in urls.items()}


class StockArm(Arm):
    """Plain `vllm serve`, each with a fixed number of blocks."""

    def __init__(self, name: str, engines: Sequence[EnginePlan], logs: Path) -> None:
        super().__init__(name, engines, logs)
        ports = {engine.name: free_port() for engine in engines}
        self._urls = {name: f"http://127.0.0.1:{port}" for name, port in ports.items()}
        pairs = (f"{name}={url}" for name, url in self._urls.items())
        gateway = ProcessSpec(
            name="gateway",
            argv=(sys.executable, "-m", "polder.bench.harness.gateway", str(self._port), *pairs),
            log_path=self._logs / "gateway.log",
            health_url=f"{self.url}/health",
        )
        specs = [*(self._serve(engine, ports[engine.name]) for engine in engines), gateway]
        self._processes = [ManagedProcess(spec) for spec in specs]

    def _serve(self, engine: EnginePlan, port: int) -> ProcessSpec:
        sizes = ("--max-model-len", str(engine.max_model_len), "--num-gpu-blocks-override", str(engine.blocks))
        return vllm_serve(
            engine.model_path(),
            name=engine.name,
            port=port,
            args=(*sizes, *engine.arguments()),
            # No plugins at all: what runs here is vLLM as it is installed without Polder.
            env=engine.environment() | {"VLLM_PLUGINS": ""},
            cpus=engine.cpus,
            log_path=self._logs / f"{engine.name}.log",
        )


class PolderArm(Arm):
    """`polder serve` with a fleet file: a broker, the same engines, elastic."""

    def __init__(self, name: str, engines: Sequence[EnginePlan], logs: Path, runtime: Path) -> None:
        """`runtime`: short (a socket's path has at most 107 bytes), private, gone after the bench."""
        super().__init__(name, engines, logs, runtime / f"{name}.sock")
        fleet_file = self._logs / "fleet.toml"
        fleet_file.write_text(fleet_toml(engines, self._port))
        command = (sys.executable, "-m", "polder.cli.main", "serve", str(fleet_file))
        serve = ProcessSpec(
            name="polder serve",
            argv=(*command, "--socket", str(self.broker), "--log-dir", str(self._logs)),
            log_path=self._logs / "serve.log",
            health_url=f"{self.url}/health",
        )
        self._processes = [ManagedProcess(serve)]

    def wait_ready(self) -> None:
        super().wait_ready()
        self.check()
        children = self._children()
        self._urls = {engine.name: _listening_url(children[engine.name]["pid"]) for engine in self.engines}

    def check(self) -> None:
        super().check()
        died = [name for name, child in self._children().items() if child["restarts"] or child["state"] != "ready"]
        if died:
            raise EnvironmentFault(f"{', '.join(died)} of {self.name} died{self._processes[0].why()}")

    def _children(self) -> dict[str, dict[str, int | str]]:
        """The engines' processes and the broker's."""
        answer = httpx.get(f"{self.url}/health", timeout=30.0, trust_env=False).json()
        return {child["name"]: child for child in answer["children"]}


def _listening_url(pid: int | str) -> str:
    """Address of a `vllm serve` child: the gateway does not tell, its command line does."""
    arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}"


class ArmSpec(NamedTuple):
    """How an arm serves the engines: plain vLLM, or `polder serve`."""

    system: Literal["stock", "polder"]
    engines: Sequence[EnginePlan]

    def make(self, name: str, logs: Path, runtime: Path) -> Arm:
        """The arm, not started. Logs go to a folder of its name."""
        if self.system == "polder":
            return PolderArm(name, self.engines, logs, runtime)
        return StockArm(name, self.engines, logs)


class ArmPool:
    """Arms that come up when they are needed, at most `at_most` at a time: more engines than a machine holds can still be
    compared. An arm that is up and not asked takes memory and no CPU. Not thread-safe."""

    def __init__(self, make: Callable[[str], Arm], prepare: Callable[[Arm], None], at_most: int) -> None:
        """`make(name)`: an arm, not started. `prepare`: called once for every started arm, before its first use."""
        self._make, self._prepare, self._at_most = make, prepare, at_most
        self._up: dict[str, Arm] = {}
        """Least recently asked for first."""

    @contextmanager
    def open(self) -> Iterator[ArmPool]:
        """Whatever happens meanwhile, no arm is left at the end."""
        try:
            yield self
        finally:
            self._stop_down_to(0)

    def get(self, name: str) -> Arm:
        """The arm, up and prepared. May stop the one that was asked for longest ago. Raises EnvironmentFault."""
        arm = self._up.pop(name, None)
        if arm is None:
            self._stop_down_to(self._at_most - 1)
            arm = self._up[name] = self._make(name)  # before it starts: whatever happens, it is ended
            arm.start()
            arm.wait_ready()
            self._prepare(arm)
        self._up[name] = arm
        return arm

    def _stop_down_to(self, count: int) -> None:
        while len(self._up) > count:
            self._up.pop(next(iter(self._up))).stop()
