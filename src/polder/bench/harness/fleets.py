"""A user's own fleet as two arms: as its file says, and as plain vLLM engines with fixed parts of the same KV bytes.

The Polder arm gets the user's tables, with a port of the arm's own and without a key; what is on disk lies in
directories that end with the run. What both arms add to a model: cached tokens are told with each reply, and the bench
may empty caches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from polder.bench.harness.arms import Arm
from polder.bench.harness.engines import toml_text
from polder.errors import BudgetError, ConfigError
from polder.planner.model_shape import read_config
from polder.serve.arguments import is_given
from polder.serve.budget import context_tokens
from polder.serve.fleet import Fleet, Model, load_fleet
from polder.serve.keys import VARIABLE
from polder.serve.needs import folder_of_model, sizes_of
from polder.serve.process import ProcessSpec
from polder.serve.schema import read_toml
from polder.serve.specs import device_arguments, vllm_serve
from polder.units import format_bytes

__all__ = ["FleetSpec", "OwnEngine", "OwnFleet", "fixed_parts", "load_own", "on_own_disks"]

TOLD = "--enable-prompt-tokens-details"
ENV = {"VLLM_SERVER_DEV_MODE": "1"}
OWN_SIZES = ("--num-gpu-blocks-override", "VLLM_CPU_KVCACHE_SPACE")
"""An argument and a variable by which a stock engine would have another size than its part, for they win over
--kv-cache-memory-bytes. An empty text in the variable ends vLLM."""


@dataclass(frozen=True, kw_only=True)
class OwnEngine:
    model: Model
    max_model_len: int
    """Its context, prompt and reply together."""
    device: str

    @property
    def name(self) -> str:
        return self.model.name

    def describe(self) -> dict[str, Any]:
        """For the conditions of a result: names and sizes, no path and no variable."""
        return {"name": self.name, "model": Path(self.model.path).name, "max_model_len": self.max_model_len}

    def stock(self, kv_bytes: int, port: int, log_path: Path) -> ProcessSpec:
        """The engine as plain vLLM."""
        plain = replace(self.model, settings=replace(self.model.settings, tiers=()))
        size = ("--kv-cache-memory-bytes", str(kv_bytes))
        # With a size vLLM does not need this part of the device's memory, but refuses to start when it is not free.
        free = ("--gpu-memory-utilization", "0.01") if self.device.startswith("cuda") else ()
        others = ",".join(name for name in self.model.env.get("VLLM_PLUGINS", "").split(",") if name != "polder")
        return vllm_serve(
            self.model.path,
            name=self.name,
            port=port,
            args=(*plain.arguments(), *device_arguments(self.model, self.device), TOLD, *size, *free),
            env={**self.model.env, **ENV, "VLLM_PLUGINS": others, VARIABLE: ""},
            cpus=self.model.cpus,
            log_path=log_path,
        )


@dataclass(frozen=True, kw_only=True)
class OwnFleet:
    fleet: Fleet
    tables: Mapping[str, Any]
    """Of its file."""
    engines: tuple[OwnEngine, ...]


def load_own(path: Path) -> OwnFleet:
    """Raises ConfigError or BudgetError."""
    fleet = load_fleet(path)
    engines = []
    for model in fleet.models:
        if model.name == "all":
            raise ConfigError('model all: give it another name: results have "all" for all models together')
        for name in OWN_SIZES:
            if is_given(model.args, name) or name in {**os.environ, **model.env}:
                raise ConfigError(f"model {model.name}: {name}: leave it out: each arm's bytes are the fleet's")
        folder = folder_of_model(model.path)
        if folder is None:
            raise ConfigError(f"model {model.name}: {model.path!r} is not on this machine: fetch it first")
        tokens = context_tokens(read_config(folder), model.max_model_len, model.args)
        if tokens is None:
            raise ConfigError(
                f"model {model.name}: write max_model_len as a number: both arms must serve the same contexts"
            )
        engines.append(OwnEngine(model=model, max_model_len=tokens, device=fleet.device))
    return OwnFleet(fleet=fleet, tables=read_toml(path), engines=tuple(engines))


def fixed_parts(fleet: Fleet) -> dict[str, int]:
    """KV bytes of each model as plain vLLM: its share of the file, else an equal part of what is left, and no less than
    one request needs. The sum is the fleet's KV memory; elastic weights, which stock keeps, are taken from it first.

    Raises BudgetError when they do not fit.
    """
    weights = sum(
        _movable_bytes(model, fleet.page_bytes) for model in fleet.models if model.settings.weights == "elastic"
    )
    left = fleet.budget_bytes - weights
    least = {model.name: model.least_bytes or 0 for model in fleet.models}
    if left < max(1, sum(least.values())):
        raise BudgetError(
            f"plain vLLM cannot hold these models at once: of {format_bytes(fleet.budget_bytes)} all weights leave "
            f"{format_bytes(max(0, left))} for KV, one request of each needs {format_bytes(sum(least.values()))}. "
            "`--arms polder` measures Polder alone"
        )
    parts: dict[str, int] = {}
    equal = dict(least)
    for model in fleet.models:
        share = model.settings.kv_share_bytes
        if share is not None:
            del equal[model.name]
            parts[model.name] = min(max(share, least[model.name]), left - sum(parts.values()) - sum(equal.values()))
    while equal:  # whoever needs more than an equal part gets what it needs, and the others share the rest
        each = (left - sum(parts.values())) // len(equal)
        more = {name: need for name, need in equal.items() if need > each}
        parts |= more or dict.fromkeys(equal, each)
        equal = {name: need for name, need in equal.items() if name not in parts}
    spare = (left - sum(parts.values())) // len(parts)
    return {model.name: parts[model.name] + spare for model in fleet.models}


def _movable_bytes(model: Model, page_bytes: int) -> int:
    shape, _ = sizes_of(model)
    if shape is None:
        raise ConfigError(
            f"model {model.name}: the size of its layers is not known, so plain vLLM cannot get the same bytes"
        )
    pages = -(-shape.layer_weight_bytes // shape.layers // page_bytes)
    return pages * page_bytes * shape.layers


@contextmanager
def on_own_disks(own: OwnFleet) -> Iterator[OwnFleet]:
    """The fleet with an empty directory of its own on each of its disks, gone at the end."""
    with ExitStack() as folders:
        disks = []
        for disk in own.tables["memory"].get("disks", ()):
            path, _, size = str(disk).rpartition(":")
            folder = folders.enter_context(
                TemporaryDirectory(prefix="polder-bench-", dir=path, ignore_cleanup_errors=True)
            )
            disks.append(f"{folder}:{size}")
        memory = {**own.tables["memory"], **({"disks": disks} if disks else {})}
        yield replace(own, tables={**own.tables, "memory": memory})


@dataclass(frozen=True)
class FleetSpec:
    """An arm of the user's fleet."""

    system: Literal["stock", "polder"]
    own: OwnFleet

    @property
    def engines(self) -> Sequence[OwnEngine]:
        return self.own.engines

    def make(self, name: str, logs: Path, runtime: Path) -> Arm:
        """The arm, not started."""
        return Arm(name, self, logs, runtime)

    def stock(self, number: int, port: int, logs: Path) -> ProcessSpec:
        engine = self.own.engines[number]
        kv_bytes = fixed_parts(self.own.fleet)[engine.name]
        return engine.stock(kv_bytes, port, logs / f"{engine.name.replace('/', '%2F')}.log")

    def fleet_file(self, port: int) -> str:
        models = []
        for given, engine in zip(self.own.tables["model"], self.own.engines, strict=True):
            args, env = [*engine.model.args, TOLD], {**engine.model.env, **ENV}
            models.append(("[[model]]", {**given, "path": engine.model.path, "args": args, "env": env}))
        return toml_text([("[server]", {"port": port}), ("[memory]", self.own.tables["memory"]), *models])
