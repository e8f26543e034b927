"""The JSON shape of every Polder bench.

{"bench": "elastic",
 "conditions": {...},                                     what was run, where, with what; also "intervals" and "runs"
 "arms": {arm: {engine or "all": {metric: value}}},
 "ratios": {"ARM/BASELINE:ENGINE.METRIC": value},         the arm's metric over the baseline's
 "checks": {name: bool}}
"""

from __future__ import annotations

import math
import os
import re
from pathlib import Path
from typing import Any

import msgspec

from polder.bench.report.metrics import Interval, Metric

__all__ = ["Arms", "BenchResult", "ratios_over", "read_result", "write_result"]

Arms = dict[str, dict[str, dict[str, Metric]]]
"""arm -> engine or "all" -> metric -> value. A metric that is a distribution (e.g. by tier) is a dict of numbers."""

_FIGURE = re.compile(r"(?P<arm>[^/:]+)(/(?P<baseline>[^/:]+))?:(?P<engine>.+)\.(?P<metric>\w+)")


class BenchResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The result of one bench. Metrics that have no value on this machine are left out, never null or NaN."""

    bench: str
    conditions: dict[str, Any]
    arms: Arms
    ratios: dict[str, float]
    checks: dict[str, bool]

    def __post_init__(self) -> None:
        """Raises ValueError when a ratio is not the quotient of the two metrics that its name says."""
        for key, value in self.ratios.items():
            expected = self.figure(key)
            if "/" not in key or expected is None or not math.isclose(value, expected, rel_tol=1e-9):
                raise ValueError(f"ratio {key!r} is {value}, the metrics in arms give {expected}")

    def figure(self, key: str) -> float | None:
        """The number that "ARM:ENGINE.METRIC" names, or the quotient "ARM/BASELINE:ENGINE.METRIC".

        None when it was not measured, is a distribution, or would be divided by 0. Raises ValueError on another key.
        """
        match = _FIGURE.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} is neither ARM:ENGINE.METRIC nor ARM/BASELINE:ENGINE.METRIC")
        arm, baseline, engine, metric = match.group("arm", "baseline", "engine", "metric")
        over = self.arms.get(arm, {}).get(engine, {}).get(metric)
        under = self.arms.get(baseline, {}).get(engine, {}).get(metric) if baseline else 1.0
        if over is None or isinstance(over, dict) or not under or isinstance(under, dict):
            return None
        return over / under

    def interval(self, key: str) -> Interval | None:
        """The 95 % interval of a ratio: (low, high)."""
        found = self.conditions.get("intervals", {}).get(key)
        return (found[0], found[1]) if found else None


def ratios_over(arms: Arms, *, arm: str, baseline: str) -> dict[str, float]:
    """Ratios of every number that both arms have and that is not 0 in the baseline."""
    return {
        f"{arm}/{baseline}:{engine}.{metric}": over / under
        for engine in sorted(arms[arm].keys() & arms[baseline].keys())
        for metric, over in sorted(arms[arm][engine].items())
        if not isinstance(over, dict)
        and not isinstance(under := arms[baseline][engine].get(metric, 0.0), dict)
        and under
    }


def write_result(result: BenchResult, path: Path) -> None:
    """Writes the whole file or nothing."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=2) + b"\n")
    os.replace(draft, path)


def read_result(path: Path) -> BenchResult:
    """Raises msgspec.ValidationError when the file has another shape."""
    return msgspec.json.decode(path.read_bytes(), type=BenchResult)
