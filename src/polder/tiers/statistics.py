"""What the tiers did, for Prometheus, `polder top`, and the verdict: whether they pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polder.arrays import IntArray
from polder.tiers.transfer import Direction
from polder.units import format_bytes

__all__ = ["TierStatistics", "verdict"]


@dataclass(kw_only=True)
class _Tier:
    name: str
    hit_tokens: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    stored_bytes: int = 0
    store_seconds: float = 0.0
    lost_loads: int = 0
    corrupt_blocks: int = 0
    failed_blocks: int = 0


class TierStatistics:
    """Counters since the start. "Blocks" are blocks of the engine; "seconds" of a link are those that its lane was busy."""

    def __init__(self, names: Sequence[str]) -> None:
        self.tiers = [_Tier(name=name) for name in names]
        self.asked_tokens = 0
        self.refused_loads = self.refused_tokens = 0
        self.late_loads = self.late_tokens = 0
        self.early_loads = 0
        self.failed_loads = 0
        self.lost_blocks = self.unwritten_blocks = self.unread_blocks = 0
        self.stored_blocks = 0
        self.saved_prefill_seconds = self.load_wait_seconds = 0.0

    def moved(self, tier: int, direction: Direction, size_bytes: int, seconds: float) -> None:
        mine = self.tiers[tier]
        if direction == "load":
            mine.loaded_bytes += size_bytes
            mine.load_seconds += seconds
        else:
            mine.stored_bytes += size_bytes
            mine.store_seconds += seconds

    def failed(self, tier: int, direction: Direction, reason: str) -> None:
        mine = self.tiers[tier]
        if reason == "corrupt":
            mine.corrupt_blocks += 1
        elif reason == "lost":
            mine.lost_loads += direction == "load"
        else:
            mine.failed_blocks += 1

    def stored(self, tiers: IntArray, slot_bytes: int) -> None:
        self.stored_blocks += len(tiers)

    def figures(self, block_bytes: int) -> dict[str, float]:
        """Flat names, one number each; counters end in "_total"."""
        figures: dict[str, float] = {
            "tier_asked_tokens_total": self.asked_tokens,
            "tier_refused_loads_total": self.refused_loads,
            "tier_refused_tokens_total": self.refused_tokens,
            "tier_late_loads_total": self.late_loads,
            "tier_late_tokens_total": self.late_tokens,
            "tier_early_loads_total": self.early_loads,
            "tier_failed_loads_total": self.failed_loads,
            "tier_lost_blocks_total": self.lost_blocks,
            "tier_stored_blocks_total": self.stored_blocks,
            "tier_unwritten_blocks_total": self.unwritten_blocks,
            "tier_unread_bytes_total": self.unread_blocks * block_bytes,
            "tier_saved_prefill_seconds_total": self.saved_prefill_seconds,
            "tier_load_wait_seconds_total": self.load_wait_seconds,
        }
        for tier in self.tiers:
            for name in tier.__dataclass_fields__:
                if name != "name":
                    figures[f"tier_{tier.name}_{name}_total"] = getattr(tier, name)
        return {name: float(value) for name, value in figures.items()}


def verdict(figures: Mapping[str, float]) -> str:
    """One line from `figures`: "tiers saved 812 s of prefill, cost 3.1 s of copies, 12 GiB written never read"; "" without
    tiers."""
    if "tier_saved_prefill_seconds_total" not in figures:
        return ""
    copies = sum(
        value for name, value in figures.items() if name.endswith(("_load_seconds_total", "_store_seconds_total"))
    )
    parts = [
        f"tiers saved {figures['tier_saved_prefill_seconds_total']:.3g} s of prefill",
        f"cost {copies:.3g} s of copies",
        f"{format_bytes(int(figures['tier_unread_bytes_total']))} written never read",
    ]
    if figures["tier_refused_loads_total"]:
        parts.append(f"{figures['tier_refused_loads_total']:.0f} loads refused as slower than recomputing")
    if not figures["tier_writing_pays"]:
        parts.append("nothing is written now: too little comes back")
    return ", ".join(parts)
