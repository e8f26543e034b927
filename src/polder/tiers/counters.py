"""What the tiers have done: counters for Prometheus and `polder top`, and one line that says whether the tiers pay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from polder.tiers.jobs import Direction
from polder.units import format_bytes

__all__ = ["TierCounters", "verdict"]


@dataclass(kw_only=True)
class _Tier:
    hit_tokens: int = 0
    loaded_bytes: int = 0
    load_seconds: float = 0.0
    stored_bytes: int = 0
    store_seconds: float = 0.0
    lost_loads: int = 0
    corrupt_blocks: int = 0
    failed_blocks: int = 0


@dataclass
class TierCounters:
    """Counters since the start. "Blocks" are blocks of the engine; "seconds" of a tier are those that its thread was
    busy."""

    names: Sequence[str]
    asked_tokens: int = 0
    refused_loads: int = 0
    refused_tokens: int = 0
    late_loads: int = 0
    late_tokens: int = 0
    early_loads: int = 0
    failed_loads: int = 0
    lost_blocks: int = 0
    stored_blocks: int = 0
    unwritten_blocks: int = 0
    unread_bytes: int = 0
    saved_prefill_seconds: float = 0.0
    load_wait_seconds: float = 0.0

    def __post_init__(self) -> None:
        self.tiers = [_Tier() for _ in self.names]

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

    def stats(self) -> dict[str, float]:
        """All counters by the names in polder/metrics.py."""
        stats = {
            f"tier_{key}_total": float(value) for key, value in vars(self).items() if key not in ("names", "tiers")
        }
        for name, tier in zip(self.names, self.tiers, strict=True):
            stats |= {f"tier_{name}_{key}_total": float(value) for key, value in vars(tier).items()}
        return stats


def verdict(stats: Mapping[str, float]) -> str:
    """One line made from `stats`, "" without tiers: "tiers saved 812 s of prefill, cost 3.1 s of copies, 12 GiB written
    never read"."""
    if "tier_saved_prefill_seconds_total" not in stats:
        return ""
    copies = sum(
        value for name, value in stats.items() if name.endswith(("_load_seconds_total", "_store_seconds_total"))
    )
    parts = [
        f"tiers saved {stats['tier_saved_prefill_seconds_total']:.3g} s of prefill",
        f"cost {copies:.3g} s of copies",
        f"{format_bytes(int(stats['tier_unread_bytes_total']))} written never read",
    ]
    if stats["tier_refused_loads_total"]:
        parts.append(f"{stats['tier_refused_loads_total']:.0f} loads refused as slower than recomputing")
    if not stats["tier_writing_pays"]:
        parts.append("nothing is written now: too little comes back")
    return ", ".join(parts)
