"""What a soak does to a fleet, and what it checks: bursts, clients that leave, sleeps, wakes, a broker that is
stopped."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx

from polder.bench.workloads.models import MODEL_A, MODEL_B
from polder.broker import client
from polder.broker.wire import Sleep, Status, Wake
from polder.errors import PolderError

__all__ = ["ANSWER_S", "ANSWER_TOKENS", "MODELS", "FleetReport", "Traffic", "complete", "prompts_of", "tokens_of"]

MODELS = {name: replace(model.in_float32(), spread=0.04) for name, model in (("a", MODEL_A), ("b", MODEL_B))}
"""In float32 neither the batch nor the chunks change a token. With this spread of the weights answers vary; with the usual one most
consist of one or two tokens, and wrong KV would often go unnoticed."""
PROMPTS, ANSWER_TOKENS = 24, 24
ANSWER_S, REST_S = 240.0, 60.0
"""Time limits: of one answer, and until nothing is busy after the last one."""


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


class Traffic:
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
                    client.request, self._socket, Sleep(engine=name) if sleeps else Wake(engine=name), timeout_s=1.0
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
        counts |= {name: int(engine.stats.get(name, 0)) for name in ("running_requests", "waiting_requests")}
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
