"""Every bench from end to end, on arms without engines: each stage is run, and what it finds gets to the files."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from polder.bench.harness.arms import ArmSpec
from polder.bench.harness.fleets import FleetSpec
from polder.bench.report import metrics
from polder.bench.report.result import BenchResult, read_result
from polder.bench.stages.quality import Decoded
from polder.bench.suites.base import Suite
from polder.bench.suites.context import ContextSuite
from polder.bench.suites.disks import ARMS as LAYOUTS
from polder.bench.suites.disks import DisksSuite
from polder.bench.suites.elastic import ElasticSuite
from polder.bench.suites.replay import ReplaySuite
from polder.bench.suites.sparse import ARMS as READERS
from polder.bench.suites.sparse import SparseSuite
from polder.bench.suites.tenants import TenantsSuite
from polder.bench.suites.turns import ARMS, TurnsSuite
from polder.bench.workloads import checkpoints
from polder.emulation.disks import VirtualClock
from tests.bench.fakes import FakeArm, FakeBroker, no_waiting, own_fleet, short_traces

Run = Callable[[Suite[Any]], tuple[BenchResult, list[str], str]]
"""Runs a suite: (result, arms in the order of their starts, what was printed)."""


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    FakeBroker(monkeypatch)
    no_waiting(monkeypatch)
    short_traces(monkeypatch)
    monkeypatch.setattr(metrics, "RESAMPLES", 20)
    journal: list[str] = []
    for spec in (ArmSpec, FleetSpec):
        monkeypatch.setattr(spec, "make", lambda spec, name, logs, _: FakeArm(name, spec, logs, journal))

    def of(suite: Suite[Any]) -> tuple[BenchResult, list[str], str]:
        text = io.StringIO()
        suite.reporter.console = Console(file=text, width=200)
        json_file, html_file = tmp_path / "out" / "result.json", tmp_path / "out" / "result.html"
        result = suite.run(json_file, html_file)
        assert read_result(json_file).arms == result.arms
        assert html_file.read_text() == suite.page(result, suite.runs)
        assert (suite.workdir / f"{suite.name}-runs.json").exists()
        assert all(name in text.getvalue() for name in result.checks)
        started = [line for line in journal if not line.startswith("stop ")]
        assert sorted(journal) == sorted([*started, *(f"stop {name}" for name in started)]), "all are stopped"
        return result, started, text.getvalue()

    return of


def test_elastic_runs_all_of_its_stages(run: Run, tmp_path: Path) -> None:
    plan = replace(ElasticSuite.quick, resize_stream_tokens=60, tax_rounds=1)
    result, started, _ = run(ElasticSuite(plan, workdir=tmp_path))
    assert set(result.arms) == {
        *("stock", "polder", "polder-resize", "stock-alone", "polder-alone", "polder-equality"),
    }
    assert result.arms["polder"]["A"]["requests"] == 64, "two runs of two sessions"
    assert {"polder/stock:A.ttft_p99_ms", "polder-alone/stock-alone:B.ttft_p50_ms"} <= result.ratios.keys()
    assert {"polder/stock:B.tbt_p99_ms", "polder-alone/stock-alone:B.ttft_p50_ms"} <= result.conditions[
        "intervals"
    ].keys()
    assert set(result.checks) == {
        *("a_ttft_p99_ratio_at_most_0_31", "b_ttft_p99_ratio_at_most_1_10", "a_hit_ratio_gain_at_least_0_30"),
        *("giveback_p99_under_200_ms", "tokens_equal", "tax_within_1_percent", "no_failed_requests"),
    }
    assert result.checks["tokens_equal"]
    assert [one["arm"] for one in result.conditions["runs"]] == ["stock", "polder", "polder", "stock"]
    assert started == ["stock", "polder", "stock-equality", "polder-equality"]


class FakeDecoding:
    """Answers with logits that are the further from dense the less is read."""

    block_tokens, block_bytes, layers = 16, 30 * 24 << 10, 30

    def tokenize(self, text: str) -> list[int]:
        return [ord(letter) % 50 for letter in text]

    def decode(self, prompt: list[int], tokens: int, forced: list[int] | None, ask: Mapping[str, Any]) -> Decoded:
        random = np.random.default_rng(len(prompt))
        logits, noise = (random.standard_normal((tokens, 50)).astype(np.float32) for _ in range(2))
        said: dict[str, Any] = {}
        if ask:
            share = float(ask["sparse"].rstrip("%")) / 100
            logits += noise * (1 - share) * (1e-4 if ask["method"] == "polder" else 1.0)
            said = {
                "units": 200,
                "slots": int(200 * share),
                "sparse_tokens": tokens - 1,
                "read_units": 90,
                "unread": 0.1,
            }
        return Decoded(logits=logits, tokens=forced or logits.argmax(axis=1).tolist(), said=said, token_ms=3.0)

    def stop(self) -> None: ...


def test_sparse_runs_all_of_its_stages(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SparseSuite, "engine", lambda *_: FakeDecoding())
    monkeypatch.setattr(checkpoints, "ensure_checkpoint", lambda *_: tmp_path)
    plan = replace(SparseSuite.full, tokens=24)
    result, started, _ = run(SparseSuite(plan, workdir=tmp_path))
    assert set(result.arms) == {*READERS, *(f"{arm}-8k" for arm in READERS)}
    assert set(result.arms["polder-10"]) == {"quote", "facts", "chat", "code"}
    assert result.arms["dense"]["code"]["kl_to_dense"] == 0 < result.arms["polder-10"]["code"]["kl_to_dense"]
    assert result.arms["polder-100"]["chat"]["device_kv_bytes"] == result.arms["dense"]["chat"]["device_kv_bytes"]
    assert "polder-10-8k/quest-10-8k:facts.kl_to_dense" in result.ratios
    assert set(result.checks) == {
        *("dense_at_100_percent", "kl_at_10_percent_at_most_0_01", "top1_at_10_percent_at_least_0_97"),
        *("bytes_at_10_percent_at_most_0_035_of_the_prefix", "kl_a_tenth_of_quests"),
    }
    assert all(result.checks.values())
    assert not started


def test_turns_runs_all_of_its_stages(run: Run, tmp_path: Path) -> None:
    plan = replace(TurnsSuite.full, noreuse_rounds=1)
    result, started, _ = run(TurnsSuite(plan, workdir=tmp_path))
    restarted = [f"{arm}-{when}" for arm in ("stock", "native-fs", "polder-disk") for when in ("before", "restart")]
    assert set(result.arms) == {
        *ARMS,
        *(f"{arm}-chat" for arm in ("stock", "native", "polder")),
        *(f"{arm}-{stage}" for arm in ("stock", "polder") for stage in ("lender", "noreuse-1", "noreuse-4")),
        *(f"{arm}-equality" for arm in ARMS if arm != "stock"),
        *restarted,
    }
    assert result.arms["polder-disk-before"]["A"]["requests"] == 32, "two runs of half of two sessions"
    assert result.arms["polder-disk-restart"]["A"]["first_turn_hit_ratio"] == 48 / 64
    assert result.arms["polder-lender"].keys() == {"B"}
    by_tier = result.arms["polder"]["A"]["hit_ratio_by_tier"]
    assert isinstance(by_tier, dict)
    assert sum(by_tier.values()) == pytest.approx(1.0)
    assert by_tier["tiers"] > 0
    pairs = {"polder/stock", "polder/native", "polder-lender/stock-lender", "polder-disk-restart/native-fs-restart"}
    assert pairs <= {key.partition(":")[0] for key in result.ratios}
    assert pairs <= {key.partition(":")[0] for key in result.conditions["intervals"]}
    assert len(result.checks) == 14
    assert result.checks["no_failed_requests"]
    assert result.checks["tokens_equal_polder_peer"]
    assert started[:3] == ["stock", "polder", "native"], "noreuse first: its arms are those that the agents need first"
    assert started.count("polder-disk-restart") == 4
    assert not list(tmp_path.glob("restart-*")), "nothing is left on the disks"
    assert "emulated: peer 3.2e+09 B/s, host 4e+08 B/s" in result.conditions["links"]
    assert result.conditions["engines"]["polder"][0]["tiers"] == ["peer", "host"]


def test_tenants_runs_all_of_its_stages(run: Run, tmp_path: Path) -> None:
    plan = replace(TenantsSuite.full, rates=(0.2, 0.5), comeback_samples=1)
    result, started, _ = run(TenantsSuite(plan, workdir=tmp_path))
    ran = ("stock", "kv-only", "polder")
    assert set(result.arms) == {
        *(f"{arm}-{load}" for arm in ran for load in ("x0.2", "x0.5", "spatial")),
        *(ran if "polder" in result.arms else ()),
        *("stock-resident", "polder-resident", "stock-anew", "polder-streamed", "polder-whole"),
        *("polder-streamed-link", "polder-whole-link", "polder-streaming", "polder-equality"),
    }
    assert result.arms["polder-streamed"]["T2"]["wakes"] == 5, (
        "the last sleeper is woken by a request, not by the broker"
    )
    assert {
        "polder-x0.5/stock-x0.5:all.ttft_p99_ms",
        "polder-streamed/stock-anew:T2.ttft_128_p50_ms",
    } <= result.ratios.keys()
    assert {"stock_exhausts_its_kv_at_some_rates_not_at_all", "tokens_equal"} <= result.checks.keys()
    assert result.checks["reclaimed_model_had_lost_all_its_layers"]
    assert not result.checks["tokens_equal"], "nobody wakes a sleeping engine here"
    played = [(one["arm"], one["load"]) for one in result.conditions["runs"]]
    assert played[:6] == [
        *(("stock", "x0.2"), ("stock", "x0.5"), ("stock", "spatial")),
        *(("polder", "x0.5"), ("polder", "x0.2"), ("polder", "spatial")),
    ]
    assert started == [
        *("stock", "polder", "kv-only", "stock"),
        *("stock-comeback", "polder-streamed-comeback", "polder-whole-comeback"),
        *("polder-streamed-link-comeback", "polder-whole-link-comeback", "polder-link-streaming"),
        *("stock-equality", "polder-equality"),
    ]


def test_context_grows_every_arm_to_its_longest(run: Run, tmp_path: Path) -> None:
    plan = replace(ContextSuite.quick, samples=2)
    result, _, _ = run(ContextSuite(plan, workdir=tmp_path))
    assert set(result.arms) == set(plan.arms)
    for arm in plan.arms:
        found = result.arms[arm]["all"]
        assert found["refused_beyond"] == 1.0
        assert arm == "enough" or found["context_tokens"] == plan.longest(arm)
    assert f"planned_tbt_{plan.longest('window-link')}_ms" in result.arms["window-link"]["all"]
    assert {name for name, passed in result.checks.items() if not passed} <= {
        *("first_token_at_stocks_longest_at_most_1_10", "decode_within_20_percent_of_the_plan"),
    }
    assert len(result.checks) == 6


def test_disks_runs_all_of_its_stages(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DisksSuite, "clock", VirtualClock())
    sizes = {"known_steps": 40, "measured_steps": 8, "synthetic_blocks": 4096, "wall_steps": 3}
    plan = replace(DisksSuite.quick, sets=("sticky", "random"), **sizes)  # type: ignore[arg-type]
    result, started, text = run(DisksSuite(plan, workdir=tmp_path / "work"))
    assert not started, "no engine"
    assert set(LAYOUTS) < result.arms.keys()
    assert {"stage-parts", "live-lru"} < result.arms.keys()
    assert {"sticky-8", "random-4-slow", "wall-sticky-4"} <= result.arms["polder"].keys()
    assert {key.rpartition(".")[2] for key in result.ratios} == {
        *("io_time_s", "io_time_with_host_s", "bandwidth_bytes_per_s"),
    }
    exact = ("one_disk_no_worse_than_the_plain_store", "bytes_read_as_planned", "wall_within_5_percent_of_modelled")
    assert all(result.checks[name] for name in (*exact, "live_no_entry_lost"))
    assert len(result.checks) == 4 + 4 + 8 + 2 + 2 + 4
    shares = result.arms["stage-parts"]["sticky-8"]
    assert sum(value for name, value in shares.items() if name.endswith("_share")) == pytest.approx(1.0)
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"logs-disks", "disks-runs.json"}, "no page is left"
    assert "sticky, by disks" in text


def test_replay_runs_all_of_its_stages(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    lines = [{"prompt": f"t{9 + n} " * 40, "output_tokens": 3, "model": "docs"} for n in range(20)]
    lines += [{"prompt": "t9 " * length, "output_tokens": 2, "model": "chat-1.5"} for length in (30, 900)]
    trace.write_text("".join(json.dumps(line) + "\n" for line in lines))
    given: dict[str, Any] = {"fleet": str(own_fleet(tmp_path)), "trace": [str(trace)], "rate": 500.0}
    result, started, text = run(ReplaySuite(replace(ReplaySuite.full, **given), workdir=tmp_path))
    compared = [f"{arm}-{how}" for arm in ("stock-again", "polder") for how in ("legs", "equality")]
    assert set(result.arms) == {"stock", "polder", *compared}
    assert result.arms["polder"]["docs"]["requests"] == 40, "two legs"
    assert result.arms["stock"]["chat-1.5"]["requests"] == 2
    assert (
        result.arms["polder-legs"]["all"]["answers_compared"]
        == 2 * result.arms["stock-again-legs"]["all"]["answers_compared"]
        == 42
    )
    assert result.arms["polder-equality"]["all"]["answers_compared"] == 7 + 1, "of 20 prompts each third, and one"
    assert {"polder/stock:all.ttft_p99_ms", "polder/stock:chat-1.5.output_tokens_per_s"} <= result.ratios.keys()
    ends = result.conditions["intervals"]["polder/stock:all.output_tokens_per_s"]
    assert ends[0] <= result.ratios["polder/stock:all.output_tokens_per_s"] <= ends[1]
    assert result.checks == {"answers_differ_no_more_than_stocks_own": True, "no_failed_requests": True}
    assert [one["arm"] for one in result.conditions["runs"]] == ["stock", "polder", "polder", "stock"]
    assert started == ["stock", "polder", "stock", *(f"{arm}-equality" for arm in ("stock", "stock-again", "polder"))]
    assert "chat-1.5: 1 of 2 requests are played; left out: 1 longer than the model's context" in text
    assert result.conditions["requests"]["chat-1.5"]["longer_than_context"] == 1
    assert sum(int(size.split()[0]) for size in result.conditions["bytes"]["stock"].values()) == 64 << 20


def test_polder_alone_is_replayed_where_plain_vllm_is_not_asked_for(run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 5, "input_length": 40, "output_length": 2, "hash_ids": [1, 2, 3]}\n')
    plan = replace(ReplaySuite.quick, fleet=str(own_fleet(tmp_path)), trace=[f"docs={trace}"]).only(arms=["polder"])
    result, started, _ = run(ReplaySuite(plan, workdir=tmp_path))
    assert started == ["polder"]
    assert set(result.arms) == {"polder"}
    assert set(result.checks) == {"no_failed_requests"}
    assert result.conditions["bytes"]["stock"] == {}


def test_only_what_is_asked_for_is_started(run: Run, tmp_path: Path) -> None:
    plan = TurnsSuite.full.only(stages=["equality"], arms=["polder-peer"])
    result, started, _ = run(TurnsSuite(plan, workdir=tmp_path))
    assert started == ["stock-equality", "polder-peer-equality"]
    assert set(result.checks) == {"tokens_equal_polder_peer", "no_failed_requests"}


def test_what_was_measured_before_an_engine_failed_is_kept(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(suite: Suite[Any]) -> None:
        raise RuntimeError("no engine")

    monkeypatch.setattr(TurnsSuite, "noreuse", broken)
    with pytest.raises(RuntimeError):
        run(TurnsSuite(TurnsSuite.full, workdir=tmp_path))
    assert (tmp_path / "turns-runs.json").exists()
