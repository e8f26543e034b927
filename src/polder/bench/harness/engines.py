"""How all arms serve a model: the arguments, environment and bytes that are the same in each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import starmap
from pathlib import Path
from typing import Any

from polder.bench.harness.machine import two_cores
from polder.bench.workloads.models import ModelRecipe, ensure_model, weights_bytes

__all__ = [
    *("BLOCK_TOKENS", "EnginePlan", "a_core_each", "engine_plans", "fleet_toml", "links_env", "on_one_core"),
    "toml_text",
]

BLOCK_TOKENS = 32
ENGINE_ARGS = (
    "--enforce-eager",
    *("--block-size", str(BLOCK_TOKENS)),
    "--enable-prefix-caching",
    "--enable-prompt-tokens-details",  # usage.prompt_tokens_details.cached_tokens
)
ENGINE_ENV = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; only a ceiling, the number of blocks is set by each arm
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_SERVER_DEV_MODE": "1",  # POST /reset_prefix_cache
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
}


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """One model as all arms serve it; `keys` and `memory` are for Polder's arms alone."""

    name: str
    recipe: ModelRecipe
    models: Path
    """The folder where models are made, once."""
    max_model_len: int
    share_bytes: int
    """KV memory: all of it in a stock arm, the share that is the engine's own on demand in a Polder arm."""
    cores: tuple[int, ...] = (0,)
    """Its processes compute on the first one; the others are for those that do not compute."""
    batched_tokens: int = 512
    """A chunk of prefill bounds how long a step lasts, and with it how long memory takes to come back."""
    extra_args: tuple[str, ...] = ()
    """What one arm alone adds to the arguments."""
    extra_env: Mapping[str, str] = field(default_factory=dict)
    """What one arm alone adds to the environment."""
    keys: Mapping[str, Any] = field(default_factory=dict)
    """More keys of its table in the fleet file (`polder serve --help`), such as tiers and weights. Sizes in bytes."""
    memory: Mapping[str, Any] = field(default_factory=dict)
    """More keys of the fleet's [memory] table: page, disks."""

    @property
    def blocks(self) -> int:
        """Blocks that fit the share."""
        return self.share_bytes // (BLOCK_TOKENS * self.recipe.kv_bytes_per_token)

    @property
    def cpus(self) -> str:
        """All of its cores, as taskset lists them."""
        return ",".join(map(str, self.cores))

    def model_path(self) -> Path:
        """The model's folder; makes the model where it is missing."""
        return ensure_model(self.recipe, self.models).resolve()

    def arguments(self) -> tuple[str, ...]:
        batched = ("--max-num-batched-tokens", str(self.batched_tokens))
        return (*ENGINE_ARGS, *batched, "--dtype", self.recipe.dtype, *self.extra_args)

    def environment(self) -> dict[str, str]:
        # One thread computes. Two engines' teams of threads on the same cores wait for each other at every barrier: both stand
        # still for seconds.
        return ENGINE_ENV | {"VLLM_CPU_OMP_THREADS_BIND": str(self.cores[0])} | dict(self.extra_env)

    def settings(self) -> dict[str, Any]:
        """Its table in the fleet file, without the model's path."""
        return {
            "name": self.name,
            "max_model_len": self.max_model_len,
            "share": self.share_bytes,
            "cpus": self.cpus,
            "args": self.arguments(),
            **self.keys,
            **{f"env.{name}": value for name, value in self.environment().items()},
        }

    def describe(self) -> dict[str, Any]:
        """For the conditions of a result."""
        return {"model": self.recipe.describe(), "blocks": self.blocks} | self.settings() | dict(self.memory)

    def with_keys(self, **keys: Any) -> EnginePlan:
        return replace(self, keys={**self.keys, **keys})

    def of_fixed_size(self) -> EnginePlan:
        """The share is floor and ceiling too, so memory is never moved between engines."""
        return self.with_keys(floor=self.share_bytes, ceiling=self.share_bytes)


def engine_plans(recipes: Mapping[str, ModelRecipe], models: Path, **sizes: Any) -> list[EnginePlan]:
    """One for each recipe. `sizes`: fields of the plan, the same for all engines or, as a mapping, by engine."""

    def of(engine: str) -> dict[str, Any]:
        return {name: size[engine] if isinstance(size, Mapping) else size for name, size in sizes.items()}

    return [EnginePlan(name=engine, recipe=recipe, models=models, **of(engine)) for engine, recipe in recipes.items()]


def a_core_each(engines: Sequence[EnginePlan]) -> list[EnginePlan]:
    """Two engines that share memory, which is measured, and no compute."""
    return [replace(engine, cores=(core,)) for engine, core in zip(engines, two_cores(), strict=True)]


def on_one_core(engines: Iterable[EnginePlan]) -> list[EnginePlan]:
    """All compute on one core, as on one device, and have the other core for the rest of their processes."""
    cores = tuple(dict.fromkeys(two_cores()))
    return [replace(engine, cores=cores) for engine in engines]


def links_env(rates: Mapping[str, float]) -> dict[str, str]:
    """Environment of an engine whose links are emulated (name -> bytes a second); without any, nothing is emulated."""
    return {"POLDER_LINKS": ",".join(f"{name}={rate / 1e6:g}MB/s" for name, rate in rates.items())} if rates else {}


def fleet_toml(engines: Sequence[EnginePlan], port: int) -> str:
    """The fleet file whose budget is the sum of the engines' shares, and of their weights where those are elastic."""
    weights = sum(weights_bytes(engine.recipe) for engine in engines if engine.keys.get("weights") == "elastic")
    memory: dict[str, Any] = {"device": "cpu:0"}
    memory["budget" if weights else "kv_budget"] = sum(engine.share_bytes for engine in engines) + weights
    if host := sum(engine.keys.get(key, 0) for engine in engines for key in ("host", "window")):
        memory["host"] = host
    for engine in engines:
        memory |= engine.memory
    models = [("[[model]]", {"path": str(engine.model_path())} | engine.settings()) for engine in engines]
    return toml_text([("[server]", {"port": port}), ("[memory]", memory), *models])


def toml_text(tables: Iterable[tuple[str, Mapping[str, Any]]]) -> str:
    """Tables of texts, numbers, lists of texts, and tables of these, by their headings."""

    def line(key: str, of: Any) -> str:
        if isinstance(of, Mapping):
            return f"{key} = {{ {', '.join(line(json.dumps(name), value) for name, value in of.items())} }}"
        return f"{key} = {json.dumps(of, ensure_ascii=False)}"  # as in JSON

    return "\n\n".join("\n".join([head, *starmap(line, table.items())]) for head, table in tables) + "\n"
