"""A fleet of two models for minutes: bursts of requests, clients that leave, sleeps, wakes, a broker that is stopped
now and then.

python -m polder.bench.soak.fleet --minutes 10 [--seed 1] [--logs DIR]

Two models with elastic weights and tiers, served by `polder serve`. Every answer that is waited for must be a 200 with
the tokens of stock vLLM, which is asked the same prompts before. No engine may end, `/health` may never be "down", and
when the requests stop nothing may stay busy. Prints one JSON object; ends with 1 when anything is not as it must be.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import httpx

from polder.bench.soak.traffic import (
    ANSWER_S,
    ANSWER_TOKENS,
    MODELS,
    FleetReport,
    Traffic,
    complete,
    prompts_of,
    tokens_of,
)
from polder.bench.workloads.models import ensure_model
from polder.errors import PolderError
from polder.serve.process import ManagedProcess, ProcessSpec, free_port, vllm_serve

__all__ = ["main"]

ARGS = ("--enforce-eager", "--block-size", "32", "--max-model-len", "1024", "--max-num-batched-tokens", "256")
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "OMP_NUM_THREADS": "1",
}
START_S = 900.0
"""Time limit of a server's start."""
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
    for name, answers in expected.items():
        if dull := sum(2 * len(set(answer)) < ANSWER_TOKENS for answer in answers):
            report.note(
                f"{name}: {dull} of {len(answers)} answers of stock repeat themselves: their equality says little"
            )
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
        await Traffic(report, url, socket, expected).run(60 * report.minutes)
    except* PolderError as group:
        for error in group.exceptions:
            report.note(str(error))
    finally:
        fleet.stop(grace_s=60.0)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m polder.bench.soak.fleet", description=(__doc__ or "").split("\n")[0]
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
