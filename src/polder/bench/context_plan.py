"""What a run of `polder bench context` consists of: the model, bytes, arms and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from polder.bench.harness.engines import BLOCK_TOKENS, EnginePlan
from polder.bench.harness.machine import two_cores
from polder.bench.workloads.models import ModelRecipe, ensure_model
from polder.window.regions import WindowShape

__all__ = [
    "ARMS",
    "ENGINE",
    "FULL_CONTEXT",
    "LINK_BYTES_PER_S",
    "OUTPUT_TOKENS",
    "QUICK_CONTEXT",
    "ContextPlan",
    "context_engine",
    "window_layers_of",
]

ENGINE = "long"
OUTPUT_TOKENS = 64
LINK_BYTES_PER_S = 1e9
"""Of the emulated link, for what is compared with the plan: a copy engine's copies take nobody's computing time."""
ARMS: tuple[str, ...] = (
    "enough",
    "stock",
    "window",
    "window-1",
    "window-3",
    "window-4",
    "window-link",
    "window-4-link",
)
"""`enough`: stock with memory for all lengths, which says what the tokens are. `window`: 2 layers local; "-link": over the link."""
MODEL = ModelRecipe(
    name="deep-llama", family="llama", layers=16, kv_heads=2, max_positions=16_384, seed=7
).in_float32()  # float32, so that tokens can be compared whatever the batch


@dataclass(frozen=True, kw_only=True)
class ContextPlan:
    """The local KV bytes are the same in all arms but `enough`."""

    name: str
    local_bytes: int
    page_bytes: int
    """Small, so that a small local memory has many units."""
    arms: tuple[str, ...]
    growth: float
    """From one length to the next."""
    samples: int
    """Pairs of requests at the longest context that stock holds."""
    batched_tokens: int = 512
    seed: int = 0

    @property
    def recipe(self) -> ModelRecipe:
        return MODEL

    @property
    def unit_blocks(self) -> int:
        return max(1, self.page_bytes // self._layer_block_bytes)

    @property
    def units(self) -> int:
        """Held by every arm but `enough`."""
        return self.local_bytes // (self.unit_blocks * self.recipe.layers * self._layer_block_bytes)

    @property
    def _layer_block_bytes(self) -> int:
        return BLOCK_TOKENS * self.recipe.kv_bytes_per_token // self.recipe.layers

    def shape(self, window_layers: int) -> WindowShape:
        return WindowShape(
            layers=self.recipe.layers, window_layers=window_layers, store_units=self.store_units(window_layers)
        )

    def store_units(self, window_layers: int) -> int:
        """As many as all units but one can carry."""
        return (self.units - 1) * (self.recipe.layers // window_layers)

    def longest(self, arm: str) -> int:
        """Tokens of the longest context that an arm can hold, prompt and output."""
        window_layers = window_layers_of(arm)
        if arm == "enough":
            return max(self.longest(other) for other in self.arms if other != "enough")
        units = self.units if window_layers is None else self.shape(window_layers).most(self.units)
        return min((units * self.unit_blocks - 1) * BLOCK_TOKENS, self.recipe.max_positions)

    def windowed_blocks(self, window_layers: int, tokens: int) -> int:
        """Of a context of `tokens`, alone: those that the regular units have no room for."""
        return self.shape(window_layers).windowed_blocks(-(-(tokens + 1) // BLOCK_TOKENS), self.units, self.unit_blocks)

    def lengths(self, arm: str) -> list[int]:
        """Growing contexts, the arm's longest at the end; prompt and output together."""
        found = [self.longest("stock") // 2]
        while found[-1] * self.growth < self.longest("enough"):
            found.append(int(found[-1] * self.growth))
        most = self.longest(arm)
        return sorted({*(length for length in found if length < most), most, min(most, self.longest("stock"))})

    def only(self, arms: Sequence[str]) -> ContextPlan:
        """The same with these arms alone, and `enough`, which all are compared with; none named: all of the plan's."""
        return replace(self, arms=tuple(a for a in ARMS if a in arms or a == "enough")) if arms else self


FULL_CONTEXT = ContextPlan(
    name="full",
    local_bytes=24 << 20,
    page_bytes=64 << 10,
    arms=ARMS,
    growth=1.6,
    samples=12,
)
QUICK_CONTEXT = ContextPlan(
    name="quick",
    local_bytes=16 << 20,
    page_bytes=64 << 10,
    arms=("enough", "stock", "window", "window-4", "window-link"),
    growth=2.0,
    samples=8,
)


def window_layers_of(arm: str) -> int | None:
    """ "window" -> 2, "window-4-link" -> 4; None for stock."""
    if not arm.startswith("window"):
        return None
    numbers = [part for part in arm.split("-") if part.isdigit()]
    return int(numbers[0]) if numbers else 2


def context_engine(arm: str, plan: ContextPlan, models_dir: Path) -> EnginePlan:
    """The engine as the arm serves it."""
    core, *more = dict.fromkeys(two_cores())
    unit_bytes = plan.local_bytes // plan.units
    engine = EnginePlan(
        name=ENGINE,
        recipe=plan.recipe,
        model_path=ensure_model(plan.recipe, models_dir),
        max_model_len=plan.longest(arm),
        core=core,
        more_cores=tuple(more),
        share_bytes=plan.local_bytes,
        batched_tokens=plan.batched_tokens,
        page_bytes=plan.page_bytes,
    )
    window_layers = window_layers_of(arm)
    if arm == "enough":
        blocks = -(-plan.longest(arm) // BLOCK_TOKENS) + 2
        return replace(engine, share_bytes=blocks * BLOCK_TOKENS * plan.recipe.kv_bytes_per_token)
    if window_layers is None:
        return engine
    link = {}
    if arm.endswith("-link"):  # a goal that is always kept makes the engine measure what the plan needs
        link = {"POLDER_LINKS": f"window={LINK_BYTES_PER_S / 1e9:g}GB/s", "POLDER_TBT_GOAL": "60s"}
    return replace(
        engine,
        window_bytes=plan.store_units(window_layers) * unit_bytes,
        window_layers=window_layers,
        extra_env=link,
    )
