"""What a run of `polder bench elastic` consists of, by size."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from polder.bench.workloads.models import MODEL_A

__all__ = ["BUDGET_BYTES", "BUDGET_WHY", "DEMO", "FULL", "QUICK", "USERS", "BenchPlan", "Stage"]

Stage = Literal["main", "resize", "tax", "equality"]

USERS = 16
BUDGET_BYTES = 320 << 20
BUDGET_WHY = (
    f"{BUDGET_BYTES // MODEL_A.kv_bytes_per_token:,} tokens' worth of engine A's KV (8 KiB each): just above the 40,162 "
    "tokens that the contexts of its 16 users reach at the end of their sessions, so the whole of the budget holds A's hot "
    "set and half of it does not; 160 pages of 2 MiB, so halves, units and blocks come out whole and both arms have the "
    "same bytes to the block"
)


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """Sizes of the stages. `order` is a string of A (stock) and B (Polder): the main runs in time."""

    name: str
    sessions: int
    """Sessions of tiny-agent-v1 that engine A is measured on, 16 requests each."""
    order: str
    stages: tuple[Stage, ...]
    tax_rounds: int
    """Times that every block of engine B's trace is played on both arms in the tax stage; a pair is a block."""
    resize_stream_tokens: int = 500
    """Length of the decodes under which engine A is resized; about 20 ms a token."""
    seed: int = 0
    """Of the prompts of the equality stage; traces are fixed."""

    def ordered(self, order: str) -> BenchPlan:
        return replace(self, order=order)


FULL = BenchPlan(
    name="full",
    sessions=32,
    order="ABBA",
    stages=("main", "resize", "tax", "equality"),
    tax_rounds=8,
    resize_stream_tokens=2000,
)
QUICK = BenchPlan(name="quick", sessions=16, order="ABBA", stages=("main", "resize", "tax", "equality"), tax_rounds=3)
DEMO = BenchPlan(name="demo", sessions=16, order="AB", stages=("main", "resize", "equality"), tax_rounds=0)
