"""How both arms serve a model: the arguments, environment and bytes that are the same in each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from polder.bench.models import ModelRecipe

__all__ = ["BLOCK_TOKENS", "ENGINE_ARGS", "ENGINE_ENV", "EnginePlan", "fleet_toml"]

BLOCK_TOKENS = 32
ENGINE_ARGS = (
    "--enforce-eager",
    *("--block-size", str(BLOCK_TOKENS)),
    # A chunk bounds how long a step lasts, and with it how long memory takes to come back.
    *("--max-num-batched-tokens", "512"),
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
    """One model as both arms serve it."""

    name: str
    recipe: ModelRecipe
    model_path: Path
    max_model_len: int
    core: int
    """The only core that its processes run on: with a core each, engines share memory, which is measured, and no compute."""
    share_bytes: int
    """KV memory: all of it in the stock arm, the share that is the engine's own on demand in the Polder arm."""

    @property
    def blocks(self) -> int:
        """Blocks that fit the share."""
        return self.share_bytes // (BLOCK_TOKENS * self.recipe.kv_bytes_per_token)

    def arguments(self) -> tuple[str, ...]:
        return (*ENGINE_ARGS, "--dtype", self.recipe.dtype)

    def environment(self) -> dict[str, str]:
        return ENGINE_ENV | {"VLLM_CPU_OMP_THREADS_BIND": str(self.core)}


def fleet_toml(engines: Sequence[EnginePlan], port: int) -> str:
    """The fleet file whose budget is the sum of the engines' shares."""
    lines = [
        *("[server]", f"port = {port}", ""),
        *("[memory]", 'device = "cpu:0"', f'kv_budget = "{sum(e.share_bytes for e in engines)}B"', ""),
    ]
    for engine in engines:
        arguments = ", ".join(f'"{text}"' for text in engine.arguments())
        environment = ", ".join(f'{key} = "{value}"' for key, value in engine.environment().items())
        lines += [
            "[[model]]",
            f'name = "{engine.name}"',
            f'path = "{engine.model_path.resolve()}"',
            f"max_model_len = {engine.max_model_len}",
            f'share = "{engine.share_bytes}B"',
            f'cpus = "{engine.core}"',
            f"args = [{arguments}]",
            f"env = {{ {environment} }}",
            "",
        ]
    return "\n".join(lines)
