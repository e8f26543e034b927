"""One shape for all benches."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from polder.bench.report.result import Arms, BenchResult, ratios_over, read_result, without_nan, write_result

ARMS: Arms = {
    "stock": {"A": {"ttft_p99_ms": 400.0, "hit_ratio": 0.5, "failed_requests": 0.0, "hit_ratio_by_tier": {"own": 0.5}}},
    "polder": {
        "A": {"ttft_p99_ms": 100.0, "hit_ratio": 0.8, "failed_requests": 0.0, "hit_ratio_by_tier": {"own": 0.8}}
    },
}


def result(**changes: object) -> BenchResult:
    fields = {
        "bench": "elastic",
        "conditions": {"seed": 0},
        "arms": ARMS,
        "ratios": {"polder/stock:A.ttft_p99_ms": 0.25},
        "checks": {"ok": True},
    }
    return BenchResult(**(fields | changes))  # type: ignore[arg-type]


def test_the_file_has_the_five_keys_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er.json"
    write_result(result(), path)
    assert list(json.loads(path.read_text())) == ["bench", "conditions", "arms", "ratios", "checks"]
    assert read_result(path) == result()
    assert list(path.parent.iterdir()) == [path], "no draft is left"


def test_a_ratio_is_the_arm_over_the_baseline() -> None:
    ratios = ratios_over(ARMS, arm="polder", baseline="stock")
    assert ratios == {"polder/stock:A.hit_ratio": 1.6, "polder/stock:A.ttft_p99_ms": 0.25}


@pytest.mark.parametrize(
    ("key", "value", "complaint"),
    [
        ("polder/stock:A.ttft_p99_ms", 4.0, "the metrics give 0.25"),
        ("A.ttft_p99_ms", 0.25, "is not ARM/BASELINE:ENGINE.METRIC"),
        ("polder/stock:B.ttft_p99_ms", 0.25, "not in arms"),
        ("polder/stock:A.hit_ratio_by_tier", 1.6, "distribution"),
    ],
)
def test_a_ratio_that_is_not_what_its_name_says_is_refused(key: str, value: float, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        result(ratios={key: value})


def test_another_shape_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    for text in ("{}", '{"bench":"x","conditions":{},"arms":{},"ratios":{},"checks":{},"more":1}'):
        path.write_text(text)
        with pytest.raises(msgspec.ValidationError):
            read_result(path)


def test_what_could_not_be_measured_is_left_out() -> None:
    assert without_nan({"a": 1.0, "b": float("nan"), "c": {"own": 0.5}}) == {"a": 1.0, "c": {"own": 0.5}}
