"""vLLM engines for the stages: stock or with Polder, a broker in a process of its own, and answers that can be compared.

Two models. "small" has random float32 weights, so that no batch shape changes a token and answers must be equal. "large" has the
shape of an 8B Llama in bfloat16 with vLLM's dummy weights: it is for times, and how many of its answers differ is only noted.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stage import ROOT, Skipped, Stage

from polder.bench.workloads.models import MODEL_A, ensure_model  # isort: skip
from polder.broker.client import request, status  # isort: skip
from polder.broker.wire import EngineStatus, Resize  # isort: skip
from polder.errors import BrokerUnavailable  # isort: skip

SMALL = MODEL_A.in_float32()
LARGE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "max_position_embeddings": 131_072,
    "rope_theta": 500_000.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
ENVIRONMENT = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
}
CONNECTOR = {"kv_connector": "PolderConnector", "kv_role": "kv_both"}
_numbers = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What a machine's memory allows."""

    page_bytes: int
    block_tokens: int
    small_units: int
    """KV memory for the small model, in units: hardly enough for what the stages ask at once."""
    tier_units: int
    """For two of the tier stage's prompts."""
    large_bytes: int

    @property
    def small_unit_bytes(self) -> int:
        """Of the small model: a page in each layer."""
        return SMALL.layers * self.page_bytes


def sizes_of(stage: Stage) -> Sizes:
    """Raises Skipped where vLLM is missing, or the driver is only the fake one."""
    if stage.device == "fake":
        raise Skipped("an engine needs a GPU, or --device cpu")
    if importlib.util.find_spec("vllm") is None:
        raise Skipped("no vLLM is installed")
    if stage.device == "cuda":
        return Sizes(page_bytes=2 << 20, block_tokens=16, small_units=6, tier_units=2, large_bytes=24 << 30)
    return Sizes(page_bytes=256 << 10, block_tokens=32, small_units=24, tier_units=18, large_bytes=0)


@dataclass(frozen=True, kw_only=True)
class Answer:
    tokens: list[int]
    logprob: float
    """Sum over all tokens: differs where the KV differs, although the tokens may be the same."""
    cached_tokens: int


class Engine:
    """One offline engine; its core runs in a process of its own."""

    def __init__(self, stage: Stage, model: str, settings: dict[str, str], **options: Any) -> None:
        """`settings`: Polder's, as environment variables; none for stock vLLM. Raises what vLLM raises at the start."""
        sizes = sizes_of(stage)
        arguments: dict[str, Any] = {
            "model": str(_folder(stage, model)),
            "skip_tokenizer_init": True,
            "disable_log_stats": False,
            "block_size": sizes.block_tokens,
            "dtype": "float32" if model == "small" else "bfloat16",
            "max_model_len": 1024 if model == "small" else 40_000,
        }
        if stage.device == "cuda":
            arguments["gpu_memory_utilization"] = 0.15 if model == "small" else 0.4
        else:
            arguments["enforce_eager"] = True
        if model == "large":
            arguments["load_format"] = "dummy"
        if settings.get("POLDER_TIERS"):
            arguments["kv_transfer_config"] = CONNECTOR
        before = dict(os.environ)
        os.environ.update(ENVIRONMENT | (settings or {"VLLM_PLUGINS": ""}))
        begin = time.perf_counter()
        try:
            from vllm import LLM

            if settings:
                from polder.engines.vllm import plugin

                plugin.register()  # vLLM loads plugins once in a process, and a stock engine may have come first
            self._llm = LLM(**arguments | options)
        finally:
            os.environ.clear()
            os.environ.update(before)
        kind = f"{model}, {'Polder' if settings else 'stock'}"
        stage.note(f"start of an engine ({kind}, {next(_numbers)})", time.perf_counter() - begin, "s")

    def ask(
        self, prompts: list[list[int]], tokens: int, events: dict[int, Callable[[], None]] | None = None
    ) -> list[Answer]:
        """All prompts at once, `tokens` each; `events[n]` runs after the n-th step's output has come."""
        from vllm import SamplingParams

        engine, left = self._llm.llm_engine, dict(events or {})
        names = [f"r{next(_numbers)}" for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            parameters = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False, logprobs=0)
            engine.add_request(name, {"prompt_token_ids": prompt}, parameters)
        done: dict[str, Answer] = {}
        steps = 0
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    found = output.outputs[0]
                    done[output.request_id] = Answer(
                        tokens=list(found.token_ids),
                        logprob=float(found.cumulative_logprob or 0.0),
                        cached_tokens=int(output.num_cached_tokens or 0),
                    )
            steps += 1
            if steps in left:
                left.pop(steps)()
        return [next(a for key, a in done.items() if key == name or key.startswith(f"{name}-")) for name in names]

    def first_token_s(self, prompt: list[int]) -> float:
        """Seconds from the request to its first token, alone on the engine."""
        begin = time.perf_counter()
        self.ask([prompt], 1)
        return time.perf_counter() - begin

    def figures(self) -> dict[str, float]:
        """Checks Polder's laws in the engine, and returns its counters."""
        found: dict[str, float] = self.utility("polder_check")
        return found

    def utility(self, name: str, *arguments: Any) -> Any:
        return self._llm.llm_engine.engine_core.call_utility(name, *arguments)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()


class Broker:
    """A broker over this machine's device, in a process of its own."""

    def __init__(self, stage: Stage, folder: Path, device_bytes: int, host_bytes: int = 0) -> None:
        self.socket = folder / "broker"
        self._device = "cuda:0" if stage.device == "cuda" else "cpu:0"
        devices = {self._device: device_bytes} | ({"host:0": host_bytes} if host_bytes else {})
        code = (
            "from pathlib import Path; from polder.broker.config import BrokerConfig; from polder.broker.server import serve;"
            f"serve(BrokerConfig(socket=Path({str(self.socket)!r}), devices={devices!r}, page_bytes={sizes_of(stage).page_bytes}))"
        )
        paths = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
        wait_until(self._answers, "the broker to answer")

    def _answers(self) -> bool:
        try:
            status(self.socket)
        except BrokerUnavailable:
            return False
        return True

    def settings(self, name: str, **more: str) -> dict[str, str]:
        return {"POLDER_BROKER": str(self.socket), "POLDER_ENGINE": name, **more}

    def engine(self, name: str) -> EngineStatus:
        return next(engine for engine in status(self.socket).engines if engine.engine == name)

    def pages_of(self, owner: str) -> int:
        return next(d for d in status(self.socket).devices if d.device == self._device).pages_by_owner.get(owner, 0)

    def resize(self, name: str, units: int) -> None:
        """Without waiting; 0: back to the policy."""
        request(self.socket, Resize(engine=name, units=units))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)


@contextlib.contextmanager
def broker_for(stage: Stage, device_bytes: int, host_bytes: int = 0) -> Iterator[Broker]:
    with tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        broker = Broker(stage, Path(folder), device_bytes, host_bytes)
        try:
            yield broker
        finally:
            broker.close()


@contextlib.contextmanager
def running(stage: Stage, model: str, settings: dict[str, str], **options: Any) -> Iterator[Engine]:
    engine = Engine(stage, model, settings, **options)
    try:
        yield engine
    finally:
        engine.close()


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(10, 32_000) for _ in range(length + 13 * i)] for i in range(count)]


def stock_answers(stage: Stage, model: str, asked: list[list[int]], tokens: int) -> list[Answer]:
    with running(stage, model, {}, num_gpu_blocks_override=4096 if stage.device == "cuda" else 400) as engine:
        engine.ask(asked[:1], 2)  # what is compiled or captured late
        begin = time.perf_counter()
        found = engine.ask(asked, tokens)
        stage.note(f"{model}, stock: all answers", time.perf_counter() - begin, "s")
        return found


def compare(stage: Stage, what: str, model: str, found: list[Answer], expected: list[Answer]) -> None:
    """Small: tokens must be equal. Large: how many differ, and by how much the log probabilities do."""
    different = sum(f.tokens != e.tokens for f, e in zip(found, expected, strict=True))
    drift = max(abs(f.logprob - e.logprob) / len(f.tokens) for f, e in zip(found, expected, strict=True))
    kinds = len({token for answer in expected for token in answer.tokens})
    if model == "small":
        stage.check(f"{what}: tokens equal stock's", holds=not different, detail=f"{different} of {len(found)} differ")
    else:
        stage.note(f"{what}, {model}: answers that differ", f"{different} of {len(found)}")
    stage.note(f"{what}, {model}: largest difference of a log probability, a token", drift)
    stage.note(f"{what}, {model}: different tokens in stock's answers", kinds)


def wait_until(holds: Callable[[], bool], what: str, timeout_s: float = 60.0) -> float:
    """Seconds waited. Raises TimeoutError."""
    begin = time.perf_counter()
    while not holds():
        if time.perf_counter() - begin > timeout_s:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        time.sleep(0.005)
    return time.perf_counter() - begin


def _folder(stage: Stage, model: str) -> Path:
    if model == "small":
        return ensure_model(SMALL, stage.models)
    folder = stage.models / "large-shape"
    folder.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", **LARGE}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
