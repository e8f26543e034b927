"""The fleet file: which models, how much memory, where to listen. `EXAMPLE` (schema.py) shows every key.

Every error names the file, the key and what to write instead, and comes before anything is started. budget.py has the
arithmetic of the least KV memory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from polder.broker.config import BrokerConfig
from polder.broker.policy import PolicyConfig
from polder.engines.vllm.settings import EngineSettings
from polder.errors import BudgetError, ConfigError, UsageError
from polder.planner.checkpoint import hub_folder
from polder.planner.model_shape import own_limit, read_config
from polder.serve.arguments import check_arguments, is_given
from polder.serve.budget import least_kv_bytes
from polder.serve.disks import disk_parts
from polder.serve.schema import EXAMPLE, FleetFile, ModelTable, ServerTable, read_tables, read_toml
from polder.settings import declared
from polder.units import format_bytes

__all__ = ["EXAMPLE", "Fleet", "Model", "check_tables", "default_device", "load_fleet"]

_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
_KEYS = {given.key: given.model or given.key for given in declared(EngineSettings)}


@dataclass(frozen=True, kw_only=True)
class Model:
    path: str
    """A folder, or a name that vLLM resolves."""
    settings: EngineSettings
    """`broker` is not known yet."""
    max_model_len: int | Literal["auto"] | None = None
    cpus: str = ""
    """Cores of its processes in the notation of taskset: "0-7,16". Empty: all."""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    least_bytes: int | None = None
    """KV memory of one request of max_model_len; None when only the engine can tell."""

    @property
    def name(self) -> str:
        return self.settings.engine

    @property
    def needed_bytes(self) -> int | None:
        """KV memory without which it cannot serve; None when only the engine itself can tell."""
        return self.settings.kv_floor_bytes or self.least_bytes

    def environment(self, socket: Path) -> dict[str, str]:
        """The variables that make its engine elastic. Empty values undo those of this process's own environment."""
        given = replace(self.settings, broker=socket).environment() | dict(self.env)
        plugins = given.get("VLLM_PLUGINS", os.environ.get("VLLM_PLUGINS"))
        if plugins is not None:  # vLLM loads only the plugins that it names
            names = [name for name in plugins.split(",") if name]
            given["VLLM_PLUGINS"] = ",".join(names if "polder" in names else [*names, "polder"])
        return given

    def arguments(self) -> tuple[str, ...]:
        length = () if self.max_model_len is None else ("--max-model-len", str(self.max_model_len))
        connector = '{"kv_connector":"PolderConnector","kv_role":"kv_both"}'
        tiers = ("--kv-transfer-config", connector) if self.settings.tiers else ()
        return (*length, *tiers, *self.args)


@dataclass(frozen=True, kw_only=True)
class Fleet:
    server: ServerTable
    device: str
    budget_bytes: int
    """KV memory of all models, and the weights of models with elastic weights."""
    page_bytes: int
    policy: PolicyConfig
    models: tuple[Model, ...]
    host_bytes: int = 0
    """Host memory for the host tiers and windows of all models."""

    def broker(self, socket: Path) -> BrokerConfig:
        devices = {self.device: self.budget_bytes} | ({"host:0": self.host_bytes} if self.host_bytes else {})
        return BrokerConfig(socket=socket, devices=devices, page_bytes=self.page_bytes, policy=self.policy)

    def check_budget(self) -> None:
        """Raises BudgetError when the models cannot all have their least memory at once, and says how much is
        needed."""
        for model in self.models:
            given = {"floor": model.settings.kv_floor_bytes, "ceiling": model.settings.kv_ceiling_bytes}
            for key, size in given.items():
                if model.least_bytes is not None and size is not None and size < model.least_bytes:
                    raise BudgetError(
                        f"model {model.name}: {key} {format_bytes(size)} is less than one request of "
                        f"max_model_len needs: write {_mib(model.least_bytes)} or more, or lower max_model_len"
                    )
            if model.settings.lend_bytes > self.budget_bytes:
                raise BudgetError(
                    f"model {model.name}: lend {format_bytes(model.settings.lend_bytes)} is more than the whole budget of "
                    f"{format_bytes(self.budget_bytes)}: write a part of it"
                )
        # A sleeping model needs next to nothing: for elastic weights the broker checks exactly.
        needs = {m.name: m.needed_bytes for m in self.models if m.settings.weights == "resident"}
        known = {name: need for name, need in needs.items() if need is not None}
        least = sum(known.values())
        if least > self.budget_bytes // self.page_bytes * self.page_bytes:
            each = ", ".join(f"{name} {format_bytes(need)}" for name, need in known.items())
            raise BudgetError(
                f"memory.kv_budget {format_bytes(self.budget_bytes)} is too small: one request of max_model_len needs {each}. "
                f'Write kv_budget = "{_mib(least)}" or more, or lower max_model_len'
            )
        shares = sum(model.settings.kv_share_bytes or 0 for model in self.models)
        if shares > self.budget_bytes:
            raise BudgetError(
                f"the models' shares are {format_bytes(shares)} together, more than memory.kv_budget "
                f'{format_bytes(self.budget_bytes)}: write kv_budget = "{_mib(shares)}" or more, or lower them'
            )


def load_fleet(path: Path) -> Fleet:
    """Reads and checks a fleet file. Raises ConfigError or BudgetError."""
    raw = read_toml(path)
    try:
        fleet = check_tables(read_tables(raw), path.parent)
        fleet.check_budget()
    except UsageError as error:
        raise type(error)(f"{path}: {error}") from error
    return fleet


def default_device() -> str:
    return "cuda:0" if Path("/dev/nvidiactl").exists() else "cpu:0"


def check_tables(file: FleetFile, folder: Path) -> Fleet:
    """The fleet that a file in `folder` describes, whatever the budget holds. Raises ConfigError or BudgetError."""
    names = [model.name for model, _ in file.models]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"model name {name!r} is given twice; each needs its own")
    policy = dict(file.broker)
    page_bytes = policy.pop("page_bytes", BrokerConfig.page_bytes)
    fleet = Fleet(
        server=file.server,
        device=file.memory.device or default_device(),
        budget_bytes=_budget(file),
        page_bytes=page_bytes,
        policy=PolicyConfig(**policy),
        models=(),
        host_bytes=file.memory.host_bytes,
    )
    fleet.broker(Path("socket"))  # raises when page and budget do not fit each other
    settings = {model.name: EngineSettings(engine=model.name, **given) for model, given in file.models}
    disks, quotas = disk_parts(file.memory, list(settings.values())), _host_quotas(settings, fleet)
    models = []
    for model, _ in file.models:
        own = replace(settings[model.name], disks=disks.get(model.name, ()), host_bytes=quotas.get(model.name, 0))
        models.append(_model(model, own, fleet, folder))
    return replace(fleet, models=tuple(models))


def _budget(file: FleetFile) -> int:
    memory = file.memory
    elastic = [model.name for model, given in file.models if given.get("weights") == "elastic"]
    if bool(memory.kv_budget_bytes) == bool(memory.budget_bytes):
        both = "excludes budget: keep one" if memory.budget_bytes else 'is missing; add a line kv_budget = "320MiB"'
        raise ConfigError(f"memory: 'kv_budget' {both}")
    if bool(elastic) != bool(memory.budget_bytes):
        raise ConfigError(
            f'model {elastic[0]}: weights = "elastic" needs memory.budget, KV and weights together, in place of kv_budget'
            if elastic
            else 'memory.budget is for KV and elastic weights, and no model has weights = "elastic": write kv_budget'
        )
    return memory.kv_budget_bytes or memory.budget_bytes


def _host_quotas(settings: Mapping[str, EngineSettings], fleet: Fleet) -> dict[str, int]:
    """Host memory by model: what it asks for, else an equal part of what is left, in whole pages, for models with that
    tier."""
    asked = {name: model.host_bytes for name, model in settings.items() if model.host_bytes}
    taken = sum(asked.values()) + sum(model.window_bytes + model.sparse_bytes for model in settings.values())
    rest = fleet.host_bytes - taken
    if rest < 0:
        raise BudgetError(
            f"the models' host quotas, windows and sparse prefixes are {format_bytes(taken)} together, more than memory.host "
            f'{format_bytes(fleet.host_bytes)}: write host = "{_mib(taken)}" or more, or lower them'
        )
    others = [name for name, model in settings.items() if "host" in model.tiers and name not in asked]
    quotas = asked | {name: rest // len(others) // fleet.page_bytes * fleet.page_bytes for name in others}
    for name, quota in quotas.items():
        if quota < fleet.page_bytes:
            raise BudgetError(
                f'model {name}: no host memory is left for it: write memory.host = "64GiB" or another size'
            )
    return quotas


def _model(model: ModelTable, settings: EngineSettings, fleet: Fleet, folder: Path) -> Model:
    what = f"model {model.name}"
    settings.check(lambda key: f"{what}: {_KEYS[key]}")
    check_arguments(what, model.args, fleet.device)
    sizes = {
        "floor": settings.kv_floor_bytes,
        "share": settings.kv_share_bytes,
        "ceiling": settings.kv_ceiling_bytes,
    }
    for key, size in sizes.items():
        if size == 0:
            raise ConfigError(f"{what}: {key} 0: write a size above 0, or leave it out")
    for low, high in (("floor", "ceiling"), ("share", "ceiling"), ("floor", "share")):
        least, most = sizes[low], sizes[high]
        if least is not None and most is not None and least > most:
            raise ConfigError(f"{what}: {low} {format_bytes(least)} is more than its {high} {format_bytes(most)}")
    path = _resolved(model, folder)
    local = hub_folder(path) or Path(path)
    if (local / "config.json").is_file():
        _check_config(what, model, local)
    least_bytes = None
    if not settings.window_bytes:  # with a window a request needs less; only the engine knows how much
        least_bytes = least_kv_bytes(
            local,
            max_model_len=model.max_model_len,
            args=model.args,
            device=fleet.device,
            page_bytes=fleet.page_bytes,
        )
    return Model(
        path=path,
        settings=settings,
        max_model_len=model.max_model_len,
        cpus=model.cpus,
        args=model.args,
        env=model.env or {},
        least_bytes=least_bytes,
    )


def _check_config(what: str, model: ModelTable, folder: Path) -> None:
    """Raises ConfigError when the folder's config.json cannot be read, or when its model is asked for more tokens than
    it has. This comes before its memory is reckoned: a larger budget would not help."""
    try:
        limit, length = own_limit(read_config(folder)), model.max_model_len
    except ConfigError as error:
        raise ConfigError(f"{what}: {error}; fetch the model again, or mend the file") from error
    longer = (model.env or {}).get(_LONGER, os.environ.get(_LONGER)) == "1" or is_given(model.args, "--hf-overrides")
    if isinstance(length, int) and limit is not None and length > limit and not longer:
        raise ConfigError(
            f"{what}: max_model_len {length:,} is more than the model's own {limit:,}: write that or less"
        )


def _resolved(model: ModelTable, folder: Path) -> str:
    """A folder relative to the fleet file, or the text itself when it can only be a name on a hub."""
    what = f"model {model.name}: path"
    try:
        local = folder / Path(model.path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{what} {model.path!r}: there is no such home directory; write the whole path") from error
    if any((local / name).is_file() for name in ("config.json", "params.json")):
        return str(local.resolve())
    if model.path.startswith((".", "/", "~")) or local.exists():
        raise ConfigError(f"{what} {local} has no config.json; write the folder of a model")
    # Names on a hub are NAME or OWNER/NAME; "://" is an address that vLLM's loaders know.
    if "://" not in model.path and (model.path.count("/") > 1 or (local.parent != folder and local.parent.is_dir())):
        raise ConfigError(f"{what} {model.path!r}: there is no folder {local}; write the folder of a model")
    return model.path


def _mib(size: int) -> str:
    """The size as it would be written in the file, rounded up."""
    return f"{-(-size // (1 << 20))}MiB"
