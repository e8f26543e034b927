"""One shape for all benches, and files of earlier runs that can still be read, judged and shown."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from polder.bench.report.metrics import without_nan
from polder.bench.report.result import Arms, BenchResult, ratios_over, read_result, write_result
from polder.bench.report.tables import arm_tables
from polder.bench.suites.base import Suite

RESULTS = [path for path in sorted(Path("docs/results").glob("*.json")) if not path.name.startswith(("soak", "demo"))]
ARMS: Arms = {
    "stock": {"A": {"ttft_p99_ms": 400.0, "hit_ratio": 0.5, "failed_requests": 0.0, "hit_ratio_by_tier": {"own": 0.5}}},
    "polder": {
        "A": {"ttft_p99_ms": 100.0, "hit_ratio": 0.8, "failed_requests": 0.0, "hit_ratio_by_tier": {"own": 0.8}}
    },
}


def result(**changes: Any) -> BenchResult:
    fields: dict[str, Any] = {"bench": "elastic", "conditions": {"seed": 0}, "checks": {"ok": True}}
    fields |= {"arms": ARMS, "ratios": {"polder/stock:A.ttft_p99_ms": 0.25}}
    return BenchResult(**(fields | changes))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_judged_as_they_were_and_can_be_shown(path: Path) -> None:
    found = read_result(path)
    suite: type[Suite[Any]] = getattr(
        importlib.import_module(f"polder.bench.suites.{found.bench}"), f"{found.bench.title()}Suite"
    )
    assert {verdict.name: verdict.passed for verdict in suite.verdicts(found)} == found.checks
    page = suite.page(found)
    assert all(name in page for name in found.checks)
    assert all(table.rows and table.columns for table in suite.tables(found))


def test_the_file_has_the_five_keys_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "er.json"
    write_result(result(), path)
    assert list(json.loads(path.read_text())) == ["bench", "conditions", "arms", "ratios", "checks"]
    assert read_result(path) == result()
    assert list(path.parent.iterdir()) == [path], "no draft is left"


def test_a_ratio_is_the_arm_over_the_baseline() -> None:
    ratios = ratios_over(ARMS, arm="polder", baseline="stock")
    assert ratios == {"polder/stock:A.hit_ratio": 1.6, "polder/stock:A.ttft_p99_ms": 0.25}
    assert result().figure("stock/polder:A.ttft_p99_ms") == 4.0
    assert result().figure("stock:A.hit_ratio") == 0.5
    assert result().figure("stock:A.no_such") is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("polder/stock:A.ttft_p99_ms", 4.0),
        ("A.ttft_p99_ms", 0.25),
        ("polder:A.ttft_p99_ms", 100.0),
        ("polder/stock:B.ttft_p99_ms", 0.25),
        ("polder/stock:A.hit_ratio_by_tier", 1.6),
    ],
)
def test_a_ratio_that_is_not_what_its_name_says_is_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=r"ttft_p99_ms|hit_ratio"):
        result(ratios={key: value})


def test_a_tables_key_names_arms_or_a_suffix_and_served_requests_are_compared_with_stocks() -> None:
    served = {"ttft_p50_ms": 2.0, "own": 1.0}
    arms: Arms = {f"{arm}{suffix}": {"A": dict(served)} for arm in ("stock", "polder") for suffix in ("", "-x")}
    ratios = ratios_over(arms, arm="polder-x", baseline="stock-x")
    found = result(arms=arms | {"polder-y": {"all": {"answers": 3.0}}}, ratios=ratios)
    known = ("stock", "native", "polder")
    (of_suffix,) = arm_tables(found, "x", "-x:A", known)
    assert (of_suffix.columns, of_suffix.rows) == (["stock", "polder"], [["TTFT p50, ms", "2", "2 (x1.00)"]])
    (of_arms,) = arm_tables(found, "y", "polder-y stock:all", ())
    assert (of_arms.columns, of_arms.rows) == (["polder-y"], [["answers", "3"]])
    assert not list(arm_tables(found, "none", "-z:A", known))


def test_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text in ("{}", '{"bench":"x","conditions":{},"arms":{},"ratios":{},"checks":{},"more":1}'):
        path.write_text(text)
        with pytest.raises(msgspec.ValidationError):
            read_result(path)


def test_what_could_not_be_measured_is_left_out() -> None:
    assert without_nan({"a": 1.0, "b": float("nan"), "c": {"own": 0.5}}) == {"a": 1.0, "c": {"own": 0.5}}
