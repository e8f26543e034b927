"""The engines of `polder bench tenants` and the arms they are started in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from polder.bench.harness.arms import Arm, PolderArm, StockArm
from polder.bench.harness.driver import play
from polder.bench.harness.engines import EnginePlan
from polder.bench.harness.machine import two_cores
from polder.bench.harness.pool import ArmPool
from polder.bench.tenants_plan import KV_SHARE_BYTES, engines_of
from polder.bench.workloads.models import ModelRecipe, ensure_model
from polder.bench.workloads.tenants import warm_up
from polder.bench.workloads.tenants_models import weights_bytes

__all__ = ["arm_pool", "tenants_engines", "warm"]

BATCHED_TOKENS = 2048
"""What `vllm serve` takes on its own."""


def tenants_engines(recipes: Mapping[str, ModelRecipe], *, max_model_len: int, models_dir: Path) -> list[EnginePlan]:
    """The engines as all arms have them: all compute on one core, as on one device, and have the other for the rest of their
    processes. Builds their models where they are missing."""
    core, *more = dict.fromkeys(two_cores())
    return [
        EnginePlan(
            name=name,
            recipe=recipe,
            model_path=ensure_model(recipe, models_dir),
            max_model_len=max_model_len,
            core=core,
            more_cores=tuple(more),
            share_bytes=KV_SHARE_BYTES,
            weights_bytes=weights_bytes(recipe),
            batched_tokens=BATCHED_TOKENS,
        )
        for name, recipe in recipes.items()
    ]


@contextlib.contextmanager
def arm_pool(
    engines: list[EnginePlan],
    *,
    log_dir: Path,
    runtime_dir: Path,
    prepare: Callable[[Arm], None],
    say: Callable[[str], None],
    at_most: int,
    suffix: str = "",
) -> Iterator[ArmPool]:
    """Arms of these engines, `at_most` up at a time; whatever happens, nothing of them is left. `suffix`: of the arms' names."""

    def make(name: str) -> Arm:
        say(f"starting {name}{suffix}")
        served = engines_of(name, engines)
        if name in ("stock", "stock-short"):
            return StockArm(served, log_dir, name=name + suffix)
        return PolderArm(served, log_dir, runtime_dir, name=name + suffix)

    pool = ArmPool(make, prepare, at_most=at_most)
    try:
        yield pool
    finally:
        pool.close()


def warm(arm: Arm) -> None:
    """Touches all memory and runs all code of all engines once, one engine after the other."""
    for engine in arm.engines:
        asyncio.run(play({engine.name: (arm.endpoint, warm_up(engine.name, seed=0))}))
