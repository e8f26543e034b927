"""A fleet of two models for minutes: bursts of requests, clients that leave, sleeps, wakes, a broker that is stopped
now and then.

python -m tests.serve.soak --minutes 10 [--seed 1] [--logs DIR]     (scripts/soak_fleet)

Two models with elastic weights and tiers, served by `polder serve`. Every answer that is waited for must be a 200 with
the tokens of stock vLLM, which is asked the same prompts before. No engine may end, `/health` may never be "down", and
when the requests stop nothing may stay busy. Prints one JSON object; ends with 1 when anything is not as it must be.
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
from dataclasses import asdict, dataclass, field, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import httpx
import psutil

from polder.bench.harness.arms import ArmSpec
from polder.bench.harness.engines import EnginePlan, a_core_each
from polder.bench.harness.runs import ask
from polder.bench.workloads.models import MODEL_A, MODEL_B
from polder.broker import client
from polder.broker.wire import Sleep, Status, Wake
from polder.errors import PolderError

MODELS = {name: replace(model.in_float32(), spread=0.04) for name, model in (("a", MODEL_A), ("b", MODEL_B))}
"""In float32 neither the batch nor the chunks change a token. With this spread of the weights answers vary; with the usual one most
consist of one or two tokens, and wrong KV would often go unnoticed."""
MIB = 1 << 20
PROMPTS, ANSWER_TOKENS, MAX_MODEL_LEN = 24, 24, 1024
MOST_ASKED = 24
"""At a time."""
ANSWER_S, REST_S = 240.0, 60.0
"""Time limits: of one answer, and until nothing is busy after the last one."""


@dataclass(kw_only=True)
class Report:
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


def engines(models: Path) -> list[EnginePlan]:
    """208 MiB for weights and KV memory of both."""
    keys = {"weights": "elastic", "tiers": ["peer", "host"], "host": 48 * MIB, "lend": 24 * MIB}
    sizes = {"share_bytes": 32 * MIB, "batched_tokens": 256, "max_model_len": MAX_MODEL_LEN}
    of_polder = {"keys": keys, "memory": {"page": MIB // 4}}
    return a_core_each(
        [
            EnginePlan(name=name, recipe=recipe, models=models, **sizes, **of_polder)  # type: ignore[arg-type]
            for name, recipe in MODELS.items()
        ]
    )


def prompts_of(name: str) -> list[list[int]]:
    """Prompts of 40 to 900 tokens, of which several begin alike."""
    draw = random.Random(f"prompts {name}")
    bases = [[draw.randrange(10, 32_000) for _ in range(900)] for _ in range(PROMPTS // 3)]
    return [base[: draw.randrange(40, 900)] for base in bases for _ in range(3)]


def stock_answers(models: Path, logs: Path) -> dict[str, list[list[int]]]:
    """What stock vLLM answers to each model's prompts; kept beside the models for the next run."""
    plans = engines(models)
    asked = repr([(plan.arguments(), plan.recipe, prompts_of(plan.name)) for plan in plans] + [version("vllm")])
    kept = models / f"soak-answers-{sha256(asked.encode()).hexdigest()[:12]}.json"
    if not kept.exists():
        arm = ArmSpec("stock", plans).make("stock", logs, logs)
        try:
            arm.start()
            arm.wait_ready()
            records = {name: [ask(arm, name, prompt, ANSWER_TOKENS) for prompt in prompts_of(name)] for name in MODELS}
        finally:
            arm.stop()
        if failed := next((record.error for of in records.values() for record in of if record.error), ""):
            raise PolderError(f"stock does not answer: {failed}")
        draft = kept.with_suffix(f".{os.getpid()}")
        draft.write_text(json.dumps({name: [record.output_ids for record in of] for name, of in records.items()}))
        draft.replace(kept)
    found: dict[str, list[list[int]]] = json.loads(kept.read_text())
    return found


class Traffic:
    """One run against a fleet that is up."""

    def __init__(self, report: Report, url: str, socket: Path, expected: dict[str, list[list[int]]]) -> None:
        self._report, self._url, self._socket, self._expected = report, url, socket, expected
        self._prompts = {name: prompts_of(name) for name in MODELS}
        self._draw = random.Random(report.seed)
        self._http = httpx.AsyncClient(timeout=ANSWER_S, trust_env=False, limits=httpx.Limits(max_connections=None))
        self._asked: set[asyncio.Task[None]] = set()

    async def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        async with self._http:
            async with asyncio.TaskGroup() as group:
                for part in (self._bursts, self._operate, self._freeze, self._watch):
                    group.create_task(part(end))
            await asyncio.gather(*self._asked)
            await self._come_to_rest()

    async def _bursts(self, end: float) -> None:
        while time.monotonic() < end:
            name = self._draw.choice(sorted(MODELS))
            for _ in range(self._draw.choice([1, 2, 4, 8])):
                if len(self._asked) < MOST_ASKED:
                    leaves_s = self._draw.uniform(0.0, 2.0) if self._draw.random() < 0.25 else None
                    task = asyncio.create_task(self.ask(name, self._draw.randrange(PROMPTS), leaves_s))
                    self._asked.add(task)
                    task.add_done_callback(self._asked.discard)
            await asyncio.sleep(self._draw.choice([0.2, 1.0, 3.0, 8.0]))

    async def ask(self, name: str, number: int, leaves_s: float | None = None) -> None:
        """One prompt. `leaves_s`: the client goes away after so long."""
        started, report, prompt = time.monotonic(), self._report, self._prompts[name][number]
        body = {"model": name, "prompt": prompt, "max_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
        try:
            async with asyncio.timeout(leaves_s):
                answer = await self._http.post(f"{self._url}/v1/completions", json=body | {"return_token_ids": True})
        except TimeoutError:
            report.left += 1
            return
        except httpx.HTTPError as error:
            report.note(f"{name}: {type(error).__name__} after {time.monotonic() - started:.0f} s: {error}")
            return
        report.slowest_s = max(report.slowest_s, time.monotonic() - started)
        if answer.status_code == 503 and "retry-after" in answer.headers:
            report.busy_503 += 1
        elif answer.status_code != 200:
            report.note(f"{name}: status {answer.status_code}: {answer.text[:200]}")
        else:
            report.answers += 1
            if answer.json()["choices"][0]["token_ids"] != self._expected[name][number]:
                report.wrong_answers += 1
                report.note(f"{name}: prompt {number}: other tokens than stock's")

    async def _operate(self, end: float) -> None:
        while time.monotonic() < end:
            await asyncio.sleep(self._draw.uniform(4.0, 12.0))
            name, sleeps = self._draw.choice(sorted(MODELS)), self._draw.random() < 0.6
            order = Sleep(engine=name) if sleeps else Wake(engine=name)
            try:
                await asyncio.to_thread(client.request, self._socket, order, timeout_s=1.0)
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
    """The process of `polder broker` on this socket; its guard, which names the same words, runs python with -S."""
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if {"polder.cli.main", "broker", str(socket)} <= set(words) and "-S" not in words:
            return int(process.pid)
    raise PolderError(f"no broker runs on {socket}")


def soak(report: Report, models: Path, logs: Path, runtime: Path) -> None:
    expected = stock_answers(models, logs)
    for name, answers in expected.items():
        if dull := sum(2 * len(set(answer)) < ANSWER_TOKENS for answer in answers):
            report.note(
                f"{name}: {dull} of {len(answers)} answers of stock repeat themselves: their equality says little"
            )
    fleet = ArmSpec("polder", engines(models)).make("fleet", logs, runtime)
    assert fleet.broker is not None
    try:
        fleet.start()
        fleet.wait_ready()
        asyncio.run(Traffic(report, fleet.url, fleet.broker, expected).run(60 * report.minutes))
    except* PolderError as group:
        for error in group.exceptions:
            report.note(str(error))
    finally:
        fleet.stop()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="soak_fleet", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--models", type=Path, default=Path("out/test-models"), help="where models are made, once")
    parser.add_argument("--logs", type=Path, help="keep all logs there")
    given = parser.parse_args(words)
    report = Report(minutes=given.minutes, seed=given.seed)
    with tempfile.TemporaryDirectory(prefix="soak-", dir="/tmp") as folder:
        soak(report, given.models, given.logs or Path(folder), Path(folder))
    print(json.dumps(asdict(report), indent=2))
    return 1 if report.problems or report.wrong_answers or not report.answers else 0


if __name__ == "__main__":
    sys.exit(main())
