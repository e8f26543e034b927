"""The fleet file: which models, how much memory, where to listen. `EXAMPLE` shows every key.

Every error names the file, the key and what to write instead, and comes before anything is started. What needs no file (the
budget's arithmetic) is in budget.py.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from polder.broker.config import BrokerConfig
from polder.broker.policy import PolicyConfig
from polder.errors import BudgetError, ConfigError, UsageError
from polder.memory.page import PAGE_BYTES
from polder.serve.budget import least_kv_bytes, option
from polder.units import format_bytes, parse_bytes, parse_seconds

__all__ = ["EXAMPLE", "Fleet", "Model", "load_fleet"]

EXAMPLE = """\
[server]
host = "127.0.0.1"                # default
port = 8000                       # default

[memory]
device = "cpu:0"                  # default: cuda:0 where there is an NVIDIA driver, else cpu:0
kv_budget = "320MiB"              # KV memory of all models together
page = "2MiB"                     # default
reserve_low = 0.02                # free memory below which the reserve is refilled: a part of kv_budget, or a size ...
reserve_high = 0.06               # ... up to this (defaults)
hold = "1s"                       # cache memory changes hands no more often (default)
deadline = "200ms"                # time to give recalled memory back (default)

[[model]]                         # one for each model
name = "chat"                     # what clients write as "model"
path = "/models/llama"            # a folder with config.json; anything else that is no path is left to vLLM (a hub's name)
max_model_len = 8192              # optional, as are all that follow
floor = "64MiB"                   # never taken from it (default: what one request of max_model_len needs)
share = "160MiB"                  # its own on demand, more is on loan (default: an equal part)
ceiling = "1GiB"                  # never more than this (default: the whole budget)
args = ["--enforce-eager"]        # more arguments for `vllm serve`
env = { VLLM_CPU_OMP_THREADS_BIND = "0" }
"""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_RESERVED = {"broker"}  # the name of a child, and of its log
_OURS = ("--served-model-name", "--host", "--port", "--uds", "--max-model-len", "--model")
_DEVICE = re.compile(r"(cpu|cuda):[0-9]+")


class _Server(msgspec.Struct, forbid_unknown_fields=True):
    host: str = "127.0.0.1"
    port: int = 8000


class _Memory(msgspec.Struct, forbid_unknown_fields=True):
    kv_budget: str | int
    device: str = ""
    page: str | int = PAGE_BYTES
    reserve_low: str | float = PolicyConfig.reserve_low_ratio
    reserve_high: str | float = PolicyConfig.reserve_high_ratio
    hold: str | float = PolicyConfig.min_hold_s
    deadline: str | float = PolicyConfig.deadline_s


class _Model(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    path: str
    max_model_len: int | None = None
    floor: str | int | None = None
    share: str | int | None = None
    ceiling: str | int | None = None
    args: list[str] = []
    env: dict[str, str] = {}


class _File(msgspec.Struct, forbid_unknown_fields=True):
    memory: _Memory
    model: list[_Model]
    server: _Server = msgspec.field(default_factory=_Server)


_TABLES: dict[str, type[msgspec.Struct]] = {"memory": _Memory, "model": _Model, "server": _Server, "": _File}


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    path: str
    """A folder, or a name that vLLM resolves."""
    max_model_len: int | None = None
    floor_bytes: int | None = None
    share_bytes: int | None = None
    ceiling_bytes: int | None = None
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    least_bytes: int | None = None
    """KV memory of one request of its longest kind; None when only the engine itself can tell."""

    def environment(self, socket: Path) -> dict[str, str]:
        """What makes its engine elastic. Empty values undo what this process's own environment may hold."""
        sizes = {
            "POLDER_KV_FLOOR": self.floor_bytes,
            "POLDER_KV_SHARE": self.share_bytes,
            "POLDER_KV_CEILING": self.ceiling_bytes,
        }
        given = {name: "" if size is None else str(size) for name, size in sizes.items()}
        none = {"POLDER_KV_BUDGET": "", "POLDER_PAGE": ""}
        return {"POLDER_BROKER": str(socket), "POLDER_ENGINE": self.name, **none, **given, **self.env}

    def arguments(self) -> tuple[str, ...]:
        length = () if self.max_model_len is None else ("--max-model-len", str(self.max_model_len))
        return (*length, *self.args)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    host: str
    port: int
    device: str
    budget_bytes: int
    page_bytes: int
    policy: PolicyConfig
    models: tuple[Model, ...]

    def broker(self, socket: Path) -> BrokerConfig:
        return BrokerConfig(
            socket=socket, devices={self.device: self.budget_bytes}, page_bytes=self.page_bytes, policy=self.policy
        )

    def check_budget(self) -> None:
        """Raises BudgetError when the models cannot all have their least memory at once, with what is needed."""
        for model in self.models:
            if model.least_bytes is not None and (model.floor_bytes or model.least_bytes) < model.least_bytes:
                raise BudgetError(
                    f"model {model.name}: floor {format_bytes(model.floor_bytes or 0)} is less than one request of "
                    f"max_model_len needs: write {_mib(model.least_bytes)} or more, or lower max_model_len"
                )
        needs = {m.name: m.floor_bytes or m.least_bytes for m in self.models}
        known = {name: need for name, need in needs.items() if need is not None}
        least = sum(known.values())
        if least > self.budget_bytes // self.page_bytes * self.page_bytes:
            each = ", ".join(f"{name} {format_bytes(need)}" for name, need in known.items())
            raise BudgetError(
                f"memory.kv_budget {format_bytes(self.budget_bytes)} is too small: one request of max_model_len needs {each}. "
                f'Write kv_budget = "{_mib(least)}" or more, or lower max_model_len'
            )
        shares = sum(model.share_bytes or 0 for model in self.models)
        if shares > self.budget_bytes:
            raise BudgetError(
                f"the models' shares are {format_bytes(shares)} together, more than memory.kv_budget "
                f'{format_bytes(self.budget_bytes)}: write kv_budget = "{_mib(shares)}" or more, or lower them'
            )


def load_fleet(path: Path) -> Fleet:
    """Reads and checks a fleet file. Raises ConfigError or BudgetError."""
    try:
        data = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}") from error
    try:
        fleet = _checked(msgspec.convert(data, _File), path.parent)
        fleet.check_budget()
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_explained(str(error))}") from error
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from error
    return fleet


def _explained(message: str) -> str:
    """msgspec's message in the file's own words, with what to write instead."""
    text, _, where = message.partition(" - at `$")
    place = where.rstrip("`").lstrip(".")
    table = re.split(r"[.\[]", place)[0]
    known = _TABLES.get(table, _File).__struct_fields__
    heading = f"{place}: " if place else ""
    if unknown := re.match(r"Object contains unknown field `(.*)`", text):
        close = difflib.get_close_matches(unknown[1], known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"
        return f"{heading}unknown key {unknown[1]!r}; {hint}"
    if missing := re.match(r"Object missing required field `(.*)`", text):
        lines = {"kv_budget": 'kv_budget = "320MiB"', "memory": "[memory]", "model": "[[model]]"}
        return f"{heading}{missing[1]!r} is missing; add a line {lines.get(missing[1], missing[1] + ' = ...')}"
    return f"{heading}{text[:1].lower()}{text[1:]}"


def _checked(file: _File, folder: Path) -> Fleet:
    if not file.model:
        raise ConfigError("no model; add a [[model]] with a name and a path")
    names = [model.name for model in file.model]
    for name in names:
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(f"model name {name!r}: use letters, digits and . _ - (and not {', '.join(_RESERVED)})")
        if names.count(name) > 1:
            raise ConfigError(f"model name {name!r} is given twice; each needs its own")
    if not 0 < file.server.port < 65536:
        raise ConfigError(f"server.port {file.server.port}: write a number from 1 to 65535")
    memory = file.memory
    device = memory.device or ("cuda:0" if Path("/dev/nvidiactl").exists() else "cpu:0")
    if not _DEVICE.fullmatch(device):
        raise ConfigError(f"memory.device {device!r}: write cpu:0 or cuda:INDEX")
    budget, page = (parse_bytes(getattr(memory, key), what=f"memory.{key}") for key in ("kv_budget", "page"))
    fleet = Fleet(
        host=file.server.host,
        port=file.server.port,
        device=device,
        budget_bytes=budget,
        page_bytes=page,
        policy=_policy(memory, budget),
        models=(),
    )
    fleet.broker(Path("socket"))  # page and budget fit each other
    return replace(fleet, models=tuple(_model(model, fleet, folder) for model in file.model))


def _policy(memory: _Memory, budget_bytes: int) -> PolicyConfig:
    def part(key: str) -> float:
        value: str | float = getattr(memory, key)
        if isinstance(value, str):
            return parse_bytes(value, what=f"memory.{key}") / max(1, budget_bytes)
        return value

    return PolicyConfig(
        reserve_low_ratio=part("reserve_low"),
        reserve_high_ratio=part("reserve_high"),
        min_hold_s=parse_seconds(memory.hold, what="memory.hold"),
        deadline_s=parse_seconds(memory.deadline, what="memory.deadline"),
    )


def _model(model: _Model, fleet: Fleet, folder: Path) -> Model:
    what = f"model {model.name}"

    def size(key: str) -> int | None:
        value: Any = getattr(model, key)
        return None if value is None else parse_bytes(value, what=f"{what}: {key}")

    for name in _OURS:
        if option(model.args, name) is not None:
            instead = "the key max_model_len" if name == "--max-model-len" else "nothing: `polder serve` sets it"
            raise ConfigError(f"{what}: args: {name} does not belong there; write {instead}")
    if model.max_model_len is not None and model.max_model_len < 1:
        raise ConfigError(f"{what}: max_model_len {model.max_model_len}: write a number of tokens above 0")
    sizes = {key: size(key) for key in ("floor", "share", "ceiling")}
    floor, share, ceiling = sizes.values()
    for low, high in (("floor", "ceiling"), ("share", "ceiling"), ("floor", "share")):
        if (sizes[low] or 0) > (sizes[high] if sizes[high] is not None else float("inf")):
            raise ConfigError(f"{what}: {low} {format_bytes(sizes[low] or 0)} is more than its {high}; lower it")
    path = _resolved(model, folder)
    least = least_kv_bytes(
        Path(path),
        max_model_len=model.max_model_len,
        args=model.args,
        device=fleet.device,
        page_bytes=fleet.page_bytes,
    )
    return Model(
        name=model.name,
        path=path,
        max_model_len=model.max_model_len,
        floor_bytes=floor,
        share_bytes=share,
        ceiling_bytes=ceiling,
        args=tuple(model.args),
        env=model.env,
        least_bytes=least,
    )


def _resolved(model: _Model, folder: Path) -> str:
    """A folder relative to the fleet file, or the path as it stands when it can only be a name."""
    local = folder / Path(model.path).expanduser()
    if any((local / name).is_file() for name in ("config.json", "params.json")):
        return str(local.resolve())
    if model.path.startswith((".", "/", "~")) or local.exists():
        raise ConfigError(f"model {model.name}: path {local} has no config.json; write the folder of a model")
    return model.path


def _mib(size: int) -> str:
    """As it would be written in the file, rounded up."""
    return f"{-(-size // (1 << 20))}MiB"
