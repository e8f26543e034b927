"""What the layouts of an access set (polder.bench.sparse.arms) take on modelled disks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np

from polder.bench.report.metrics import Metrics
from polder.bench.sparse.arms import ARMS, GREEDY, PARTS, ArmConfig, Layout
from polder.bench.sparse.modelled import Modelled, run_steps
from polder.bench.stages.access_sets import AccessSet
from polder.diskstore.model import DiskModel, page_speeds
from polder.diskstore.schedule import exact, greedy

__all__ = ["REPLICA_SHARE", "Layouts", "describe_sets", "layout_of"]

REPLICA_SHARE = 0.10
"""Of the pages, that have a second copy."""
LEAST_GAIN = 1.02
"""Below it there is nothing to have a share of."""


class Layouts:
    """Those of several instances of an access set on some disks. What they have in common is made once."""

    def __init__(self, sets: Sequence[AccessSet], disks: Sequence[DiskModel]) -> None:
        self._disks, self._found = disks, dict[str, Metrics]()
        self._configs = [(_config(of, disks), of) for of in sets]

    def metrics(self, arm: str) -> Metrics:
        """Figures of a layout over the measured steps of all instances."""
        if arm not in self._found:
            choose, layouts = (
                greedy if arm in GREEDY else exact,
                [(ARMS[arm](config), of) for config, of in self._configs],
            )
            runs = [
                run_steps(layout, of.measured, self._disks, block_bytes=of.known.block_bytes, choose=choose)
                for layout, of in layouts
            ]
            together = Modelled(*(np.concatenate(column) for column in zip(*runs, strict=True)))
            stored = sum(layout.stored_bytes for layout, _ in layouts) / len(layouts)
            self._found[arm] = {**together.figures(), "stored_bytes": stored}
        return self._found[arm]

    def parts(self) -> dict[str, Metrics]:
        """What each part of polder adds to the ones before it: how many times shorter it makes a step, and its share of
        the gain, which is the logarithm of the part's factor over that of the whole gain. Keys: "stage-" and the part's
        name."""
        seconds = {part: cast("float", self.metrics(arm)["io_time_s"]) for part, arm in PARTS.items()}
        factors = {part: seconds[before] / seconds[part] for before, part in pairwise(seconds)}
        gain = math.prod(factors.values())
        shares = {part: math.log(of) / math.log(gain) for part, of in factors.items()} if gain >= LEAST_GAIN else {}
        found: dict[str, Metrics] = {f"stage-{part}": {"io_time_s": taken} for part, taken in seconds.items()}
        found["stage-parts"] |= {
            "gain": gain,
            **{f"{part}_factor": factor for part, factor in factors.items()},
            **{f"{part}_share": share for part, share in shares.items()},
        }
        return found


def layout_of(of: AccessSet, arm: str, disks: Sequence[DiskModel]) -> Layout:
    """The layout of this name, made from the known steps."""
    return ARMS[arm](_config(of, disks))


def _config(of: AccessSet, disks: Sequence[DiskModel]) -> ArmConfig:
    copied = REPLICA_SHARE if len(disks) > 1 else 0.0  # one disk has nowhere to put a second copy
    return ArmConfig(known=of.known, speeds=page_speeds(disks, of.known.page_bytes), replica_share=copied)


def describe_sets(sets: Sequence[AccessSet]) -> dict[str, Any]:
    """Sizes of the instances of an access set, for the conditions of a result."""
    pairs = [(of.known.profile, of.measured) for of in sets]
    read_before = [(known.counts()[measured.items] > 0).mean() for known, measured in pairs]
    return {
        "blocks": [known.size for known, _ in pairs],
        "known_steps": [known.steps for known, _ in pairs],
        "measured_steps": [measured.steps for _, measured in pairs],
        "reads_a_step": round(float(np.mean([np.diff(measured.starts).mean() for _, measured in pairs])), 1),
        # What was never read before is where it was put when it was written.
        "measured_reads_of_blocks_read_before": round(float(np.mean(read_before)), 3),
    }
