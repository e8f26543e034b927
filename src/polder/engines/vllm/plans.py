"""What crosses between an engine's core and its workers: plans one way, answers the other. Plain data without vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["DiskPlan", "SparsePlan", "Taken", "TierPlan", "WeightsFound", "WindowPlan", "WorkerPlan"]


# ---------------------------------------------------------------- from the core


@dataclass(frozen=True, kw_only=True)
class DiskPlan:
    """What the workers must know of their disks."""

    disks: tuple[tuple[str, int], ...]
    """Directory and limit in bytes, for all ranks together."""
    page_bytes: int
    namespace: str
    ranks: int
    staged_pages: int
    io: str


@dataclass(frozen=True, kw_only=True)
class TierPlan:
    """What the workers must know of the tiers."""

    tiers: tuple[str, ...]
    """Names, from the fastest to the slowest."""
    capacities: tuple[int, ...]
    """Slots of each; the workers' stores say how many the disk has."""
    shard_bytes: int
    """Bytes of one block on one rank. A slot has as many there."""
    host_pages: tuple[tuple[int, ...], ...]
    """Per rank."""
    number: int
    """Process id of this engine's core, by which lenders know it."""
    namespace: int
    disk: DiskPlan | None


@dataclass(frozen=True, kw_only=True)
class WindowPlan:
    """What the workers must know of the window."""

    window_layers: int
    layers: tuple[tuple[str, int], ...]
    """vLLM's name of each attention layer and where its block 0 begins in the KV buffer, in the order of execution."""
    block_bytes: int
    """Bytes of a block in one layer."""
    block_tokens: int
    first_block: int
    """The lowest windowed block."""
    blocks: int
    host_pages: tuple[tuple[int, ...], ...]
    """Pages of the store, per rank."""


@dataclass(frozen=True, kw_only=True)
class SparsePlan:
    """What the workers must know of prefixes of which requests read a part."""

    disks: tuple[tuple[str, int], ...]
    """Directory and limit in bytes, for all ranks together. None: units lie in host memory."""
    ranks: int


@dataclass(frozen=True, kw_only=True)
class WorkerPlan:
    """What the core agreed with the broker before the workers allocate. One for all ranks."""

    broker: Path
    engine: str
    generation: int
    page_bytes: int
    units: tuple[int, ...]
    pages: tuple[tuple[int, ...], ...]
    """Pages of these units, per rank."""
    unit_blocks: int
    links: str = ""
    faults: str = ""
    """POLDER_LINKS and POLDER_FAULTS: what the workers emulate."""
    tiers: TierPlan | None = None
    window: WindowPlan | None = None
    sparse: SparsePlan | None = None
    """None: all requests read all of their prefix."""


# ---------------------------------------------------------------- from a worker


@dataclass(frozen=True, kw_only=True)
class WeightsFound:
    """What a rank's decoder layers have that can move."""

    layers: int
    layer_pages: int
    moved_bytes: int
    resident_bytes: int
    """Bytes of tensors that cannot move."""
    copy_share: float
    """See planner.rotation_cost.pass_seconds."""
    streams: bool = True
    """Whether it can serve with fewer segments than layers."""


@dataclass(frozen=True, kw_only=True)
class Taken:
    """Segments that a worker gave up, and the pages of each on this rank. `error` is not empty when nothing was
    taken."""

    segments: tuple[tuple[int, ...], ...] = ()
    error: str = ""
