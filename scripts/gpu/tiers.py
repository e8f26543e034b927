"""Prompts that a cache had no room for: their KV comes back from host memory, against computing it again."""

from __future__ import annotations

import sys
import time

from engine import Engine, broker_for, prompts, running, sizes_of
from stage import Stage, main


def stage(stage: Stage) -> None:
    sizes = sizes_of(stage)
    unit = sizes.small_unit_bytes
    _one(stage, "small", 900, sizes.tier_units * unit, 64 * unit)
    if stage.device == "cuda" and not stage.tiny:
        token_bytes = 128 << 10
        for length in (2048, 8192, 32_000):
            longest = length + 2048
            _one(stage, "large", length, 2 * longest * token_bytes, 8 * longest * token_bytes, max_model_len=longest)


def _one(stage: Stage, model: str, length: int, kv_bytes: int, host_bytes: int, **options: int) -> None:
    """The cache has room for two of the six prompts, the tier for all."""
    asked = prompts(6, length, seed=length)
    size = {"POLDER_KV_FLOOR": f"{kv_bytes}B", "POLDER_KV_SHARE": f"{kv_bytes}B", "POLDER_KV_CEILING": f"{kv_bytes}B"}
    with broker_for(stage, kv_bytes, host_bytes) as broker:
        settings = broker.settings("a", POLDER_TIERS="host", POLDER_HOST=f"{host_bytes}B", **size)
        with running(stage, model, settings, **options) as engine:
            engine.ask([asked[0][:64]], 2)
            first = [engine.ask([prompt], 8)[0] for prompt in asked]
            cold = min(engine.first_token_s(prompt) for prompt in prompts(2, length, seed=length + 1))
            _fill(engine, asked)
            begin = time.perf_counter()
            again = engine.ask([asked[0]], 8)[0]
            stage.note(f"{model}, {length} tokens: answer from the tier", time.perf_counter() - begin, "s")
            stage.note(f"{model}, {length} tokens: first token, computed", cold, "s")
            _fill(engine, asked[1:])
            stage.note(f"{model}, {length} tokens: first token, from the tier", engine.first_token_s(asked[1]), "s")
            equal = again.tokens == first[0].tokens
            if model == "small":
                stage.check(f"{model}, {length} tokens: the same tokens", holds=equal)
            else:
                stage.note(f"{model}, {length} tokens: the same tokens", equal)
            found = engine.figures()
            stage.note(f"{model}, {length} tokens: tokens from the host", found["tier_host_hit_tokens_total"])
            stage.note(f"{model}, {length} tokens: loads that failed", found["tier_failed_loads_total"])
            stage.note(
                f"{model}, {length} tokens: load rate", found.get("tier_host_load_bytes_per_second", 0.0) / 1e9, "GB/s"
            )


def _fill(engine: Engine, asked: list[list[int]]) -> None:
    """Others go through the cache, until it has forgotten the first."""
    for prompt in asked[1:]:
        engine.ask([prompt], 2)


if __name__ == "__main__":
    sys.exit(main("tiers", stage))
