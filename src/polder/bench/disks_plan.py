"""What a run of `polder bench disks` consists of: access sets, disks, layouts, and how much of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from polder.diskstore.model import PM9A3, DiskModel
from polder.errors import ConfigError

__all__ = [
    *("ARMS", "CO_ACTIVATED", "DISKS", "FULL_DISKS", "PAGE_BYTES", "QUICK_DISKS", "REAL_SETS", "SETS", "STAGES"),
    *("DisksPlan", "disks_of", "engine_of", "wall_engine_of"),
]

ARMS: tuple[str, ...] = (
    "sequential",
    "hash",
    "raid0",
    "cluster-per-disk",
    "no-cluster",
    "fixed-blocks",
    "swarm",
    "polder-pages",
    "polder",
)
"""polder.bench.sparse.arms says what each is. `swarm` is read by the paper's own schedule, the others by the exact one."""
STAGES: tuple[str, ...] = ("model", "shares", "wall", "live")
SETS: tuple[str, ...] = ("sticky", "sticky-64k", "groups", "pessimistic", "random", "mooncake", "weka")
REAL_SETS: tuple[str, ...] = ("mooncake", "weka")
CO_ACTIVATED = "sticky"
"""What is compared with the paper's figures: entries of 4 KiB, a tenth of them read by a step, clusters of about ten."""
DISKS: dict[str, tuple[float, ...]] = {
    "1": (1.0,),
    "2": (1.0,) * 2,
    "4": (1.0,) * 4,
    "8": (1.0,) * 8,
    "4-slow": (0.5, *(1.0,) * 3),
    "8-slow": (0.5, *(1.0,) * 7),
}
"""The speed of each disk."""
PAGE_BYTES = 64 << 10


@dataclass(frozen=True, kw_only=True)
class DisksPlan:
    name: str
    sets: tuple[str, ...]
    seeds: tuple[int, ...]
    """Of the synthetic sets: one instance each, their steps taken together. Conversations are what they are."""
    measured_steps: int
    """After those that the layouts know."""
    wall_steps: int
    """Of the first of these, really read."""
    wall_disks: tuple[str, ...]
    known_steps: int = 400
    """What clusters, placement and replicas are made from."""
    synthetic_blocks: int = 32768
    """Of 4 KiB; of `sticky-64k` an eighth, of 64 KiB."""
    replica_share: float = 0.10
    host_s_per_request: float = 5e-6
    """What the host needs for a request: 4 to 11 us were measured. For `io_time_with_host_s` alone."""
    wall_bytes_per_s: float = 100e6
    """Of all emulated disks together, were none of them slow: looking 3,300 entries up and summing them takes the host 4 ms."""
    stages: tuple[str, ...] = STAGES
    arms: tuple[str, ...] = ARMS
    wall_arms: tuple[str, ...] = ("hash", "fixed-blocks", "polder-pages", "polder")

    def only(self, *, stages: Sequence[str] = (), arms: Sequence[str] = ()) -> DisksPlan:
        """The same with these stages and arms alone; none named: all of the plan's.

        The wall stage stays only with some of its arms, the live stage, whose arms are its own, only where it is named. Raises
        ConfigError for a wall stage that is named and cannot stay.
        """
        plan = replace(self, stages=tuple(s for s in STAGES if s in stages)) if stages else self
        if not arms:
            return plan
        wall_arms = tuple(arm for arm in plan.wall_arms if arm in arms)
        if "wall" in stages and not wall_arms:
            of_stage = ", ".join(plan.wall_arms)
            raise ConfigError(f"stage wall has nothing to run of {', '.join(arms)}: name some of {of_stage}")
        return replace(
            plan,
            stages=tuple(s for s in plan.stages if (wall_arms or s != "wall") and (s in stages or s != "live")),
            arms=tuple(arm for arm in ARMS if arm in arms),
            wall_arms=wall_arms,
        )

    def wall_model(self, disks: str) -> DiskModel:
        """The modelled disk, slowed in bytes and requests alike, so that the real reads are never what takes the time."""
        return PM9A3.slowed(self.wall_bytes_per_s / len(DISKS[disks]) / PM9A3.bytes_per_s)


FULL_DISKS = DisksPlan(
    name="full",
    sets=SETS,
    seeds=(5, 6, 7),
    measured_steps=120,
    wall_steps=30,
    wall_disks=("4", "4-slow", "8", "8-slow"),
)
QUICK_DISKS = DisksPlan(
    name="quick",
    sets=tuple(name for name in SETS if name != "groups"),
    seeds=(5,),
    measured_steps=40,
    wall_steps=10,
    wall_disks=("4", "4-slow"),
)


def disks_of(name: str, model: DiskModel = PM9A3) -> list[DiskModel]:
    """ "4-slow" -> four disks, the first at half speed."""
    return [model if speed == 1 else model.slowed(speed) for speed in DISKS[name]]


def engine_of(access_set: str, disks: str) -> str:
    """Under which name the result has the figures of a set on these disks."""
    return f"{access_set}-{disks}"


def wall_engine_of(access_set: str, disks: str) -> str:
    return f"wall-{engine_of(access_set, disks)}"
