"""Real vLLM engines for tests: small float32 models, a broker in a process of its own, everything ended at the end."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil

from polder.bench.workloads.models import MODEL_A, MODEL_B, ModelRecipe, ensure_model
from polder.broker import wire
from polder.broker.client import request, status
from polder.engines.vllm import plugin
from polder.errors import BrokerUnavailable

RIG = Path(__file__).parents[1] / "rig"
"""Holds vLLM's GPU defaults for a CPU, a platform that vLLM finds by its folder on the path: see its README.md."""
sys.path.insert(0, str(RIG))
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(RIG), os.environ.get("PYTHONPATH"))))

import gpulike  # noqa: E402
from gpulike.forking import forked_engines  # noqa: E402

from tests.engines.segments import segments_of  # noqa: E402

MODELS = Path(os.environ.get("POLDER_TEST_MODELS", Path(__file__).parents[2] / "out" / "test-models"))
ROUNDS = int(os.environ.get("POLDER_ROUNDS", "1"))
"""How often some tests do on their engine what they do, with new prompts each time. More than once is for runs by hand."""
_numbers = itertools.count()
LIMIT_S = 120.0
"""For what takes a second on a machine with nothing else to do."""

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
}
CONNECTOR = {"kv_connector": "PolderConnector", "kv_role": "kv_both"}
BLOCK_TOKENS = 32
ORDINARY = os.environ.get("POLDER_RIG", "async,uni")
"""GPU defaults (tests/rig) for tests whose engine need not be vLLM on a CPU as it comes: they cost nothing."""
PAGE = 256 << 10
"""Small, so that a tiny model has many units: a unit of model A in float32 is 4 blocks = 128 tokens = 8 pages."""
VOCABULARY = 4000
A32, B32 = (
    replace(model.in_float32(), hidden=256, intermediate=704, vocab=VOCABULARY, spread=0.08)
    for model in (MODEL_A, MODEL_B)
)
"""Like the benches' models, with the same KV cache. Fewer weights, since reading them is most of a step on a CPU. They are larger,
so that answers vary and equality says something (answers.py)."""
SMALL_VOCABULARY = 2000
SMALL_A = ModelRecipe(
    name="varied-llama",
    family="llama",
    layers=4,
    hidden=128,
    intermediate=256,
    heads=4,
    vocab=SMALL_VOCABULARY,
    spread=0.12,
    seed=9,
).in_float32()
SMALL_B = replace(SMALL_A, name="varied-qwen", family="qwen3", seed=10)
"""For the V2 runner, whose kernels are interpreted here, and wherever size is of no consequence. A block of 32 tokens has
64 KiB in each of 4 layers: a unit, 128 tokens, is 4 pages. The weights are 16 pages."""
TINY = replace(SMALL_A, name="tiny-rig-f32", layers=2, seed=3)
"""An interpreted step takes about 55 ms, whatever the model."""


@contextlib.contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Engines are configured by the environment of the process that starts them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@dataclass
class Broker:
    """A broker in its own process, so that a test can kill it."""

    socket: Path
    pages: int
    host_pages: int = 0
    page_bytes: int = PAGE
    process: subprocess.Popen[bytes] | None = None
    variables: dict[str, str] = field(default_factory=dict)
    """Set in its process; with FAKECUDA_LIBRARY its device is that of the fake driver."""

    def start(self) -> Broker:
        code = (
            "from pathlib import Path; from gpulike.driver import serve_broker;"
            f"serve_broker(socket=Path({str(self.socket)!r}), devices={self._devices()!r}, page_bytes={self.page_bytes})"
        )
        self.process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | self.variables)
        wait_for(lambda: self.answers(), "the broker to answer")
        return self

    def _devices(self) -> dict[str, int]:
        devices = {"cpu:0": self.pages * self.page_bytes}
        return devices | ({"host:0": self.host_pages * self.page_bytes} if self.host_pages else {})

    def answers(self) -> bool:
        try:
            self.status()
        except BrokerUnavailable:
            return False
        return True

    def status(self) -> wire.Status:
        return status(self.socket)

    def engine(self, name: str) -> wire.EngineStatus:
        return next(e for e in self.status().engines if e.engine == name)

    def pin(self, name: str, units: int) -> None:
        """Pins an engine's size (0: hands it back to the policy) without waiting for it."""
        request(self.socket, wire.Resize(engine=name, units=units))

    def resize(self, name: str, units: int) -> None:
        self.pin(name, units)
        wait_for(lambda: self.engine(name).held_units == units, f"{name} to hold {units} units")

    def kill(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        self.socket.unlink(missing_ok=True)


@dataclass
class Output:
    tokens: list[int]
    cached: int


@dataclass
class Engine:
    """An offline engine driven step by step from the test."""

    name: str
    llm: Any = field(repr=False)  # its repr asks the workers, and a failed test would wait for those of a dead engine
    _started: set[int] = field(default_factory=set)
    _segments: set[Path] = field(default_factory=set)
    _sockets: Path | None = None

    @classmethod
    def start(
        cls,
        name: str,
        recipe: ModelRecipe | Path = A32,
        settings: dict[str, str] | None = None,
        like: str = "",
        **options: Any,
    ) -> Engine:
        """Starts an engine and waits until it serves.

        `recipe` says how its model is made, or where it lies.
        `settings` are Polder's variables; without any the engine is stock vLLM. `like` names GPU defaults that it gets, such as
        "v2,async,uni,warmup,graphs" (tests/rig). Its processes are forked from one that has imported vLLM.
        `options` go to `vllm.LLM`.
        """
        from vllm import LLM
        from vllm.platforms import current_platform

        assert type(current_platform).__module__ == "gpulike.platform", "vLLM was imported before this module"
        model = recipe if isinstance(recipe, Path) else ensure_model(recipe, MODELS)
        rig = gpulike.environment(like)
        forked = forked_engines(rig)  # starts the process to fork from, which outlives this engine
        before = {p.pid for p in psutil.Process().children(recursive=True)}
        sockets = Path(tempfile.mkdtemp(prefix="pe-", dir="/tmp"))  # vLLM's: a killed engine leaves them behind
        arguments: dict[str, Any] = {
            "model": str(model),
            "dtype": "float32",
            "max_model_len": 1024,
            "enforce_eager": "compiled" not in gpulike.words(like),
            "block_size": BLOCK_TOKENS,
            "max_num_batched_tokens": 256,
            "disable_log_stats": False,
            **options,
        }
        if settings and settings.get("POLDER_TIERS"):
            arguments["kv_transfer_config"] = CONNECTOR
        # Without settings the plugin is not even loaded: the reference is vLLM as it comes.
        own = settings or {"VLLM_PLUGINS": "gpulike" if like else ""}
        with environment(ENVIRONMENT | rig | {"VLLM_RPC_BASE_PATH": str(sockets)} | own), forked:
            if settings:
                plugin.register()  # vLLM loads plugins once a process, and here a stock engine may have come first
            llm = LLM(**arguments)
        started = {p.pid for p in psutil.Process().children(recursive=True)} - before
        return cls(name, llm, started, segments_of(started), sockets)

    def utility(self, method: str, *args: Any) -> Any:
        return self.llm.llm_engine.engine_core.call_utility(method, *args)

    def generate(
        self,
        prompts: list[list[int]],
        tokens: int | list[int] = 24,
        events: dict[int, Callable[[], None]] | None = None,
    ) -> list[Output]:
        """All prompts at once, `tokens` each; `events[n]` runs after the n-th step's output has come."""
        from vllm import SamplingParams

        engine, events = self.llm.llm_engine, dict(events or {})
        lengths = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
        names = [f"{self.name}-{next(_numbers)}" for _ in prompts]
        self.utility("pause_scheduler", "keep", False)  # so that the first batch is the same in every run
        for name, prompt, length in zip(names, prompts, lengths, strict=True):
            parameters = SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, detokenize=False)
            engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        self.utility("resume_scheduler")  # the core takes it from the same queue, after all requests
        done: dict[str, Output] = {}
        steps = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id] = Output(list(output.outputs[0].token_ids), output.num_cached_tokens)
            steps += 1
            if steps in events:
                events.pop(steps)()
        assert not events, f"only {steps} steps were made"
        return [next(out for key, out in done.items() if key == n or key.startswith(n + "-")) for n in names]

    def submit(self, prompt: list[int], tokens: int = 24, name: str = "") -> None:
        """Asks, and does not wait for an answer."""
        from vllm import SamplingParams

        parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        name = name or f"{self.name}-{next(_numbers)}"
        self.llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, parameters)

    def abort(self, name: str) -> None:
        """Of a request that was submitted by this name."""
        self.llm.llm_engine.abort_request([name])

    def processes(self) -> list[psutil.Process]:
        self._segments |= segments_of(self._started)  # before a test kills them
        return [psutil.Process(pid) for pid in self._started if psutil.pid_exists(pid)]

    def core_pid(self) -> int:
        return next(
            p.pid for p in self.processes() if "EngineCore" in p.name() or "EngineCore" in " ".join(p.cmdline())
        )

    def stop(self) -> None:
        """Ends its processes, whether they serve or were killed. None of their segments and sockets is left behind."""
        self._segments |= segments_of(self._started)
        self.llm.llm_engine.engine_core.shutdown()
        # Python's own resource tracker lives as long as this process, and came with the engine.
        ending = [p for p in self.processes() if "resource_tracker" not in command_of(p)]
        _, alive = psutil.wait_procs(ending, timeout=60)
        for process in alive:
            process.kill()
        psutil.wait_procs(alive, timeout=60)
        for path in self._segments:  # vLLM's message queues: a killed engine core leaves them behind
            path.unlink(missing_ok=True)
        if self._sockets is not None:
            shutil.rmtree(self._sockets)


def command_of(process: psutil.Process) -> str:
    """Empty when it has ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def prompts(count: int, length: int, seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(10, vocabulary) for _ in range(length + 13 * i)] for i in range(count)]


def tokens_of(outputs: list[Output]) -> list[list[int]]:
    return [output.tokens for output in outputs]


def wait_for(condition: Callable[[], bool], what: str) -> None:
    """Raises AssertionError after LIMIT_S, which is long: only what is broken takes it, or a machine with much else to do."""
    deadline, pause_s = time.monotonic() + LIMIT_S, 0.02
    while not condition():
        assert time.monotonic() < deadline, f"waited {LIMIT_S:g} s for {what}"
        time.sleep(pause_s)
        pause_s = min(0.1, pause_s * 1.2)  # to ask costs an engine CPU time


__all__ = [
    "A32",
    "B32",
    "CONNECTOR",
    "MODELS",
    "ORDINARY",
    "PAGE",
    "ROUNDS",
    "SMALL_A",
    "SMALL_B",
    "SMALL_VOCABULARY",
    "TINY",
    "VOCABULARY",
    "Broker",
    "Engine",
    "Output",
    "environment",
    "prompts",
    "tokens_of",
    "wait_for",
]
