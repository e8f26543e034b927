"""`polder serve --check`: whether this machine can serve a fleet, need by need, before anything is started.

A need is met, unmet, or open: it is not known, or met in a way that will disappoint. Each that is not met says what to
change. `polder serve` looks at the same first, and goes on only if nothing is unmet.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from polder.engines.vllm.compat import check_version
from polder.errors import ConfigError, PolderError
from polder.serve.budget import most_kv_bytes
from polder.serve.fleet import Fleet, Model
from polder.serve.listening import listen
from polder.serve.machine import Machine, Memory
from polder.serve.needs import Line, folder_of_model, needs_of
from polder.units import format_bytes

__all__ = ["Estimates", "Finding", "ask_vllm", "check", "check_model", "faults"]

State = Literal["met", "unmet", "open"]
Estimates = Literal["refuse", "warn"]
"""What becomes of a fleet whose memory is too little by an estimate: `polder serve --memory-check`."""
PARSER_PATIENCE_S = 600.0


@dataclass(frozen=True, kw_only=True)
class Finding:
    need: str
    state: State
    detail: str
    """What was found, and what to change if it is not met."""
    lines: tuple[Line, ...] = ()
    """A sum."""
    estimated: bool = False
    """It is unmet by an estimate, or by what other processes take now: it may be met nevertheless."""


def check(fleet: Fleet, machine: Machine, refusals: Callable[[Sequence[Model]], Sequence[str]]) -> Iterator[Finding]:
    """`refusals(models)`: what vLLM says against each model's arguments, "" for nothing; raises EnvironmentFault."""
    yield _device(fleet, machine)
    needs = needs_of(fleet, machine.device.total_bytes if machine.device else None)
    if not machine.fault:
        yield _memory(f"memory of {fleet.device}", needs.device, machine.device, fleet)
    if needs.host:
        yield _memory("memory of the host", needs.host, machine.host, fleet)
    yield _port(fleet)
    yield from _disks([disk for model in fleet.models for disk in model.settings.disks])
    for model in fleet.models:
        yield from _model(model)
        yield _least(model, fleet)
    yield from _vllm(fleet, machine, refusals)


def check_model(
    model: Model,
    fleet: Fleet,
    machine: Machine,
    refusals: Callable[[Sequence[Model]], Sequence[str]],
    *,
    untaken_bytes: int | None,
) -> Iterator[Finding]:
    """The same for one model that is added to a fleet that runs, or started again in it.

    `untaken_bytes`: what no model holds yet of the fleet's budget. None: memory is not looked at, for a model that is
    started again gets its own back.
    """
    if untaken_bytes is not None:
        added = replace(fleet, models=(model,), budget_bytes=untaken_bytes, host_bytes=0)
        needs = needs_of(added, machine.device.total_bytes if machine.device else None)
        yield _memory(f"memory of {fleet.device}", needs.device, machine.device, added)
        if needs.host:
            yield _memory("memory of the host", needs.host, machine.host, added)
    yield from _disks(model.settings.disks)
    yield from _model(model)
    yield _least(model, fleet)
    yield from _vllm(replace(fleet, models=(model,)), machine, refusals)


def _device(fleet: Fleet, machine: Machine) -> Finding:
    if machine.fault:
        return Finding(need="device", state="unmet", detail=f"{fleet.device}: {machine.fault}")
    return Finding(need="device", state="met", detail=fleet.device)


def _memory(need: str, lines: tuple[Line, ...], memory: Memory | None, fleet: Fleet) -> Finding:
    total = sum(line.size_bytes or 0 for line in lines)
    unknown = [line.what for line in lines if line.size_bytes is None]
    if memory is None:
        return Finding(need=need, state="open", detail="unknown: NVML does not tell how much it has", lines=lines)
    limit = f", {memory.limit}" if memory.limit else ""
    detail = f"{format_bytes(total)} needed, {format_bytes(memory.free_bytes)} free of {format_bytes(memory.total_bytes)}{limit}"
    missing = total - memory.free_bytes
    if missing > 0:
        known = sum(line.size_bytes or 0 for line in lines if not line.estimated)
        return Finding(
            need=need,
            state="unmet",
            detail=f"{detail}: {_advice(missing, need, fleet)}",
            lines=lines,
            estimated=known <= memory.total_bytes,
        )
    if unknown:
        return Finding(need=need, state="open", detail=f"{detail}; unknown: {', '.join(unknown)}", lines=lines)
    return Finding(need=need, state="met", detail=detail, lines=lines)


def _advice(missing: int, need: str, fleet: Fleet) -> str:
    size = f"{-(-missing // (1 << 20))}MiB"
    elastic = any(model.settings.weights == "elastic" for model in fleet.models)
    least = max(fleet.page_bytes, sum(model.needed_bytes or 0 for model in fleet.models))
    budgets = [("budget" if elastic else "kv_budget", fleet.budget_bytes, least)]
    host = [("host", fleet.host_bytes, fleet.page_bytes)]
    if need.endswith("host"):
        budgets = host
    elif fleet.device.startswith("cpu"):
        budgets += host
    for key, budget, least in budgets:
        if budget - missing >= least:
            return f'lower memory.{key} by {size}, to "{(budget - missing) >> 20}MiB", or end what else takes memory'
    also = "" if elastic else ', or give them weights = "elastic" and a memory.budget'
    return f"{size} are missing: end what else takes memory, choose fewer or smaller models{also}"


def _port(fleet: Fleet) -> Finding:
    try:
        listen(fleet.server.host, fleet.server.port).close()
    except PolderError as error:
        return Finding(need="port", state="unmet", detail=str(error))
    return Finding(need="port", state="met", detail=f"{fleet.server.host}, {fleet.server.port}")


def _disks(disks: Sequence[tuple[str, int]]) -> Iterator[Finding]:
    """`disks`: each model's directory and its limit. They are put together by the disk on which they are."""
    on: dict[int, dict[str, list[tuple[str, int]]]] = {}
    for folder, size in disks:
        parent = str(Path(folder).parent)
        on.setdefault(os.stat(parent).st_dev, {}).setdefault(parent, []).append((folder, size))
    for parents in on.values():
        names = ", ".join(parents)
        closed = [parent for parent in parents if not os.access(parent, os.W_OK | os.X_OK)]
        if closed:
            detail = (
                f"{closed[0]} may not be written: give it to the user that runs this, or take it out of memory.disks"
            )
            yield Finding(need="disks", state="unmet", detail=detail)
            continue
        asked = sum(size for folders in parents.values() for _, size in folders)
        room = shutil.disk_usage(next(iter(parents))).free
        room += sum(_used(Path(folder)) for folders in parents.values() for folder, _ in folders)
        detail = f"{names}: {format_bytes(asked)} of {format_bytes(room)} that are free or Polder's already"
        if asked > room:
            detail += f": lower the limit to {format_bytes(room // len(parents)).replace(' ', '')} or less"
            yield Finding(need="disks", state="unmet", detail=detail)
        elif len(parents) > 1:
            yield Finding(need="disks", state="open", detail=f"{detail}; they are on one disk: name each disk once")
        else:
            yield Finding(need="disks", state="met", detail=detail)


def _used(folder: Path) -> int:
    return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0


def _model(model: Model) -> Iterator[Finding]:
    need, folder = f"model {model.name}", folder_of_model(model.path)
    if folder is None and (Path(model.path) / "params.json").is_file():
        yield Finding(need=need, state="open", detail=f"{model.path} has no config.json: its sizes are unknown")
        return
    if folder is None:
        detail = (
            f"{model.path!r} is no folder, so vLLM will look for it on its hub: unknown whether it is there, and how large. "
            f"Fetch it first (hf download {model.path}), or write the folder of a model"
        )
        yield Finding(need=need, state="open", detail=detail)
        return
    yield Finding(need=need, state="met", detail=str(folder))


def _least(model: Model, fleet: Fleet) -> Finding:
    need = f"KV memory of {model.name}"
    if model.needed_bytes is not None:
        detail = f"{format_bytes(model.needed_bytes)} at least, the budget is {format_bytes(fleet.budget_bytes)}"
        return Finding(need=need, state="met", detail=detail)
    if model.max_model_len == "auto":
        return Finding(need=need, state="met", detail="contexts get as long as fits")
    folder = folder_of_model(model.path)
    if folder is not None and not model.settings.window_bytes:
        most = most_kv_bytes(
            folder,
            max_model_len=model.max_model_len,
            args=model.args,
            device=fleet.device,
            page_bytes=fleet.page_bytes,
        )
        if most is not None and most <= fleet.budget_bytes:
            detail = f"{format_bytes(most)} at most, the budget is {format_bytes(fleet.budget_bytes)}"
            return Finding(need=need, state="met", detail=detail)
    detail = (
        'unknown how much one request needs: the engine itself will tell; or write its floor, or max_model_len = "auto"'
    )
    return Finding(need=need, state="open", detail=detail)


def _vllm(fleet: Fleet, machine: Machine, refusals: Callable[[Sequence[Model]], Sequence[str]]) -> Iterator[Finding]:
    if machine.vllm is None:
        yield Finding(
            need="vLLM",
            state="unmet",
            detail="not installed: pip install 'polder-kv[serve,gpu]' (without a GPU: [serve,cpu])",
        )
        return
    try:
        check_version(machine.vllm.split("+")[0])
    except PolderError as error:
        yield Finding(need="vLLM", state="unmet", detail=str(error))
        return
    yield Finding(need="vLLM", state="met", detail=machine.vllm)
    asked = [model for model in fleet.models if model.args]
    try:
        said = refusals(asked) if asked else []
    except PolderError as error:
        yield Finding(need="arguments", state="open", detail=f"unknown: {error}")
        return
    for model, refused in zip(asked, said, strict=True):
        need = f"arguments of {model.name}"
        if refused:
            yield Finding(need=need, state="unmet", detail=f"vLLM: {refused}; change its args")
        else:
            yield Finding(need=need, state="met", detail="vLLM takes them")


def faults(findings: Sequence[Finding], estimates: Estimates) -> list[str]:
    """What makes a start impossible, in words. With "warn" not what is unmet by an estimate only."""
    unmet = [found for found in findings if found.state == "unmet" and not (found.estimated and estimates == "warn")]
    more = {True: " (an estimate: --memory-check warn starts it all the same)", False: ""}
    return [f"{found.need}: {found.detail}{more[found.estimated]}" for found in unmet]


def ask_vllm(models: Sequence[Model]) -> list[str]:
    """What the installed vLLM's own parser says against each model's arguments. Raises ConfigError when it cannot be
    asked."""
    asked: list[dict[str, Any]] = [
        {"path": model.path, "args": model.arguments(), "env": model.environment(Path("/broker"))} for model in models
    ]
    program = (sys.executable, "-m", "polder.engines.vllm.arguments")
    try:
        done = subprocess.run(
            program,
            input=json.dumps(asked),
            env={**os.environ, "PYTHONSAFEPATH": "1"},  # no module comes from the working directory
            capture_output=True,
            text=True,
            timeout=PARSER_PATIENCE_S,
            check=True,
        )
        answers = json.loads(done.stdout)
    except subprocess.CalledProcessError as error:
        lines = error.stderr.strip().splitlines() or ["no word of why"]
        raise ConfigError(f"vLLM's parser could not be asked: {lines[-1]}") from error
    except (subprocess.TimeoutExpired, ValueError) as error:
        raise ConfigError(f"vLLM's parser did not answer: {error}") from error
    return [str(answer) for answer in answers]
