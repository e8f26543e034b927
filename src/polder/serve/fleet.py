"""The fleet file: which models, how much memory, where to listen. `EXAMPLE` shows every key.

Every error names the file, the key and what to write instead, and comes before anything is started. What needs no file (the
budget's arithmetic) is in budget.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from polder.broker.config import BrokerConfig
from polder.broker.policy import PolicyConfig
from polder.errors import BudgetError, ConfigError, UsageError
from polder.serve.budget import least_kv_bytes, option
from polder.serve.schema import EXAMPLE, FleetFile, MemoryTable, ModelTable, read_file
from polder.units import format_bytes, parse_bytes, parse_seconds

__all__ = ["EXAMPLE", "Fleet", "Model", "load_fleet"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")
_RESERVED = ("broker", "gateway")  # names that events, logs and metrics use already
_OURS = ("--served-model-name", "--host", "--port", "--uds", "--max-model-len", "--model")
_DEVICE = re.compile(r"(cpu|cuda):[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    path: str
    """A folder, or a name that vLLM resolves."""
    max_model_len: int | None = None
    floor_bytes: int | None = None
    share_bytes: int | None = None
    ceiling_bytes: int | None = None
    cpus: str = ""
    """Cores of its processes, as taskset writes them: "0-7,16"; empty: all."""
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
    file = read_file(path)
    try:
        fleet = _checked(file, path.parent)
        fleet.check_budget()
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from error
    return fleet


def _checked(file: FleetFile, folder: Path) -> Fleet:
    if not file.model:
        raise ConfigError("no model; add a [[model]] with a name and a path")
    names = [model.name for model in file.model]
    for name in names:
        if not _NAME.fullmatch(name) or name in _RESERVED:
            raise ConfigError(
                f"model name {name!r}: use letters, digits and . _ : / - (and not {', '.join(_RESERVED)})"
            )
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


def _policy(memory: MemoryTable, budget_bytes: int) -> PolicyConfig:
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


def _model(model: ModelTable, fleet: Fleet, folder: Path) -> Model:
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
    for low, high in (("floor", "ceiling"), ("share", "ceiling"), ("floor", "share")):
        least, most = sizes[low], sizes[high]
        if least is not None and most is not None and least > most:
            raise ConfigError(f"{what}: {low} {format_bytes(least)} is more than its {high} {format_bytes(most)}")
    path = _resolved(model, folder)
    least_bytes = least_kv_bytes(
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
        floor_bytes=sizes["floor"],
        share_bytes=sizes["share"],
        ceiling_bytes=sizes["ceiling"],
        cpus=_cpus(model),
        args=tuple(model.args),
        env=model.env,
        least_bytes=least_bytes,
    )


def _cpus(model: ModelTable) -> str:
    """The list as it stands, if all its cores are ours to use."""
    cores: set[int] = set()
    for part in filter(None, model.cpus.split(",")):
        first, dash, last = part.partition("-")
        if not first.isdecimal() or (dash and (not last.isdecimal() or int(last) < int(first))):
            raise ConfigError(f'model {model.name}: cpus {model.cpus!r}: write a list of cores such as "0-7,16"')
        cores |= set(range(int(first), int(last or first) + 1))
    missing = sorted(cores - os.sched_getaffinity(0))
    if missing:
        raise ConfigError(f"model {model.name}: cpus {model.cpus!r}: this machine gives us no core {missing[0]}")
    return model.cpus


def _resolved(model: ModelTable, folder: Path) -> str:
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
