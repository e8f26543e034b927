"""A fleet of two models for minutes: bursts of requests, clients that leave, sleeps, wakes, a broker that is stopped now and then.

    python -m polder.bench.fleet_soak --minutes 10 [--seed 1] [--logs DIR]

Two models with elastic weights and tiers, served by `polder serve`. Every answer that is waited for must be a 200 with the tokens
of stock vLLM, which is asked the same prompts before. No engine may end, `/health` may never be "down", and when the requests stop
nothing may stay busy. Prints one JSON object; ends with 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import httpx

from polder.bench.models import MODEL_A, MODEL_B, ensure_model
from polder.broker import client
from polder.broker.wire import Rouse, Sleep, Status
from polder.errors import PolderError
from polder.serve.process import ManagedProcess, ProcessSpec, free_port, vllm_serve

__all__ = ["FleetReport", "main"]

MODELS = {"a": MODEL_A.in_float32(), "b": MODEL_B.in_float32()}
"""In float32 neither the batch nor the chunks change a token."""
ARGS = ("--enforce-eager", "--block-size", "32", "--max-model-len", "1024", "--max-num-batched-tokens", "256")
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
PROMPTS, ANSWER_TOKENS = 24, 24
START_S, ANSWER_S, REST_S = 900.0, 240.0, 60.0
"""Time limits: of a server's start, of one answer, and until nothing is busy after the last one."""
FLEET = """
[server]
port = {port}
[memory]
device = "cpu:0"
budget = "208MiB"
page = "256KiB"
host = "96MiB"
"""
MODEL = """
[[model]]
name = "{name}"
path = "{path}"
max_model_len = 1024
weights = "elastic"
tiers = ["peer", "host"]
lend = "24MiB"
args = [{args}]
env = {{ {env} }}
"""


@dataclass(kw_only=True)
class FleetReport:
    minutes: float
    seed: int
    answers: int = 0
    """Whole ones, each compared with stock's."""
    wrong_answers: int = 0
    left: int = 0
    """Requests whose client went away."""
    busy_503: int = 0
    """503 with Retry-After."""
    slowest_s: float = 0.0
    sleeps: int = 0
    wakes: int = 0
    freezes: int = 0
    frozen_s: float = 0.0
    degraded: int = 0
    """Health checks that said so."""
    figures: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of each engine at the end."""
    problems: list[str] = field(default_factory=list)

    def note(self, problem: str) -> None:
        print(f"soak: {problem}", file=sys.stderr, flush=True)
        if len(self.problems) < 50:
            self.problems.append(problem)


def prompts_of(name: str) -> list[list[int]]:
    """Prompts of 40 to 900 tokens, of which several begin alike."""
    draw = random.Random(f"prompts {name}")
    bases = [[draw.randrange(10, 32_000) for _ in range(900)] for _ in range(PROMPTS // 3)]
    return [base[: draw.randrange(40, 900)] for base in bases for _ in range(3)]


async def complete(http: httpx.AsyncClient, url: str, model: str, prompt: Sequence[int]) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    return await http.post(f"{url}/v1/completions", json=body | {"return_token_ids": True})


def tokens_of(answer: httpx.Response) -> list[int]:
    found: list[int] = answer.json()["choices"][0]["token_ids"]
    return found


async def stock_answers(name: str, path: Path, logs: Path) -> list[list[int]]:
    """What stock vLLM answers to each prompt; kept beside the model for the next run."""
    asked = repr([prompts_of(name), ANSWER_TOKENS, ARGS, version("vllm")])
    kept = path.parent / f"{path.name}-answers-{sha256(asked.encode()).hexdigest()[:12]}.json"
    if not kept.exists():
        answers = await _ask_stock(name, path, logs)
        draft = kept.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps(answers))
        draft.replace(kept)
    found: list[list[int]] = json.loads(kept.read_text())
    return found


async def _ask_stock(name: str, path: Path, logs: Path) -> list[list[int]]:
    port = free_port()
    env = ENVIRONMENT | {"VLLM_PLUGINS": "", "VLLM_CPU_KVCACHE_SPACE": "1"}
    args = (*ARGS, "--dtype", "float32")
    server = ManagedProcess(
        vllm_serve(path, name=name, port=port, args=args, env=env, log_path=logs / f"stock-{name}.log")
    )
    server.start()
    try:
        await asyncio.to_thread(server.wait_ready, START_S)
        async with httpx.AsyncClient(timeout=ANSWER_S, trust_env=False) as http:
            answers = [await complete(http, f"http://127.0.0.1:{port}", name, prompt) for prompt in prompts_of(name)]
            return [tokens_of(answer.raise_for_status()) for answer in answers]
    finally:
        server.stop()


class Soak:
    """One run against a fleet that is up."""

    def __init__(self, report: FleetReport, url: str, socket: Path, expected: dict[str, list[list[int]]]) -> None:
        self._report, self._url, self._socket, self._expected = report, url, socket, expected
        self._prompts = {name: prompts_of(name) for name in MODELS}
        self._draw = random.Random(report.seed)
        self._http = httpx.AsyncClient(timeout=ANSWER_S, trust_env=False, limits=httpx.Limits(max_connections=None))
        self._asked: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        try:
            async with asyncio.TaskGroup() as group:
                for part in (self._bursts, self._operate, self._freeze, self._watch):
                    group.create_task(part(end))
            await asyncio.gather(*self._asked)
            await self._come_to_rest()
        finally:
            await self._http.aclose()

    async def _bursts(self, end: float) -> None:
        while time.monotonic() < end:
            name = self._draw.choice(sorted(MODELS))
            for _ in range(self._draw.choice([1, 2, 4, 8])):
                if len(self._asked) < 24:
                    leaves_s = self._draw.uniform(0.0, 2.0) if self._draw.random() < 0.25 else None
                    task = asyncio.create_task(self._ask(name, self._draw.randrange(PROMPTS), leaves_s))
                    self._asked.add(task)
                    task.add_done_callback(self._asked.discard)
            await asyncio.sleep(self._draw.choice([0.2, 1.0, 3.0, 8.0]))

    async def _ask(self, name: str, number: int, leaves_s: float | None) -> None:
        started = time.monotonic()
        try:
            async with asyncio.timeout(leaves_s):
                answer = await complete(self._http, self._url, name, self._prompts[name][number])
        except TimeoutError:
            self._report.left += 1
            return
        except httpx.HTTPError as error:
            self._report.note(f"{name}: {type(error).__name__} after {time.monotonic() - started:.0f} s: {error}")
            return
        self._report.slowest_s = max(self._report.slowest_s, time.monotonic() - started)
        if answer.status_code == 503 and "retry-after" in answer.headers:
            self._report.busy_503 += 1
        elif answer.status_code != 200:
            self._report.note(f"{name}: status {answer.status_code}: {answer.text[:200]}")
        else:
            self._report.answers += 1
            if tokens_of(answer) != self._expected[name][number]:
                self._report.wrong_answers += 1
                self._report.note(f"{name}: prompt {number}: other tokens than stock's")

    async def _operate(self, end: float) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(self._draw.uniform(4.0, 12.0))
            name, sleeps = self._draw.choice(sorted(MODELS)), self._draw.random() < 0.6
            try:
                await asyncio.to_thread(
                    client.request, self._socket, Sleep(engine=name) if sleeps else Rouse(engine=name), timeout_s=1.0
                )
            except PolderError:
                continue  # the broker is stopped just now, or there is nothing to do
            self._report.sleeps += sleeps
            self._report.wakes += not sleeps

    async def _freeze(self, end: float) -> None:
        pid = broker_pid(self._socket)
        while time.monotonic() < end:
            await asyncio.sleep(self._draw.uniform(10.0, 25.0))
            seconds = self._draw.choice([0.3, 2.0, 8.0])
            os.kill(pid, signal.SIGSTOP)
            try:
                await asyncio.sleep(seconds)
            finally:
                os.kill(pid, signal.SIGCONT)
            self._report.freezes += 1
            self._report.frozen_s += seconds

    async def _watch(self, end: float) -> None:
        """Every two seconds, with a client of its own: it must get an answer whatever waits."""
        async with httpx.AsyncClient(timeout=20.0, trust_env=False) as http:
            while time.monotonic() < end:
                await asyncio.sleep(2.0)
                health = (await http.get(f"{self._url}/health")).json()
                self._report.degraded += health["status"] == "degraded"
                if health["status"] == "down":
                    self._report.note(f"health: down: {health['children']}")
                for child in health["children"]:
                    if child["restarts"]:
                        raise PolderError(f"{child['name']} ended: {child['last_exit']}")

    async def _come_to_rest(self) -> None:
        deadline = time.monotonic() + REST_S
        while busy := busy_parts(status := await asyncio.to_thread(client.status, self._socket)):
            if time.monotonic() > deadline:
                self._report.note(f"busy at rest: {', '.join(busy)}")
                break
            await asyncio.sleep(0.5)
        self._report.figures = {engine.engine: dict(engine.stats) for engine in status.engines}


def busy_parts(status: Status) -> list[str]:
    """What is not at rest."""
    found = []
    for engine in status.engines:
        counts = {"busy_units": engine.busy_units, "waiting_units": engine.waiting_units}
        counts |= {name: int(engine.stats.get(name, 0)) for name in ("running", "waiting")}
        # The null block is always in use.
        found += [f"{engine.engine} {name} {count}" for name, count in counts.items() if count > (name == "busy_units")]
        found += [f"{engine.engine} is {engine.state}"] if engine.state != "serving" else []
    return found


def broker_pid(socket: Path) -> int:
    """The process of `polder broker` on this socket."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if (
                b"polder.cli.main" in words
                and b"broker" in words
                and str(socket).encode() in words
                and b"-S" not in words
            ):
                return int(entry.name)
    raise PolderError(f"no broker runs on {socket}")


def fleet_text(port: int, paths: dict[str, Path]) -> str:
    text = FLEET.format(port=port)
    for core, (name, path) in enumerate(paths.items()):
        args = ", ".join(f'"{word}"' for word in (*ARGS[:3], *ARGS[5:], "--dtype", "float32"))
        pinned = ENVIRONMENT | {"VLLM_CPU_OMP_THREADS_BIND": str(core % (os.cpu_count() or 1))}
        env = ", ".join(f'{key} = "{value}"' for key, value in pinned.items())
        text += MODEL.format(name=name, path=path.resolve(), args=args, env=env)
    return text


async def soak(report: FleetReport, models: Path, logs: Path, folder: Path) -> None:
    paths = {name: ensure_model(recipe, models) for name, recipe in MODELS.items()}
    expected = {name: await stock_answers(name, path, logs) for name, path in paths.items()}
    port, socket = free_port(), folder / "s"
    file = folder / "fleet.toml"
    file.write_text(fleet_text(port, paths))
    command = (
        sys.executable,
        "-m",
        "polder.cli.main",
        "serve",
        str(file),
        "--socket",
        str(socket),
        "--log-dir",
        str(logs),
    )
    url = f"http://127.0.0.1:{port}"
    fleet = ManagedProcess(
        ProcessSpec(name="fleet", argv=command, log_path=logs / "fleet.log", health_url=f"{url}/health")
    )
    fleet.start()
    try:
        await asyncio.to_thread(fleet.wait_ready, START_S)
        await Soak(report, url, socket, expected).run(60 * report.minutes)
    except* PolderError as group:
        for error in group.exceptions:
            report.note(str(error))
    finally:
        fleet.stop(grace_s=60.0)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m polder.bench.fleet_soak", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=Path, default=Path("out/test-models"), help="where models are made, once")
    parser.add_argument("--logs", type=Path, help="keep all logs there")
    given = parser.parse_args(words)
    report = FleetReport(minutes=given.minutes, seed=given.seed)
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:
        logs = given.logs or Path(folder)
        logs.mkdir(parents=True, exist_ok=True)
        asyncio.run(soak(report, given.models, logs, Path(folder)))
    print(json.dumps(asdict(report), indent=2))
    return 1 if report.problems or report.wrong_answers or not report.answers else 0


if __name__ == "__main__":
    sys.exit(main())
