"""The two systems under test: the same two models with the same bytes, once in fixed halves, once elastic.

Both arms answer on one gateway (the same code), start engines by `vllm serve` with the same arguments and environment,
and stay up for the whole bench. They differ in one thing: a stock engine has its blocks fixed at the start, an elastic
one is given a broker.
"""

from __future__ import annotations

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal, NamedTuple

import httpx

from polder.bench.harness.driver import Endpoint
from polder.bench.harness.engines import EnginePlan, fleet_toml
from polder.bench.harness.scrape import PREEMPTIONS, Sample, cache_samples, counter
from polder.errors import EnvironmentFault
from polder.serve.process import ManagedProcess, ProcessSpec, free_port, vllm_serve

__all__ = ["Arm", "ArmSpec", "PolderArm", "StockArm"]

READY_TIMEOUT_S = 300.0
RESET_TIMEOUT_S = 30.0


class Arm(ABC):
    """Engines behind one endpoint. Start, wait until ready, use, stop."""

    quiet_s: ClassVar[float] = 1.2
    """Pause before another arm is measured: vLLM's processes spin for a second after their last message."""

    def __init__(self, name: str, engines: Sequence[EnginePlan], log_dir: Path) -> None:
        self.name = name
        self.engines = tuple(engines)
        self._log_dir = log_dir / name
        self._log_dir.mkdir(parents=True, exist_ok=True)
        for old in self._log_dir.glob("*.log"):
            old.unlink()
        self._port = free_port()

    @property
    def endpoint(self) -> Endpoint:
        """The gateway, which routes by model name."""
        return Endpoint(base_url=f"http://127.0.0.1:{self._port}")

    @property
    def broker(self) -> Path | None:
        """Socket of the arm's broker, if it has one."""
        return None

    @abstractmethod
    def start(self) -> None:
        """Starts all processes; returns at once."""

    @abstractmethod
    def wait_ready(self) -> None:
        """Returns when every engine answers. Raises EnvironmentFault with the end of a log."""

    @abstractmethod
    def check(self) -> None:
        """Raises EnvironmentFault when an engine has died since the start."""

    @abstractmethod
    def stop(self) -> None:
        """Ends everything the arm started."""

    @abstractmethod
    def engine_url(self, engine: str) -> str:
        """The engine's own address, behind the gateway."""

    def reset_prefix_caches(self) -> None:
        """Empties all prefix caches and the tiers behind them; waits for requests that are still being aborted."""
        for engine in self.engines:
            deadline = time.monotonic() + RESET_TIMEOUT_S
            url = f"{self.engine_url(engine.name)}/reset_prefix_cache?reset_external=true"
            while not httpx.post(url, timeout=RESET_TIMEOUT_S, trust_env=False).json()["success"]:
                if time.monotonic() > deadline:
                    raise EnvironmentFault(f"{self.name}/{engine.name} did not empty its prefix cache")
                time.sleep(0.1)

    def preemptions(self) -> dict[str, float]:
        """Requests preempted since the start, for each engine."""
        return {engine.name: counter(self._metrics_text(engine.name), PREEMPTIONS) for engine in self.engines}

    def samples(self) -> dict[str, dict[str, Sample]]:
        """What each engine's /metrics says of caches and tiers."""
        return {engine.name: cache_samples(self._metrics_text(engine.name)) for engine in self.engines}

    def _metrics_text(self, engine: str) -> str:
        return httpx.get(f"{self.engine_url(engine)}/metrics", timeout=30.0, trust_env=False).text


class StockArm(Arm):
    """Plain `vllm serve`, each with a fixed number of blocks."""

    def __init__(self, engines: Sequence[EnginePlan], log_dir: Path, name: str) -> None:
        super().__init__(name, engines, log_dir)
        self._urls = {engine.name: f"http://127.0.0.1:{free_port()}" for engine in engines}
        self._processes = [ManagedProcess(self._serve(engine)) for engine in engines]
        pairs = (f"{name}={url}" for name, url in self._urls.items())
        gateway = ProcessSpec(
            name="gateway",
            argv=(sys.executable, "-m", "polder.bench.harness.gateway", str(self._port), *pairs),
            log_path=self._log_dir / "gateway.log",
            health_url=f"{self.endpoint.base_url}/health",
        )
        self._processes.append(ManagedProcess(gateway))

    def _serve(self, engine: EnginePlan) -> ProcessSpec:
        return vllm_serve(
            engine.model_path,
            name=engine.name,
            port=int(self._urls[engine.name].rpartition(":")[2]),
            args=(
                *("--max-model-len", str(engine.max_model_len)),
                *("--num-gpu-blocks-override", str(engine.blocks)),
                *engine.arguments(),
            ),
            # No plugins at all: what runs here is vLLM as it is installed without Polder.
            env=engine.environment() | {"VLLM_PLUGINS": ""},
            cpus=engine.cpus,
            log_path=self._log_dir / f"{engine.name}.log",
        )

    def start(self) -> None:
        for process in self._processes:
            process.start()

    def wait_ready(self) -> None:
        for process in self._processes:
            process.wait_ready(READY_TIMEOUT_S)

    def check(self) -> None:
        for process in self._processes:
            if not process.alive():
                what = f"{self.name}/{process.spec.name}"
                raise EnvironmentFault(f"{what} died with {process.returncode}{process.log_tail()}")

    def stop(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.stop()

    def engine_url(self, engine: str) -> str:
        return self._urls[engine]


class PolderArm(Arm):
    """`polder serve` with a fleet file: a broker, the same engines, elastic."""

    def __init__(self, engines: Sequence[EnginePlan], log_dir: Path, runtime_dir: Path, name: str) -> None:
        """`runtime_dir`: short (a socket's path has at most 107 bytes), private, gone after the bench."""
        super().__init__(name, engines, log_dir)
        self._socket = runtime_dir / f"{name}.sock"
        self.fleet_file = self._log_dir / "fleet.toml"
        self.fleet_file.write_text(fleet_toml(engines, self._port))
        self._urls: Mapping[str, str] = {}
        command = (sys.executable, "-m", "polder.cli.main", "serve", str(self.fleet_file))
        serve = ProcessSpec(
            name="polder serve",
            argv=(*command, "--socket", str(self._socket), "--log-dir", str(self._log_dir)),
            log_path=self._log_dir / "serve.log",
            health_url=f"{self.endpoint.base_url}/health",
        )
        self._process = ManagedProcess(serve)

    @property
    def broker(self) -> Path | None:
        return self._socket

    def start(self) -> None:
        self._process.start()

    def wait_ready(self) -> None:
        self._process.wait_ready(READY_TIMEOUT_S)
        self.check()
        children = self._children()
        self._urls = {engine.name: _listening_url(children[engine.name]["pid"]) for engine in self.engines}

    def check(self) -> None:
        if not self._process.alive():
            raise EnvironmentFault(f"polder serve died with {self._process.returncode}{self._process.log_tail()}")
        restarted = [name for name, child in self._children().items() if child["restarts"] or child["state"] != "ready"]
        if restarted:
            raise EnvironmentFault(f"{', '.join(restarted)} of {self.name} died{self._process.log_tail()}")

    def stop(self) -> None:
        self._process.stop(grace_s=40.0)  # it gives its own children 15 s

    def engine_url(self, engine: str) -> str:
        return self._urls[engine]

    def _children(self) -> dict[str, dict[str, int | str]]:
        answer = httpx.get(f"{self.endpoint.base_url}/health", timeout=30.0, trust_env=False).json()
        return {child["name"]: child for child in answer["children"]}


def _listening_url(pid: int | str) -> str:
    """Address of a `vllm serve` child: the gateway does not tell, its command line does."""
    arguments = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return f"http://127.0.0.1:{arguments[arguments.index('--port') + 1]}"


class ArmSpec(NamedTuple):
    """How an arm serves the engines: plain vLLM, or `polder serve`."""

    system: Literal["stock", "polder"]
    engines: Sequence[EnginePlan]

    def make(self, name: str, log_dir: Path, runtime_dir: Path) -> Arm:
        if self.system == "polder":
            return PolderArm(self.engines, log_dir, runtime_dir, name)
        return StockArm(self.engines, log_dir, name)
