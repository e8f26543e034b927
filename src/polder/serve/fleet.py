"""The fleet file: which models, how much memory, where to listen. `EXAMPLE` shows every key.

Every error names the file, the key and what to write instead, and comes before anything is started. What needs no file (the
budget's arithmetic) is in budget.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from polder.broker.config import BrokerConfig
from polder.broker.policy import PolicyConfig
from polder.engines.vllm.settings import TIERS
from polder.errors import BudgetError, ConfigError, UsageError
from polder.serve.budget import least_kv_bytes, option
from polder.serve.disks import Disks, disk_parts
from polder.serve.schema import EXAMPLE, FleetFile, MemoryTable, ModelTable, read_file
from polder.serve.supervisor import BROKER
from polder.units import format_bytes, parse_bytes, parse_goal, parse_seconds, seconds_text

__all__ = ["EXAMPLE", "Fleet", "Model", "load_fleet"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]*")
_RESERVED = (BROKER, "gateway")  # names that events, logs and metrics use already
_OURS = ("--served-model-name", "--host", "--port", "--uds", "--max-model-len", "--model", "--kv-transfer-config")
_DEVICE = re.compile(r"(cpu|cuda):[0-9]+")


@dataclass(frozen=True, kw_only=True)
class Model:
    name: str
    path: str
    """A folder, or a name that vLLM resolves."""
    max_model_len: int | Literal["auto"] | None = None
    floor_bytes: int | None = None
    share_bytes: int | None = None
    ceiling_bytes: int | None = None
    tiers: tuple[str, ...] = ()
    """Where KV goes that its cache has no room for: some of TIERS, in their order."""
    host_bytes: int = 0
    disks: Disks = ()
    disk_writes_bytes: int | None = None
    """A day, all disks together; None: no bound."""
    disk_io: Literal["threads", "aio"] = "threads"
    lend_bytes: int = 0
    weights: Literal["resident", "elastic"] = "resident"
    window_bytes: int = 0
    """Host memory for the layers of long contexts that are not on the device."""
    window_layers: int | None = None
    tbt_goal_s: float | None = None
    """A token may take so long while others prefill, or with a window; None: no bound."""
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
        given |= {
            "POLDER_TIERS": ",".join(self.tiers),
            "POLDER_HOST": str(self.host_bytes or ""),
            "POLDER_DISKS": ",".join(f"{path}:{size}" for path, size in self.disks),
            "POLDER_DISK_WRITES": "" if self.disk_writes_bytes is None else str(self.disk_writes_bytes),
            "POLDER_DISK_IO": self.disk_io,
            "POLDER_LEND": str(self.lend_bytes or ""),
            "POLDER_WEIGHTS": self.weights,
            "POLDER_WINDOW": str(self.window_bytes or ""),
            "POLDER_WINDOW_LAYERS": "" if self.window_layers is None else str(self.window_layers),
            "POLDER_TBT_GOAL": "" if self.tbt_goal_s is None else seconds_text(self.tbt_goal_s),
        }
        given |= {"POLDER_BROKER": str(socket), "POLDER_ENGINE": self.name, **none, **self.env}
        plugins = given.get("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS"))
        if plugins is not None:  # vLLM loads those that are named and no others
            names = [name for name in plugins.split(",") if name]
            given["VLLM_PLUGINS"] = ",".join(names if "polder" in names else [*names, "polder"])
        return given

    def arguments(self) -> tuple[str, ...]:
        length = () if self.max_model_len is None else ("--max-model-len", str(self.max_model_len))
        connector = '{"kv_connector":"PolderConnector","kv_role":"kv_both"}'
        tiers = ("--kv-transfer-config", connector) if self.tiers else ()
        return (*length, *tiers, *self.args)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    host: str
    port: int
    device: str
    budget_bytes: int
    """KV memory of all models, and the weights of those whose weights are elastic."""
    page_bytes: int
    policy: PolicyConfig
    models: tuple[Model, ...]
    host_bytes: int = 0
    """Host memory of all models' host tiers and windows."""

    def broker(self, socket: Path) -> BrokerConfig:
        devices = {self.device: self.budget_bytes} | ({"host:0": self.host_bytes} if self.host_bytes else {})
        return BrokerConfig(socket=socket, devices=devices, page_bytes=self.page_bytes, policy=self.policy)

    def check_budget(self) -> None:
        """Raises BudgetError when the models cannot all have their least memory at once, with what is needed."""
        for model in self.models:
            if model.least_bytes is not None and (model.floor_bytes or model.least_bytes) < model.least_bytes:
                raise BudgetError(
                    f"model {model.name}: floor {format_bytes(model.floor_bytes or 0)} is less than one request of "
                    f"max_model_len needs: write {_mib(model.least_bytes)} or more, or lower max_model_len"
                )
        # A model that sleeps needs next to nothing: whether those with elastic weights fit is the broker's exact check.
        needs = {m.name: m.floor_bytes or m.least_bytes for m in self.models if m.weights == "resident"}
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
    page, host = (parse_bytes(getattr(memory, key), what=f"memory.{key}") for key in ("page", "host"))
    budget = _budget(file)
    fleet = Fleet(
        host=file.server.host,
        port=file.server.port,
        device=device,
        budget_bytes=budget,
        page_bytes=page,
        policy=_policy(memory, budget),
        models=(),
        host_bytes=host,
    )
    fleet.broker(Path("socket"))  # page and budget fit each other
    for model in file.model:
        _tiers(model)
    disks, quotas = disk_parts(memory, file.model), _host_quotas(file.model, fleet)
    models = (_model(m, fleet, folder, quotas.get(m.name, 0), disks.get(m.name, ())) for m in file.model)
    return replace(fleet, models=tuple(models))


def _budget(file: FleetFile) -> int:
    memory = file.memory
    elastic = [model.name for model in file.model if model.weights == "elastic"]
    if bool(memory.kv_budget) == bool(memory.budget):
        both = "excludes budget: keep one" if memory.budget else 'is missing; add a line kv_budget = "320MiB"'
        raise ConfigError(f"memory: 'kv_budget' {both}")
    if bool(elastic) != bool(memory.budget):
        raise ConfigError(
            f'model {elastic[0]}: weights = "elastic" needs memory.budget, KV and weights together, in place of kv_budget'
            if elastic
            else 'memory.budget is for KV and elastic weights, and no model has weights = "elastic": write kv_budget'
        )
    key = "budget" if memory.budget else "kv_budget"
    return parse_bytes(getattr(memory, key), what=f"memory.{key}")


def _host_quotas(models: Sequence[ModelTable], fleet: Fleet) -> dict[str, int]:
    """Host memory of each model with that tier: what it asks for, else an equal part of what nobody asked for; in whole pages."""
    with_host = [model for model in models if "host" in model.tiers]
    asked = {
        model.name: parse_bytes(model.host, what=f"model {model.name}: host")
        for model in with_host
        if model.host is not None
    }
    for model in models:
        if model.host is not None and model not in with_host:
            raise ConfigError(f'model {model.name}: host is given, but its tiers are {model.tiers}: add "host" to them')
    windows = sum(parse_bytes(model.window, what=f"model {model.name}: window") for model in models)
    taken = sum(asked.values()) + windows
    rest = fleet.host_bytes - taken
    if rest < 0:
        raise BudgetError(
            f"the models' host quotas and windows are {format_bytes(taken)} together, more than memory.host "
            f'{format_bytes(fleet.host_bytes)}: write host = "{_mib(taken)}" or more, or lower them'
        )
    others = [model.name for model in with_host if model.name not in asked]
    quotas = asked | {name: rest // len(others) // fleet.page_bytes * fleet.page_bytes for name in others}
    for name, quota in quotas.items():
        if quota < fleet.page_bytes:
            raise BudgetError(
                f'model {name}: no host memory is left for it: write memory.host = "64GiB" or another size'
            )
    return quotas


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


def _model(model: ModelTable, fleet: Fleet, folder: Path, host_bytes: int, disks: Disks) -> Model:
    what = f"model {model.name}"

    def size(key: str) -> int | None:
        value: Any = getattr(model, key)
        return None if value is None else parse_bytes(value, what=f"{what}: {key}")

    for name in _OURS:
        if option(model.args, name) is not None:
            instead = "the key max_model_len" if name == "--max-model-len" else "nothing: `polder serve` sets it"
            raise ConfigError(f"{what}: args: {name} does not belong there; write {instead}")
    max_model_len = _length(model, what)
    sizes = {key: size(key) for key in ("floor", "share", "ceiling")}
    for low, high in (("floor", "ceiling"), ("share", "ceiling"), ("floor", "share")):
        least, most = sizes[low], sizes[high]
        if least is not None and most is not None and least > most:
            raise ConfigError(f"{what}: {low} {format_bytes(least)} is more than its {high} {format_bytes(most)}")
    path = _resolved(model, folder)
    window_bytes = parse_bytes(model.window, what=f"{what}: window")
    if model.window_layers is not None and (model.window_layers < 1 or not window_bytes):
        raise ConfigError(
            f"{what}: window_layers {model.window_layers}: write 1 or more, and window, a size of host memory"
        )
    # With a window a request needs less than all of its layers: how much, the engine tells when it starts.
    least_bytes = (
        None
        if window_bytes
        else least_kv_bytes(
            Path(path),
            max_model_len=max_model_len,
            args=model.args,
            device=fleet.device,
            page_bytes=fleet.page_bytes,
        )
    )
    return Model(
        name=model.name,
        path=path,
        max_model_len=max_model_len,
        floor_bytes=sizes["floor"],
        share_bytes=sizes["share"],
        ceiling_bytes=sizes["ceiling"],
        tiers=_tiers(model),
        host_bytes=host_bytes,
        disks=disks,
        disk_writes_bytes=size("disk_writes"),
        disk_io=model.disk_io,
        lend_bytes=parse_bytes(model.lend, what=f"{what}: lend"),
        weights=model.weights,
        window_bytes=window_bytes,
        window_layers=model.window_layers,
        tbt_goal_s=None if model.tbt_goal is None else parse_goal(model.tbt_goal, what=f"{what}: tbt_goal"),
        cpus=_cpus(model),
        args=tuple(model.args),
        env=model.env,
        least_bytes=least_bytes,
    )


def _length(model: ModelTable, what: str) -> int | Literal["auto"] | None:
    length = model.max_model_len
    if length == "auto":
        return "auto"
    if isinstance(length, str) or (length is not None and length < 1):
        raise ConfigError(f'{what}: max_model_len {length!r}: write a number of tokens above 0, or "auto"')
    return length


def _tiers(model: ModelTable) -> tuple[str, ...]:
    unknown = [tier for tier in model.tiers if tier not in TIERS]
    if unknown:
        raise ConfigError(f"model {model.name}: tiers: unknown {unknown[0]!r}; known are {', '.join(TIERS)}")
    return tuple(tier for tier in TIERS if tier in model.tiers)


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
