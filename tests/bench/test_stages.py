"""What is computed around the stages: workloads, timelines, resizes, answers, checks, the fleet file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polder.bench.checks import elastic_checks
from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.engines import EnginePlan, fleet_toml
from polder.bench.harness.timeline import new_givebacks
from polder.bench.plan import BUDGET_BYTES, QUICK
from polder.bench.report.metrics import RunRecords
from polder.bench.report.result import Arms, ratios_over
from polder.bench.stages.equality import OUTPUT_TOKENS, compare, questions
from polder.bench.stages.resize import Resized, resize_metrics
from polder.bench.stages.tax import TaxRun, tax_intervals, tax_metrics
from polder.bench.workloads.agents import agents, agents_ideal_hit_ratio, bursts, one_by_one
from polder.bench.workloads.models import MODEL_A, MODEL_B
from polder.serve.fleet import load_fleet


def engine(name: str, recipe: object, path: Path, **more: object) -> EnginePlan:
    fields = {"max_model_len": 1024, "core": 0, "share_bytes": BUDGET_BYTES // 2}
    return EnginePlan(name=name, recipe=recipe, model_path=path, **(fields | more))  # type: ignore[arg-type]


def test_kv_bytes_per_token_are_those_of_the_reference() -> None:
    assert MODEL_A.kv_bytes_per_token == 8 << 10
    assert MODEL_B.kv_bytes_per_token == 4 << 10
    assert MODEL_A.in_float32().kv_bytes_per_token == 16 << 10
    assert MODEL_A.fingerprint != MODEL_A.in_float32().fingerprint


def test_both_arms_have_the_same_bytes_to_the_block() -> None:
    a, b = engine("A", MODEL_A, Path()), engine("B", MODEL_B, Path())
    used = sum(e.blocks * 32 * e.recipe.kv_bytes_per_token for e in (a, b))
    assert used == BUDGET_BYTES
    assert (a.blocks, b.blocks) == (640, 1280)


def test_the_fleet_file_is_one_that_polder_serve_reads(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "fleet.toml"
    path.write_text(fleet_toml([engine("A", MODEL_A, tmp_path), engine("B", MODEL_B, tmp_path, core=1)], 8123))
    fleet = load_fleet(path)
    assert (fleet.port, fleet.budget_bytes, fleet.device) == (8123, BUDGET_BYTES, "cpu:0")
    assert [model.settings.kv_share_bytes for model in fleet.models] == [BUDGET_BYTES // 2] * 2
    assert fleet.models[1].env["VLLM_CPU_OMP_THREADS_BIND"] == "1"
    assert "--enable-prefix-caching" in fleet.models[0].args


def test_agents_play_their_sessions_in_order() -> None:
    load = agents(model="A", users=16, sessions=32)
    assert len(load.users) == 16
    assert [turn.key for turn in load.users[3]] == [f"s{s}t{t}" for s in (3, 19) for t in range(16)]
    assert [turn.key for turn in load.users[3] if turn.cold_start] == ["s3t0"]
    assert sum(len(turns) for turns in agents(model="A", users=16, sessions=QUICK.sessions).users) == 256
    assert agents_ideal_hit_ratio(sessions=16, block_tokens=32) == pytest.approx(0.912, abs=0.001)


def test_bursts_are_measured_once_and_go_on_as_load() -> None:
    turns = bursts(model="B", rounds=3).turns
    assert sum(turn.measured for turn in turns) == 238
    assert len(turns) == 3 * 238
    assert turns[238].at_s == turns[0].at_s + 120
    assert turns[238].body == turns[0].body
    assert bursts(model="B", time_scale=0.2).turns[-1].at_s == pytest.approx(turns[237].at_s / 5)


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ([], [], []),
        ([], [1.0], [1.0]),
        ([1.0, 2.0], [1.0, 2.0], []),
        ([1.0, 2.0], [1.0, 2.0, 3.0], [3.0]),
        ([1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [4.0, 5.0]),
        ([1.0, 2.0], [7.0, 8.0], [7.0, 8.0]),
    ],
)
def test_new_givebacks_also_when_old_ones_have_left(before: list[float], now: list[float], new: list[float]) -> None:
    assert new_givebacks(before, now) == new


def test_resize_metrics_take_the_longest_gap_around_a_resize() -> None:
    times = [0.1 * i for i in range(20)]
    times[10:] = [t + 0.25 for t in times[10:]]  # a gap of 350 ms from 0.9 to 1.25
    records = [RequestRecord(key="a", scheduled_s=0, token_s=times, end_s=3)]
    resized = [
        Resized(grew=False, started=100.95, ended=101.0, engine_ms=30),
        Resized(grew=True, started=101.6, ended=101.62, engine_ms=15),
    ]
    found = resize_metrics(resized, records, started_at=100.0)
    assert found["resizes"] == 2
    assert found["tbt_p50_ms"] == pytest.approx(100)
    assert found["shrink_p50_ms"] == pytest.approx(50)
    assert found["shrink_engine_max_ms"] == 30
    assert found["shrink_step_delay_max_ms"] == pytest.approx(250)
    assert found["grow_step_delay_max_ms"] == pytest.approx(0, abs=1e-6)


def test_questions_repeat_and_share_prefixes() -> None:
    asked = questions(model="A", count=4, longest=300, seed=1)
    assert asked == questions(model="A", count=4, longest=300, seed=1)
    assert asked[1][1][: len(asked[0][1]) // 2] == asked[0][1][: len(asked[0][1]) // 2]
    assert all(len(prompt) <= 300 for _, prompt in asked)


def test_compare_counts_answers_that_differ_in_any_token() -> None:
    answer = list(range(OUTPUT_TOKENS))
    other = [*answer[:-1], 7]
    found = compare([{"a": answer, "b": answer}], [{"a": answer, "b": other}])
    assert (found["answers_compared"], found["answers_different"], found["failed_requests"]) == (2, 1, 0)
    assert compare([{"a": answer}], [{"a": answer[:5]}])["failed_requests"] == 1


def tax_run(scale: float) -> TaxRun:
    records = [
        RequestRecord(
            key=str(i), scheduled_s=i, sent_s=i, token_s=[i + 0.1 * scale, i + 0.2 * scale], end_s=i + 0.2 * scale
        )
        for i in range(5)
    ]
    return TaxRun(records=RunRecords(records=records))


def test_tax_is_paired_and_its_ratio_is_the_metrics_ratio() -> None:
    stock, polder = [tax_run(1.0), tax_run(2.0)], [tax_run(1.01), tax_run(2.02)]
    intervals = tax_intervals(stock, polder)
    assert intervals["ttft_p50_ms"] == pytest.approx((1.01, 1.01))
    assert intervals["busy_output_tokens_per_s"] == pytest.approx((1 / 1.01, 1 / 1.01))
    ratio = tax_metrics(polder)["ttft_p50_ms"] / tax_metrics(stock)["ttft_p50_ms"]  # type: ignore[operator]
    assert ratio == pytest.approx(1.01)


def arms(*, a_ms: float, hit: float, b_ms: float, giveback_ms: float) -> Arms:
    return {
        "stock": {
            "A": {"ttft_p99_ms": 1000.0, "hit_ratio": 0.1, "failed_requests": 0.0},
            "B": {"ttft_p99_ms": 100.0},
            "all": {},
        },
        "polder": {
            "A": {"ttft_p99_ms": a_ms, "hit_ratio": hit, "failed_requests": 0.0},
            "B": {"ttft_p99_ms": b_ms, "givebacks": 9.0, "giveback_p99_ms": giveback_ms},
            "all": {},
        },
    }


INTERVALS = {f"polder/stock:{e}.ttft_p99_ms": (0.1, 0.5) for e in "AB"}


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, set()),
        ({"a_ms": 320.0}, {"a_ttft_p99_ratio_at_most_0_31"}),
        ({"hit": 0.39}, {"a_hit_ratio_gain_at_least_0_30"}),
        ({"b_ms": 111.0}, {"b_ttft_p99_ratio_at_most_1_10"}),
        ({"giveback_ms": 200.0}, {"giveback_p99_under_200_ms"}),
    ],
)
def test_main_checks(changes: dict[str, float], missed: set[str]) -> None:
    found = arms(**({"a_ms": 310.0, "hit": 0.41, "b_ms": 110.0, "giveback_ms": 199.0} | changes))
    checks = elastic_checks(found, ratios_over(found, arm="polder", baseline="stock"), INTERVALS)
    assert {check.name for check in checks if not check.passed} == missed
    assert not any(check.name in ("tokens_equal", "tax_within_1_percent") for check in checks), "not run, not claimed"


@pytest.mark.parametrize(
    ("change", "equal"),
    [({}, True), ({"answers_different": 1.0}, False), ({"preemptions": 0.0}, False), ({"migrated_blocks": 0.0}, False)],
)
def test_equality_without_every_kind_of_move_shows_nothing(change: dict[str, float], equal: bool) -> None:
    found = arms(a_ms=1, hit=1, b_ms=1, giveback_ms=1)
    moved = dict.fromkeys(("grows", "shrinks", "migrated_blocks", "evicted_blocks", "preemptions"), 3.0)
    found["polder-equality"] = {"all": {"answers_compared": 36.0, "answers_different": 0.0, **moved} | change}
    checks = elastic_checks(found, ratios_over(found, arm="polder", baseline="stock"), INTERVALS)
    assert {check.name: check.passed for check in checks}["tokens_equal"] is equal


@pytest.mark.parametrize(
    ("ttft", "speed", "within"),
    [((0.99, 1.009), (0.995, 1.0), True), ((0.99, 1.02), (0.995, 1.0), False), ((0.99, 1.0), (0.98, 1.0), False)],
)
def test_tax_counts_the_whole_interval(ttft: tuple[float, float], speed: tuple[float, float], within: bool) -> None:
    found = arms(a_ms=1, hit=1, b_ms=1, giveback_ms=1) | {"polder-alone": {"B": {}}}
    key = "polder-alone/stock-alone:B."
    intervals = INTERVALS | {f"{key}ttft_p50_ms": ttft, f"{key}busy_output_tokens_per_s": speed}
    checks = elastic_checks(found, ratios_over(found, arm="polder", baseline="stock"), intervals)
    assert {check.name: check.passed for check in checks}["tax_within_1_percent"] is within


def test_blocks_hold_every_burst_request_once() -> None:
    blocks = one_by_one(model="B", blocks=17)
    keys = [turn.key for block in blocks for user in block.users for turn in user]
    assert sorted(keys) == sorted(turn.key for turn in bursts(model="B").turns)
    assert all(len(block.users) == 1 for block in blocks), "one request at a time"
    assert {len(block.users[0]) for block in blocks} == {14}
