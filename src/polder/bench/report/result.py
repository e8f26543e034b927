"""The one JSON shape of all Polder benches.

{"bench": "elastic",
 "conditions": {...},                                     what was run, where, with what
 "arms": {arm: {engine or "all": {metric: value}}},
 "ratios": {"ARM/BASELINE:ENGINE.METRIC": value},         always the arm's metric over the baseline's
 "checks": {name: bool}}
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from polder.bench.report.metrics import Metric

__all__ = ["Arms", "BenchResult", "ratios_over", "read_result", "write_result"]

Arms = dict[str, dict[str, dict[str, Metric]]]
"""arm -> engine or "all" -> metric -> value. A metric that is a distribution (e.g. by tier) is a dict of numbers."""

_RATIO_KEY = re.compile(r"(?P<arm>[^/:]+)/(?P<baseline>[^/:]+):(?P<engine>[^.]+)\.(?P<metric>\w+)")


class BenchResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Result of one bench. Metrics that have no value on this machine are left out, never null or NaN."""

    bench: str
    conditions: dict[str, Any]
    arms: Arms
    ratios: dict[str, float]
    checks: dict[str, bool]

    def __post_init__(self) -> None:
        """Raises ValueError when a ratio names what is not in `arms`, or is not what its name says."""
        for key, value in self.ratios.items():
            match = _RATIO_KEY.fullmatch(key)
            if match is None:
                raise ValueError(f"ratio {key!r} is not ARM/BASELINE:ENGINE.METRIC")
            arm, baseline, engine, metric = match.group("arm", "baseline", "engine", "metric")
            try:
                over, under = self.arms[arm][engine][metric], self.arms[baseline][engine][metric]
            except KeyError as error:
                raise ValueError(f"ratio {key!r} names {error}, which is not in arms") from error
            if isinstance(over, dict) or isinstance(under, dict):
                raise ValueError(f"ratio {key!r} is of a distribution")
            if not math.isclose(value, over / under, rel_tol=1e-9):
                raise ValueError(f"ratio {key!r} is {value}, the metrics give {over / under}")


def without_nan(metrics: Mapping[str, Metric]) -> dict[str, Metric]:
    """JSON has no NaN: what could not be measured is left out."""
    return {name: value for name, value in metrics.items() if isinstance(value, dict) or math.isfinite(value)}


def ratios_over(arms: Arms, *, arm: str, baseline: str) -> dict[str, float]:
    """Ratios of every number that both arms have and that is not 0 in the baseline."""
    ratios: dict[str, float] = {}
    for engine in arms[arm].keys() & arms[baseline].keys():
        over, under = arms[arm][engine], arms[baseline][engine]
        for metric in over.keys() & under.keys():
            a, b = over[metric], under[metric]
            if not isinstance(a, dict) and not isinstance(b, dict) and b:
                ratios[f"{arm}/{baseline}:{engine}.{metric}"] = a / b
    return dict(sorted(ratios.items()))


def write_result(result: BenchResult, path: Path) -> None:
    """Writes it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    os.replace(draft, path)


def read_result(path: Path) -> BenchResult:
    """Raises msgspec.ValidationError when it has another shape."""
    return msgspec.json.decode(path.read_bytes(), type=BenchResult)
