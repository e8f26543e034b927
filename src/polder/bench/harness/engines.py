"""How all arms serve a model: the arguments, environment and bytes that are the same in each."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from polder.bench.harness.machine import two_cores
from polder.bench.workloads.models import ModelRecipe, ensure_model, weights_bytes
from polder.memory.page import PAGE_BYTES

__all__ = [
    *("BLOCK_TOKENS", "EnginePlan", "a_core_each", "describe", "engine_plans", "fleet_toml", "links_env"),
    "on_one_core",
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
    """One model as all arms serve it; fields from `sizing` to `page_bytes` are for Polder's arms alone."""

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
    sizing: Literal["elastic", "fixed"] = "elastic"
    """ "fixed" makes the share floor and ceiling too, so that memory is never moved between engines."""
    weights: Literal["resident", "elastic"] = "resident"
    """ "elastic" puts the weights of the layers into the budget, beside the KV memory."""
    store_to: tuple[Literal["peer", "host", "disk"], ...] = ()
    """Tiers that the engine stores to."""
    host_bytes: int = 0
    """Its quota of the host tier."""
    lend_bytes: int = 0
    """Most of its own KV memory that it lends at a time."""
    disks: tuple[str, ...] = ()
    """The fleet's disks, "PATH:SIZE" each."""
    window_bytes: int = 0
    """Host memory for long contexts."""
    window_layers: int = 2
    page_bytes: int = PAGE_BYTES
    """Page size of the broker."""
    extra_args: tuple[str, ...] = ()
    """What one arm alone adds to the arguments."""
    extra_env: Mapping[str, str] = field(default_factory=dict)
    """What one arm alone adds to the environment."""

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


def describe(engines: Sequence[EnginePlan]) -> dict[str, Any]:
    """What is the same in all arms, for the conditions of a result."""
    return {
        **{engine.name: engine.recipe.describe() for engine in engines},
        "blocks": {engine.name: engine.blocks for engine in engines},
        "arguments": " ".join(engines[0].arguments()),
        "environment": ENGINE_ENV,
        "cores": f"{', '.join(f'{engine.name}: {engine.cpus}' for engine in engines)}; the first of each computes",
        "endpoint": "all arms behind the same gateway; stages that ask one engine alone ask it without the gateway",
    }


def fleet_toml(engines: Sequence[EnginePlan], port: int) -> str:
    """The fleet file whose budget is the sum of the engines' shares, and of their weights where those are elastic."""
    shares = sum(engine.share_bytes for engine in engines)
    weights = sum(weights_bytes(engine.recipe) for engine in engines if engine.weights == "elastic")
    page = max(engine.page_bytes for engine in engines)
    memory = {
        "device": "cpu:0",
        ("budget" if weights else "kv_budget"): f"{shares + weights}B",
        "page": f"{page}B" if page != PAGE_BYTES else "",
        "host": _size(sum(engine.host_bytes + engine.window_bytes for engine in engines)),
        "disks": sorted({disk for engine in engines for disk in engine.disks}),
    }
    tables: list[tuple[str, Mapping[str, Any]]]
    tables = [("[server]", {"port": port}), ("[memory]", memory), *(("[[model]]", _model(e)) for e in engines)]
    lines = [[head, *(f"{key} = {_toml(value)}" for key, value in of.items() if value), ""] for head, of in tables]
    return "\n".join(line for table in lines for line in table)


def _model(engine: EnginePlan) -> dict[str, Any]:
    """Its table in the fleet file; what is empty is left out."""
    share = _size(engine.share_bytes)
    return {
        "name": engine.name,
        "path": str(engine.model_path()),
        "max_model_len": engine.max_model_len,
        "share": share,
        **(dict.fromkeys(("floor", "ceiling"), share) if engine.sizing == "fixed" else {}),
        "weights": "elastic" if engine.weights == "elastic" else "",
        "tiers": engine.store_to,
        "host": _size(engine.host_bytes),
        "lend": _size(engine.lend_bytes),
        "window": _size(engine.window_bytes),
        "window_layers": engine.window_layers if engine.window_bytes else 0,
        "cpus": engine.cpus,
        "args": engine.arguments(),
        "env": engine.environment(),
    }


def _size(size_bytes: int) -> str:
    return f"{size_bytes}B" if size_bytes else ""


def _toml(value: Any) -> str:
    """Strings, numbers and lists are written in TOML as in JSON; a mapping becomes an inline table."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{key} = {json.dumps(of)}' for key, of in value.items())} }}"
    return json.dumps(value)
