"""The engines of `polder bench turns` and the arms they are started in."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from polder.bench.harness.arms import Arm, PolderArm, StockArm
from polder.bench.harness.driver import play
from polder.bench.harness.engines import EnginePlan
from polder.bench.harness.machine import two_cores
from polder.bench.harness.pool import ArmPool
from polder.bench.turns_plan import USERS, Links, TurnsBytes, engines_of
from polder.bench.workloads.agents import bursts, warm_up
from polder.bench.workloads.models import ModelRecipe, ensure_model

__all__ = ["ArmSetup", "arm_pool", "turns_engines", "warm"]

BATCHED_TOKENS = 1024
WARM_UP_TIME_SCALE = 0.1


@dataclass(frozen=True, kw_only=True)
class ArmSetup:
    """What all arms of a pool have in common."""

    engines: Sequence[EnginePlan]
    sizes: TurnsBytes
    links: Links
    log_dir: Path
    runtime_dir: Path
    """Short, private, gone after the bench: the brokers' sockets."""
    suffix: str = ""
    """Of the arms' names."""


def turns_engines(
    recipes: Mapping[str, ModelRecipe], max_model_len: Mapping[str, int], sizes: TurnsBytes, models_dir: Path
) -> list[EnginePlan]:
    """Engines A and B as all arms have them. Builds their models where they are missing."""
    pools = {"A": sizes.pool_a, "B": sizes.pool_b}
    return [
        EnginePlan(
            name=name,
            recipe=recipe,
            model_path=ensure_model(recipe, models_dir),
            max_model_len=max_model_len[name],
            core=core,
            share_bytes=pools[name],
            batched_tokens=BATCHED_TOKENS,
        )
        for (name, recipe), core in zip(recipes.items(), two_cores(), strict=True)
    ]


@contextlib.contextmanager
def arm_pool(
    setup: ArmSetup, *, at_most: int, prepare: Callable[[Arm], None], say: Callable[[str], None]
) -> Iterator[ArmPool]:
    """Arms by their names in turns_plan.ARMS, `at_most` up at a time; whatever happens, nothing of them is left."""

    def make(name: str) -> Arm:
        say(f"starting {name}{setup.suffix}")
        engines = engines_of(name, setup.engines, setup.sizes, setup.links)
        if name in ("stock", "native"):
            return StockArm(engines, setup.log_dir, name=name + setup.suffix)
        return PolderArm(engines, setup.log_dir, setup.runtime_dir, name=name + setup.suffix)

    pool = ArmPool(make, prepare, at_most=at_most)
    try:
        yield pool
    finally:
        pool.close()


def warm(arm: Arm) -> None:
    """Touches all memory and runs all code of both engines once: neither is to fall on the first run of an arm."""
    warm_a, warm_b = warm_up(model="A", users=USERS), bursts(model="B", time_scale=WARM_UP_TIME_SCALE)
    asyncio.run(play({"A": (arm.endpoint, warm_a), "B": (arm.endpoint, warm_b)}))
