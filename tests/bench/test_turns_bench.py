"""The whole of `polder bench turns` with fake engines: every stage is run, and what it finds gets to the files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polder.bench import turns, turns_equality
from polder.bench.harness.arms import Arm
from polder.bench.harness.completions import encode_body
from polder.bench.harness.driver import ClosedLoop, OpenLoop, Turn
from polder.bench.harness.engines import EnginePlan
from polder.bench.harness.pool import ArmPool
from polder.bench.report.result import read_result
from polder.bench.stages import restart as turns_restart
from polder.bench.stages import tax
from polder.bench.turns_plan import ARMS, FULL_TURNS, RESTART_ARMS
from polder.bench.turns_setup import ArmSetup
from polder.bench.workloads.models import MODEL_A, MODEL_B
from tests.bench.fake_server import FakeEngine, serving
from tests.bench.test_turns_runs import FakeArm


def turn(model: str, number: int) -> Turn:
    body = encode_body(model=model, prompt=list(range(100, 164)), output_tokens=3)
    return Turn(key=f"{model}{number}", body=body, output_tokens=3)


def closed(**_: Any) -> ClosedLoop:
    return ClosedLoop(users=[[turn("A", number) for number in range(3)]])


def sessions(**_: Any) -> ClosedLoop:
    """One session of 16 turns."""
    body = encode_body(model="A", prompt=list(range(100, 164)), output_tokens=3)
    return ClosedLoop(users=[[Turn(key=f"s0t{number}", body=body, output_tokens=3) for number in range(16)]])


def opened(model: str, **_: Any) -> OpenLoop:
    return OpenLoop(turns=[turn(model, number) for number in range(3)])


def engines(*_: Any) -> list[EnginePlan]:
    recipes = {"A": MODEL_A, "B": MODEL_B}
    shared = {"model_path": Path(), "max_model_len": 1024, "core": 0, "share_bytes": 1 << 20}
    return [EnginePlan(name=name, recipe=recipe, **shared) for name, recipe in recipes.items()]  # type: ignore[arg-type]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Names of the arms in the order of their starts."""
    names: list[str] = []
    with serving(FakeEngine(cached_tokens=48, token_s=0.0001)) as engine:

        @contextmanager
        def pool(setup: ArmSetup, *, at_most: int, **_: Any) -> Iterator[ArmPool]:
            def make(name: str) -> Arm:
                names.append(name + setup.suffix)
                return FakeArm(name, tmp_path / "logs", engine)

            yield ArmPool(make, lambda _: None, at_most=at_most)

        fakes: dict[str, Any] = {
            "check_engine": lambda: None,
            "turns_engines": engines,
            "arm_pool": pool,
            "agents": closed,
            "bursts": opened,
            "chats": opened,
            "unique_prompts": lambda **_: [closed(), closed()],
            "rounds_of_questions": lambda _: [{"A": [("A0", [5] * 64)], "B": [("B0", [6] * 64)]}] * 2,
            "QUIET_S": 0.0,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(turns, name, fake)
        monkeypatch.setattr(tax, "QUIET_S", 0.0)
        monkeypatch.setattr(turns_equality, "SETTLE_S", 0.0)
        monkeypatch.setattr(turns_restart, "SETTLE_S", 0.0)
        monkeypatch.setattr(turns_restart, "agents", sessions)

        def restarted(arm: str, *_: Any) -> Arm:
            names.append(f"{arm}-restart")
            return FakeArm(arm, tmp_path / "logs", engine)

        monkeypatch.setattr(turns_restart, "_started", restarted)
        yield names


def test_every_stage_gets_to_the_result(started: list[str], tmp_path: Path) -> None:
    plan = replace(FULL_TURNS, noreuse_rounds=2)
    json_file, html_file = tmp_path / "turns.json", tmp_path / "turns.html"
    result = turns.TurnsBench(plan, workdir=tmp_path, console=Console(quiet=True)).run(json_file, html_file)
    assert read_result(json_file).arms == result.arms
    assert set(result.arms) == {
        *ARMS,
        *(f"{arm}-chat" for arm in ("stock", "native", "polder")),
        *(f"{arm}-{stage}" for arm in ("stock", "polder") for stage in ("lender", "noreuse-1", "noreuse-4")),
        *(f"{arm}-equality" for arm in ARMS if arm != "stock"),
        *(f"{arm}-{when}" for arm in RESTART_ARMS for when in ("before", "restart")),
    }
    assert result.arms["polder-disk-before"]["A"]["requests"] == 16, "two runs of half a session"
    assert result.arms["polder-disk-restart"]["A"]["first_turn_hit_ratio"] == 48 / 64
    assert started.count("polder-disk-restart") == 4
    assert not list(tmp_path.glob("restart-*")), "nothing is left on the disks"
    assert result.arms["polder"]["A"]["requests"] == 6, "two runs"
    assert result.arms["polder-noreuse-4"]["A"]["requests"] == 12, "two rounds of two blocks; one more is not counted"
    assert result.arms["polder-lender"].keys() == {"B"}
    assert result.arms["native-equality"]["all"]["answers_different"] == 0
    wanted = {"polder/stock:A.ttft_p99_ms", "polder/native:A.ttft_p99_ms", "native/stock:A.ttft_p99_ms"}
    assert wanted <= result.ratios.keys()
    assert {"polder-lender/stock-lender:B.tbt_p99_ms", "polder-chat/stock-chat:A.ttft_p99_ms"} <= result.ratios.keys()
    assert wanted <= result.conditions["intervals"].keys()
    assert result.conditions["links"].startswith("links emulated: peer 3.2 GB/s, host 400 MB/s")
    assert [run["arm"] for run in result.conditions["runs"]][:10] == [*ARMS, *reversed(ARMS)]
    assert set(result.checks) == {
        "a_ttft_p99_ratio_to_stock_at_most_0_31",
        "a_ttft_p99_ratio_to_native_at_most_1_00",
        "b_ttft_p99_ratio_at_most_1_05",
        "b_tbt_p99_ratio_at_most_1_05",
        "noreuse_tax_within_1_percent_1_at_a_time",
        "noreuse_tax_within_1_percent_4_at_a_time",
        *(f"tokens_equal_{arm.replace('-', '_')}" for arm in ARMS if arm != "stock"),
        "a_ttft_p99_after_a_restart_ratio_to_stock_at_most_0_31",
        "a_ttft_p99_after_a_restart_ratio_to_native_at_most_1_00",
        "first_turns_after_a_restart_hit",
        "no_failed_requests",
    }
    assert result.checks["no_failed_requests"]
    assert "A: chat" in html_file.read_text()
    assert (tmp_path / "turns-runs.json").exists()
    assert started[:3] == ["stock", "polder", "native"], "noreuse first: its arms are those that the agents need first"


def test_only_what_is_asked_for_is_started(started: list[str], tmp_path: Path) -> None:
    plan = FULL_TURNS.only(stages=["equality"], arms=["polder-peer"])
    result = turns.TurnsBench(plan, workdir=tmp_path, console=Console(quiet=True)).run(tmp_path / "turns.json")
    assert started == ["stock-equality", "polder-peer-equality"]
    assert set(result.checks) == {"tokens_equal_polder_peer", "no_failed_requests"}
