"""How both arms serve a model: the arguments, environment and bytes that are the same in each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from polder.bench.harness.machine import two_cores
from polder.bench.workloads.models import ModelRecipe, ensure_model
from polder.memory.page import PAGE_BYTES

__all__ = [
    *("BLOCK_TOKENS", "ENGINE_ARGS", "ENGINE_ENV", "EnginePlan", "TierPlan", "a_core_each"),
    *("describe_engines", "fleet_toml", "links_env", "on_one_core"),
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
class TierPlan:
    """What a Polder arm gives an engine beyond its own pool."""

    store_to: tuple[Literal["peer", "host", "disk"], ...] = ()
    """Tiers that the engine stores to."""
    host_bytes: int = 0
    """Its quota of the host tier."""
    lend_bytes: int = 0
    """Most of its own KV memory that it lends at a time."""
    disks: tuple[str, ...] = ()
    """The fleet's disks, "PATH:SIZE" each."""


@dataclass(frozen=True, kw_only=True)
class EnginePlan:
    """One model as both arms serve it."""

    name: str
    recipe: ModelRecipe
    model_path: Path
    max_model_len: int
    core: int
    """The core that its processes compute on."""
    more_cores: tuple[int, ...] = ()
    """Further ones, for its processes that do not compute."""
    share_bytes: int
    """KV memory: all of it in the stock arm, the share that is the engine's own on demand in the Polder arm."""
    batched_tokens: int = 512
    """A chunk of prefill bounds how long a step lasts, and with it how long memory takes to come back."""
    sizing: Literal["elastic", "fixed"] = "elastic"
    """Polder arms: "fixed" makes the share floor and ceiling too, so that memory is never moved between engines."""
    weights: Literal["resident", "elastic"] = "resident"
    """Polder arms: "elastic" puts the weights of the layers into the budget, beside the KV memory."""
    weights_bytes: int = 0
    """Bytes of the layers, each in whole pages; they count where weights are elastic."""
    tiers: TierPlan | None = None
    """Polder arms: None is an engine without tiers."""
    window_bytes: int = 0
    """Polder arms: host memory for long contexts."""
    window_layers: int = 2
    page_bytes: int = PAGE_BYTES
    """Page size of the Polder arm's broker."""
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
        return ",".join(map(str, (self.core, *self.more_cores)))

    def arguments(self) -> tuple[str, ...]:
        batched = ("--max-num-batched-tokens", str(self.batched_tokens))
        return (*ENGINE_ARGS, *batched, "--dtype", self.recipe.dtype, *self.extra_args)

    def environment(self) -> dict[str, str]:
        # One thread computes. Two engines' teams of threads on the same cores wait for each other at every barrier: both stand
        # still for seconds.
        return ENGINE_ENV | {"VLLM_CPU_OMP_THREADS_BIND": str(self.core)} | dict(self.extra_env)


def a_core_each(
    recipes: Mapping[str, ModelRecipe],
    models_dir: Path,
    *,
    max_model_len: Mapping[str, int],
    share_bytes: Mapping[str, int],
) -> list[EnginePlan]:
    """Two engines that share memory, which is measured, and no compute. Builds their models where they are missing."""
    return [
        EnginePlan(
            name=name,
            recipe=recipe,
            model_path=ensure_model(recipe, models_dir),
            max_model_len=max_model_len[name],
            core=core,
            share_bytes=share_bytes[name],
        )
        for (name, recipe), core in zip(recipes.items(), two_cores(), strict=True)
    ]


def on_one_core(
    recipes: Mapping[str, ModelRecipe], models_dir: Path, *, max_model_len: int, share_bytes: int, batched_tokens: int
) -> list[EnginePlan]:
    """Engines that all compute on one core, as on one device, and have the other core for the rest of their
    processes."""
    core, *more = dict.fromkeys(two_cores())
    return [
        EnginePlan(
            name=name,
            recipe=recipe,
            model_path=ensure_model(recipe, models_dir),
            max_model_len=max_model_len,
            core=core,
            more_cores=tuple(more),
            share_bytes=share_bytes,
            batched_tokens=batched_tokens,
        )
        for name, recipe in recipes.items()
    ]


def links_env(rates: Mapping[str, float]) -> dict[str, str]:
    """Environment of an engine whose links are emulated (name -> bytes a second); without any, nothing is emulated."""
    return {"POLDER_LINKS": ",".join(f"{name}={rate / 1e6:g}MB/s" for name, rate in rates.items())} if rates else {}


def describe_engines(engines: Sequence[EnginePlan]) -> dict[str, Any]:
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
    weights = [engine.weights_bytes for engine in engines if engine.weights == "elastic"]
    budget = f'budget = "{shares + sum(weights)}B"' if weights else f'kv_budget = "{shares}B"'
    host_bytes = sum((engine.tiers.host_bytes if engine.tiers else 0) + engine.window_bytes for engine in engines)
    disks = sorted({disk for engine in engines if engine.tiers for disk in engine.tiers.disks})
    page = max(engine.page_bytes for engine in engines)
    lines = [
        *("[server]", f"port = {port}", ""),
        *("[memory]", 'device = "cpu:0"', budget),
        *([f'page = "{page}B"'] if page != PAGE_BYTES else ()),
        *([f'host = "{host_bytes}B"'] if host_bytes else ()),
        *([f"disks = {_list(disks)}"] if disks else ()),
        "",
    ]
    for engine in engines:
        environment = ", ".join(f"{key} = {_quoted(value)}" for key, value in engine.environment().items())
        lines += [
            "[[model]]",
            f'name = "{engine.name}"',
            f'path = "{engine.model_path.resolve()}"',
            f"max_model_len = {engine.max_model_len}",
            f'share = "{engine.share_bytes}B"',
            *(['weights = "elastic"'] if engine.weights == "elastic" else ()),
            *_memory_lines(engine),
            f'cpus = "{engine.cpus}"',
            f"args = {_list(engine.arguments())}",
            f"env = {{ {environment} }}",
            "",
        ]
    return "\n".join(lines)


def _memory_lines(engine: EnginePlan) -> list[str]:
    """What an engine has beyond its share, as far as it differs from the defaults."""
    tiers = engine.tiers or TierPlan()
    fixed, windowed = engine.sizing == "fixed", engine.window_bytes > 0
    return [
        *([f'floor = "{engine.share_bytes}B"', f'ceiling = "{engine.share_bytes}B"'] if fixed else ()),
        *([f"tiers = {_list(tiers.store_to)}"] if tiers.store_to else ()),
        *([f'host = "{tiers.host_bytes}B"'] if tiers.host_bytes else ()),
        *([f'lend = "{tiers.lend_bytes}B"'] if tiers.lend_bytes else ()),
        *([f'window = "{engine.window_bytes}B"', f"window_layers = {engine.window_layers}"] if windowed else ()),
    ]


def _list(texts: Iterable[str]) -> str:
    return f"[{', '.join(map(_quoted, texts))}]"


def _quoted(text: str) -> str:
    """A TOML basic string; no value of a bench holds quotes or backslashes."""
    assert not set(text) & {'"', "\\"}, text
    return f'"{text}"'
