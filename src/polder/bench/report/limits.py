"""Checks as data: a limit names a figure of the result, a relation and a bound.

A figure is a key as in the result ("ARM:ENGINE.METRIC", or "ARM/BASELINE:ENGINE.METRIC" for a quotient), or one of the
functions below, which make one figure of several. A check passes when all of its limits hold. A check is left out when
the first of its figures was not measured, because then its stage was not run; a later figure that is missing fails it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, cast

from polder.bench.report.metrics import Interval
from polder.bench.report.result import BenchResult

__all__ = [
    *("Check", "Figure", "Limit", "Relation", "Source", "Verdict", "check", "combined", "failed_requests"),
    *("first_of", "highest", "judge", "none_different", "total", "within_one_percent"),
]

Relation = Literal["<", "<=", "==", ">=", ">"]
_RELATIONS = {"<": operator.lt, "<=": operator.le, "==": operator.eq, ">=": operator.ge, ">": operator.gt}


class Figure(NamedTuple):
    value: float
    label: str
    interval: Interval | None = None


Source = str | Callable[[BenchResult], Figure | None]


class Limit(NamedTuple):
    figure: Source
    relation: Relation
    bound: float
    why: str = ""
    end: Literal["value", "low", "high"] = "value"
    """What is compared with the bound: the figure, or one end of its 95 % interval."""

    def judge(self, result: BenchResult) -> tuple[bool, str] | None:
        """(holds, the figure with its bound); None when the figure or its interval is missing."""
        found = _figure(self.figure, result)
        if found is None or (self.end != "value" and found.interval is None):
            return None
        low, high = found.interval or (found.value, found.value)
        compared = {"value": found.value, "low": low, "high": high}[self.end]
        interval = f"95 % interval {low:.3f} to {high:.3f}; " if found.interval else ""
        end = "" if self.end == "value" else f"{self.end} end "
        text = f"{found.label} {found.value:.4g} ({interval}{end}{self.relation} {self.bound:g}"
        return bool(_RELATIONS[self.relation](compared, self.bound)), f"{text}{'; ' if self.why else ''}{self.why})"


class Check(NamedTuple):
    name: str
    """As in the files that are already written."""
    limits: tuple[Limit, ...]


class Verdict(NamedTuple):
    """One line of the report."""

    name: str
    passed: bool
    detail: str


def check(name: str, *limits: Limit | str) -> Check:
    """`limits`: "polder/stock:A.ttft_p99_ms <= 0.31" is short for Limit("polder/stock:A.ttft_p99_ms", "<=", 0.31)."""

    def parsed(text: str) -> Limit:
        figure, relation, bound = text.split()
        return Limit(figure, cast("Relation", relation), float(bound))

    return Check(name, tuple(parsed(limit) if isinstance(limit, str) else limit for limit in limits))


def judge(checks: Iterable[Check], result: BenchResult) -> list[Verdict]:
    """Verdicts of the checks whose first figure was measured."""
    verdicts = []
    for name, limits in checks:
        found = [limit.judge(result) for limit in limits]
        if found[0] is not None:
            details = ", ".join(one[1] if one else "one figure is missing" for one in found)
            verdicts.append(Verdict(name, all(one is not None and one[0] for one in found), details))
    return verdicts


def none_different(name: str, arm: str, *happened: str) -> Check:
    """No answer of `arm` differs from stock's, none failed, some were compared, and what had to happen meanwhile did happen."""
    some = (f"{arm}:all.{metric} > 0" for metric in ("answers_compared", *happened))
    return check(name, f"{arm}:all.answers_different == 0", f"{arm}:all.failed_requests == 0", *some)


def within_one_percent(name: str, arm: str, baseline: str, engine: str) -> Check:
    """The whole 95 % intervals of a tax stage lie within 1 % of the baseline, on the side that costs."""
    pair = f"{arm}/{baseline}:{engine}."
    ttft = Limit(f"{pair}ttft_p50_ms", "<=", 1.01, end="high")
    return check(name, ttft, Limit(f"{pair}busy_output_tokens_per_s", ">=", 0.99, end="low"))


def failed_requests() -> Check:
    """No request failed in any arm."""
    return check("no_failed_requests", Limit(total("failed_requests"), "==", 0))


def total(metric: str) -> Source:
    """Its sum over all arms and engines that have it."""

    def of(result: BenchResult) -> Figure | None:
        keys = (f"{arm}:{engine}.{metric}" for arm, engines in result.arms.items() for engine in engines)
        found = [value for key in keys if (value := result.figure(key)) is not None]
        return Figure(sum(found), metric.replace("_", " ")) if found else None

    return of


def first_of(*keys: str) -> Source:
    """The first of the figures that was measured."""
    return lambda result: next((found for key in keys if (found := _figure(key, result))), None)


def highest(keys: Iterable[str]) -> Source:
    """The highest of those that were measured."""
    known = tuple(keys)
    return lambda result: max((found for key in known if (found := _figure(key, result))), default=None)


def combined(label: str, combine: Callable[[Sequence[float]], float], *keys: str) -> Source:
    """A function of several figures, if all were measured."""

    def of(result: BenchResult) -> Figure | None:
        values = [value for key in keys if (value := result.figure(key)) is not None]
        return Figure(combine(values), label) if len(values) == len(keys) else None

    return of


def _figure(source: Source, result: BenchResult) -> Figure | None:
    if not isinstance(source, str):
        return source(result)
    value = result.figure(source)
    return None if value is None else Figure(value, source, result.interval(source))
