"""`polder init`: a fleet file for some models, with a budget that leaves room for all else on the device."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from polder.errors import BudgetError, ConfigError
from polder.planner.model_shape import own_limit, read_config
from polder.serve.fleet import Fleet, check_tables
from polder.serve.machine import Machine
from polder.serve.needs import Line, folder_of_model, needs_of
from polder.serve.schema import read_tables
from polder.units import format_bytes

__all__ = ["DraftModel", "draft", "read_command", "with_own_cores"]

SHARE = {"cpu": 0.5, "cuda": 0.95}
"""The part of the memory that is left which the budget takes. A CPU's memory is for other programs, too."""
SHORTEST = 2048
_BIND = "VLLM_CPU_OMP_THREADS_BIND"
_STEP = 64 << 20
_OURS = ("--host", "--port", "--uds", "--kv-transfer-config", "--gpu-memory-utilization", "--kv-cache-memory-bytes")
"""Arguments with a value that a fleet sets itself."""
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*=.*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class DraftModel:
    name: str
    path: str
    max_model_len: int | None = None
    cpus: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    """Arguments that the fleet has keys for, or sets itself."""

    def table(self, weights: str) -> dict[str, object]:
        """Its [[model]]; what is empty is left out."""
        return {
            "name": self.name,
            "path": self.path,
            "max_model_len": self.max_model_len,
            "weights": weights,
            "cpus": self.cpus,
            "args": list(self.args),
            "env": dict(self.env),
        }


def read_command(text: str) -> DraftModel:
    """A model from its folder, its name on a hub, or a command line `VARIABLE=... vllm serve MODEL --option ...`.

    Raises ConfigError for another command.
    """
    if Path(text).expanduser().is_dir() or not re.search(r"\s", text.strip()):
        return DraftModel(name=_name(text), path=_path(text))
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{text!r}: {error}; quote the command as for a shell") from error
    env: dict[str, str] = {}
    while words and _VARIABLE.fullmatch(words[0]):
        key, _, value = words.pop(0).partition("=")
        env[key] = value
    if [Path(word).name for word in words[:1]] != ["vllm"] or words[1:2] != ["serve"]:
        raise ConfigError(f"{text!r}: write the folder of a model, or a command that begins with `vllm serve`")
    values: dict[str, str] = {}
    args: list[str] = []
    left_out: list[str] = []
    rest = words[2:]
    if rest and not rest[0].startswith("-"):
        values["--model"] = rest.pop(0)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        name = name.replace("_", "-") if name.startswith("--") else name
        if name in (*_OURS, "--model", "--served-model-name", "--max-model-len"):
            if not equals:
                if not rest:
                    raise ConfigError(f"{text!r}: {name} needs a value")
                value = rest.pop(0)
            values[name] = value
            left_out += [f"{name} {value}"] if name in _OURS else []
        else:
            args.append(word)
    if "--model" not in values:
        raise ConfigError(f"{text!r}: no model; write it after `vllm serve`")
    length = values.get("--max-model-len")
    if length is not None and not length.isdecimal():
        raise ConfigError(f"{text!r}: --max-model-len {length}: write a number of tokens")
    return DraftModel(
        name=_name(values.get("--served-model-name", values["--model"])),
        path=_path(values["--model"]),
        max_model_len=int(length) if length else None,
        args=tuple(args),
        env=env,
        left_out=tuple(left_out),
    )


def draft(models: Sequence[DraftModel], machine: Machine, device: str, port: int) -> str:
    """The text of a fleet file whose budget fits beside all else that its models need.

    Contexts that no command gave are shortened until one request of each model fits; where the weights do not fit
    together, they are elastic. On a CPU each model gets cores of its own, if there are enough. Raises BudgetError when
    the models do not fit, ConfigError for a device that is not there.
    """
    if machine.fault or machine.device is None:
        raise ConfigError(f"device {device}: {machine.fault or 'NVML does not tell how much memory it has'}")
    models = with_own_cores(_with_own_names(models), machine.cores)
    reasons = []
    for weights in ("", "elastic"):
        try:
            return _with_weights(models, machine, device, port, weights)
        except BudgetError as error:
            reasons.append(str(error))
    raise BudgetError(f"these models do not fit {device}: {reasons[0]}. With elastic weights: {reasons[1]}")


def _with_weights(models: Sequence[DraftModel], machine: Machine, device: str, port: int, weights: str) -> str:
    assert machine.device is not None
    key = "budget" if weights else "kv_budget"
    while True:
        fleet = _fleet(models, device, port, weights, {key: f"{1 << 50}B"})
        needs = needs_of(fleet, machine.device.total_bytes)
        others = needs.device[1:]
        unknown = [line.what for line in others if line.size_bytes is None]
        if unknown:
            raise ConfigError(f"unknown: {', '.join(unknown)}; write the fleet file by hand (`polder serve --help`)")
        room = machine.device.free_bytes - sum(line.size_bytes or 0 for line in others)
        budget = int(room * SHARE[device.partition(":")[0]]) // _STEP * _STEP
        least = sum(model.needed_bytes or 0 for model in fleet.models)
        if weights:
            least = max(
                (line.size_bytes or 0 for line in needs.device + needs.host if "host copy" in line.what), default=0
            )
            least += max((model.needed_bytes or 0 for model in fleet.models), default=0)
        if budget >= max(least, _STEP):
            return _text(models, device, port, weights, {key: _mib(budget)}, needs.device, budget)
        shorter = _shortened(models)
        if shorter is None:
            said = f"{format_bytes(machine.device.free_bytes)} are free, {format_bytes(max(0, room))} of them for KV memory"
            raise BudgetError(f"{said}, and one request of each model needs {format_bytes(least)}")
        models = shorter


def _fleet(models: Sequence[DraftModel], device: str, port: int, weights: str, memory: Mapping[str, str]) -> Fleet:
    tables = [{key: value for key, value in model.table(weights).items() if value} for model in models]
    file = {"server": {"port": port}, "memory": {"device": device, **memory}, "model": tables}
    return check_tables(read_tables(file), Path.cwd())


def _shortened(models: Sequence[DraftModel]) -> Sequence[DraftModel] | None:
    """With half of the longest context. None: all are short."""
    lengths = [model.max_model_len or _limit(model) for model in models]
    longest = max(lengths)
    if longest <= SHORTEST:
        return None
    at = lengths.index(longest)
    return [replace(m, max_model_len=longest // 2) if number == at else m for number, m in enumerate(models)]


def _limit(model: DraftModel) -> int:
    folder = folder_of_model(model.path)
    return (own_limit(read_config(folder)) if folder is not None else None) or SHORTEST


def _text(
    models: Sequence[DraftModel],
    device: str,
    port: int,
    weights: str,
    memory: Mapping[str, str],
    lines: Sequence[Line],
    budget: int,
) -> str:
    sizes = [Line(lines[0].what, budget), *lines[1:]]
    total = sum(line.size_bytes or 0 for line in sizes)
    text = [
        f"# What this takes of {device}; `polder serve --check` compares it with what is free.",
        *(f"# {format_bytes(line.size_bytes or 0):>10}  {line.what}" for line in sizes),
        f"# {format_bytes(total):>10}  in all",
        *("", "[server]", f"port = {port}"),
        *("", "[memory]", f'device = "{device}"', *(f"{key} = {json.dumps(size)}" for key, size in memory.items())),
    ]
    for model in models:
        text += ["", "[[model]]"]
        text += [f"# left out, because the fleet sets it: {word}" for word in model.left_out]
        for key, value in model.table(weights).items():
            if isinstance(value, dict) and value:
                text.append(
                    f"{key} = {{ {', '.join(f'{name} = {json.dumps(word)}' for name, word in value.items())} }}"
                )
            elif value:
                text.append(f"{key} = {json.dumps(value)}")
    return "\n".join(text) + "\n"


def _with_own_names(models: Sequence[DraftModel]) -> list[DraftModel]:
    """Two with the same name get a number."""
    named: list[DraftModel] = []
    for model in models:
        taken = {other.name for other in named}
        name, number = model.name, 2
        while name in taken:
            name, number = f"{model.name}-{number}", number + 1
        named.append(replace(model, name=name))
    return named


def with_own_cores(models: Sequence[DraftModel], cores: Sequence[tuple[int, ...]]) -> Sequence[DraftModel]:
    """Equal parts of the physical cores, one thread for each: by itself, vLLM binds the threads of every engine to the
    same cores. As they are when there are fewer cores than models, or a command binds threads itself."""
    part = len(cores) // len(models)
    if not part or any(_BIND in model.env for model in models):
        return models
    parts = [cores[part * number : part * (number + 1)] for number in range(len(models))]
    return [
        replace(
            model,
            cpus=",".join(str(core) for core in sorted(sum(mine, ()))),
            env={**model.env, _BIND: ",".join(str(core[0]) for core in mine)},
        )
        for model, mine in zip(models, parts, strict=True)
    ]


def _path(text: str) -> str:
    local = Path(text).expanduser()
    return str(local.resolve()) if local.is_dir() else text


def _name(text: str) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(text).expanduser().resolve().name).strip("-._")
    return name or "model"


def _mib(size: int) -> str:
    return f"{size >> 20}MiB"
