"""The keys of the fleet file. `EXAMPLE` shows each of them; it is made from the declarations, as docs/settings.md is.

A [[model]] has the engine's settings too (engines/vllm/settings.py), and [memory] the broker's (broker/config.py).
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from polder.broker.config import BROKER_SETTINGS
from polder.engines.vllm.settings import DISKS, engine_settings
from polder.errors import ConfigError
from polder.settings import (
    FLAGS,
    SECONDS,
    SIZE,
    TEXT,
    VARIABLES,
    Kind,
    Setting,
    check_known,
    declared,
    default_of,
    read,
    setting,
)
from polder.units import parse_bytes

__all__ = ["EXAMPLE", "TABLES", "FleetFile", "MemoryTable", "ModelTable", "ServerTable", "read_tables", "read_toml"]

RESERVED = ("broker", "gateway")
"""Names that events, logs and metrics use already."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")
_BARE = re.compile(r"\s*([\w-]+)\s*=\s*([^\s\"'\[{#]+)\s*(?:#.*)?")
_DEVICE = re.compile(r"(cpu|cuda):[0-9]+")


def _port(value: Any, name: str) -> int:
    if not isinstance(value, int) or not 0 < value < 65536:
        raise ConfigError(f"{name} {value!r}: write a number from 1 to 65535")
    return value


def _origins(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(
        isinstance(word, str) and (word == "*" or "://" in word) for word in value
    ):
        raise ConfigError(f'{name} {value!r}: write a list such as ["https://chat.example.org"], or ["*"] for all')
    return tuple(value)


def _device(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _DEVICE.fullmatch(value):
        raise ConfigError(f"{name} {value!r}: write cpu:0 or cuda:INDEX")
    return value


def _model_name(value: Any, name: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value) or value in RESERVED:
        raise ConfigError(f"{name} {value!r}: use letters, digits and . _ : / - (and not {', '.join(RESERVED)})")
    return value


def _length(value: Any, name: str) -> int | Literal["auto"]:
    if value == "auto":
        return "auto"
    if not isinstance(value, int) or value < 1:
        raise ConfigError(f'{name} {value!r}: write a number of tokens above 0, or "auto"')
    return value


def _cpus(value: Any, name: str) -> str:
    """The list as it stands, if this process may use all of its cores."""
    cores: set[int] = set()
    for part in filter(None, str(value).split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise ConfigError(f'{name} {value!r}: write a list of cores such as "0-7,16"')
        cores |= set(range(int(first), int(last or first) + 1))
    missing = sorted(cores - os.sched_getaffinity(0))
    if missing:
        raise ConfigError(f"{name} {value!r}: this process may not use core {missing[0]}; leave it out")
    return str(value)


@dataclass(frozen=True, kw_only=True)
class ServerTable:
    host: str = setting(TEXT, default="127.0.0.1", example='"127.0.0.1"', help="Address of the OpenAI endpoint")
    port: int = setting(Kind(_port), default=8000, example="8000", help="Its port")
    api_key: str = setting(
        TEXT,
        default="",
        default_text="VLLM_API_KEY of the environment, else none",
        example='"..."',
        help="What clients must send as `Authorization: Bearer KEY`",
    )
    allowed_origins: tuple[str, ...] = setting(
        Kind(_origins),
        default=(),
        default_text="none",
        example='["*"]',
        help="Origins of web pages that may use it (CORS)",
    )
    keep_alive_s: float = setting(
        SECONDS, default=75.0, example='"75s"', help="How long a client's connection may be idle"
    )

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.port}"


@dataclass(frozen=True, kw_only=True)
class MemoryTable:
    device: str = setting(
        Kind(_device),
        default="",
        default_text="cuda:0 where there is an NVIDIA driver, else cpu:0",
        example='"cpu:0"',
        help="The device whose memory the models share",
    )
    kv_budget_bytes: int = setting(SIZE, default=0, example='"320MiB"', help="KV memory of all models together")
    budget_bytes: int = setting(
        SIZE,
        default=0,
        example='"900MiB"',
        alternative=True,
        help="Instead of kv_budget when a model has elastic weights: KV memory and those weights together",
    )
    host_bytes: int = setting(
        SIZE,
        default=0,
        default_text="none",
        example='"64GiB"',
        help="Host memory for the tiers and windows of all models",
    )
    disks: tuple[tuple[str, int], ...] = setting(
        DISKS,
        default=(),
        default_text="none",
        example='["/mnt/nvme0:400GiB", "/mnt/nvme1:400GiB"]',
        help="A directory on each disk and its limit, for all models together",
    )


@dataclass(frozen=True, kw_only=True)
class ModelTable:
    name: str = setting(Kind(_model_name), example='"chat"', help='What clients write as "model"')
    path: str = setting(
        TEXT,
        example='"/models/llama"',
        help="A folder with config.json, or a name on a hub that vLLM resolves",
    )
    max_model_len: int | Literal["auto"] | None = setting(
        Kind(_length),
        default=None,
        default_text="the model's own",
        example="8192",
        help='The longest context in tokens; "auto": as long as fits',
    )
    cpus: str = setting(
        Kind(_cpus),
        default="",
        default_text="all",
        example='"0-1"',
        help="The cores that its processes run on, as taskset writes them",
    )
    args: tuple[str, ...] = setting(
        FLAGS, default=(), example='["--enforce-eager"]', help="More arguments for `vllm serve`"
    )
    env: Mapping[str, str] = setting(
        VARIABLES,
        default=None,
        example='{ VLLM_CPU_OMP_THREADS_BIND = "0" }',
        help="More environment variables for its processes",
    )


@dataclass(frozen=True, kw_only=True)
class FleetFile:
    server: ServerTable
    memory: MemoryTable
    broker: Mapping[str, Any]
    """The broker's settings that the file gives, by field."""
    models: Sequence[tuple[ModelTable, Mapping[str, Any]]]
    """With the engine's settings that the file gives, by field."""


def _by_key(*classes: type) -> dict[str, Setting]:
    return {given.key: given for given in declared(*classes)}


_MODEL, _MEMORY = _by_key(ModelTable), _by_key(MemoryTable)
_ENGINE = {given.model: given for given in engine_settings() if given.model}
TABLES: dict[str, dict[str, Setting]] = {
    "[server]": _by_key(ServerTable),
    "[memory]": _MEMORY | BROKER_SETTINGS,
    "[[model]]": _MODEL | _ENGINE,
}
"""All keys, by the heading of their table."""


def _example(heading: str, settings: Mapping[str, Setting]) -> Iterable[str]:
    yield heading
    for key, given in settings.items():
        line = f"{'# ' if given.alternative else ''}{key} = {given.example}"
        default = default_of(given)
        comment = f"# {given.help}{f' (default: {default})' if default else ''}"
        yield f"{line:34}{comment}" if len(line) < 34 else f"{comment}\n{line}"


EXAMPLE = "\n\n".join("\n".join(_example(heading, settings)) for heading, settings in TABLES.items()) + "\n"


def read_toml(path: Path) -> dict[str, Any]:
    """Raises ConfigError when there is no such file, or when it is not TOML."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
        return tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is nested too deeply to be a fleet file") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: save it as such") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not TOML: {error}{_without_quotes(text, str(error))}") from error


def _without_quotes(text: str, error: str) -> str:
    """What to write where a value such as 320MiB has no quotes; "" for other mistakes."""
    line = re.search(r"at line ([0-9]+)", error)
    found = _BARE.fullmatch(text.splitlines()[int(line[1]) - 1]) if line else None
    return f'; write {found[1]} = "{found[2]}"' if found else ""


def read_tables(file: Mapping[str, Any]) -> FleetFile:
    """Raises ConfigError when a key is unknown, missing, or has a value that cannot be meant."""
    check_known(file, ("server", "memory", "model"), "fleet file")
    server, memory, models = file.get("server", {}), file.get("memory"), file.get("model")
    if not isinstance(memory, dict) or not isinstance(server, dict):
        raise ConfigError("'memory' is missing; add a line [memory] and a kv_budget below it")
    if isinstance(models, dict):
        raise ConfigError("write [[model]] in place of [model]: a fleet file may have several")
    if not isinstance(models, list) or not models or not all(isinstance(model, dict) for model in models):
        raise ConfigError("no model; add a [[model]] with a name and a path")
    found = MemoryTable(**read(_MEMORY, _known("memory", "[memory]", memory), "memory.{}".format))
    return FleetFile(
        server=ServerTable(**read(TABLES["[server]"], _known("server", "[server]", server), "server.{}".format)),
        memory=found,
        broker=read(BROKER_SETTINGS, _with_parts(memory, found), "memory.{}".format),
        models=[_model(number, model) for number, model in enumerate(models)],
    )


def _model(number: int, model: Mapping[str, Any]) -> tuple[ModelTable, dict[str, Any]]:
    what = f"model {model['name']}" if isinstance(model.get("name"), str) else f"model[{number}]"
    try:
        _known(what, "[[model]]", model)
    except ConfigError as error:
        unknown = next(key for key in model if key not in TABLES["[[model]]"])
        raise ConfigError(f"{error}; an option of vLLM's is {_as_args(unknown, model[unknown])}") from None
    name = f"{what}: {{}}".format
    return ModelTable(**read(_MODEL, model, name)), read(_ENGINE, model, name)


def _as_args(key: str, value: Any) -> str:
    option = key.replace("_", "-")
    words = (
        {True: [f"--{option}"], False: [f"--no-{option}"]}[value]
        if isinstance(value, bool)
        else [f"--{option}", str(value)]
    )
    return f"args = {json.dumps(words)}"


def _known(what: str, heading: str, given: Mapping[str, Any]) -> Mapping[str, Any]:
    check_known(given, TABLES[heading], what)
    return given


def _with_parts(memory: Mapping[str, Any], found: MemoryTable) -> dict[str, Any]:
    """The reserve may be a size, too: as a part of the budget."""
    budget = max(1, found.kv_budget_bytes or found.budget_bytes)
    parts = {
        key: parse_bytes(memory[key], what=f"memory.{key}") / budget
        for key in ("reserve_low", "reserve_high")
        if isinstance(memory.get(key), str)
    }
    return {**memory, **parts}
