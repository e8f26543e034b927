"""The whole of `polder bench tenants` with fake engines: every stage is run, and what it finds gets to the files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from polder.bench import tenants, tenants_equality
from polder.bench.harness.arms import Arm
from polder.bench.harness.completions import encode_body
from polder.bench.harness.driver import ClosedLoop, OpenLoop, Turn
from polder.bench.harness.engines import EnginePlan
from polder.bench.harness.pool import ArmPool
from polder.bench.report.result import read_result
from polder.bench.stages import comeback as tenants_comeback
from polder.bench.stages import streaming as tenants_streaming
from polder.bench.tenants_plan import ARMS, FULL_TENANTS, QUICK_TENANTS
from polder.bench.workloads.tenants_models import TENANTS
from tests.bench.fake_server import FakeEngine, serving
from tests.bench.test_tenants import base
from tests.bench.test_turns_runs import FakeArm


class ThreeEngineArm(FakeArm):
    def __init__(self, name: str, log_dir: Path, engine: FakeEngine, engines: list[EnginePlan]) -> None:
        super().__init__(name, log_dir, engine)
        self.engines = tuple(engines)

    def preemptions(self) -> dict[str, float]:
        """All at the higher of the two rates, of which a run has more than ten requests."""
        return dict.fromkeys(TENANTS, float(len(self._engine.asked) // 10))


def turns(model: str, count: int) -> list[Turn]:
    body = encode_body(model=model, prompt=list(range(100, 164)), output_tokens=3)
    return [Turn(key=f"{model}{number}", body=body, output_tokens=3) for number in range(count)]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Names of the arms in the order of their starts."""
    names: list[str] = []
    with serving(FakeEngine(token_s=0.0001)) as fake:

        @contextmanager
        def pool(engines: list[EnginePlan], *, suffix: str, at_most: int, **_: Any) -> Iterator[ArmPool]:
            def make(name: str) -> Arm:
                names.append(name + suffix)
                return ThreeEngineArm(name, tmp_path / "logs", fake, engines)

            yield ArmPool(make, lambda _: None, at_most=at_most)

        def sweep(*, rate: float, **_: Any) -> dict[str, OpenLoop]:
            fake.asked.clear()
            return {name: OpenLoop(turns=turns(name, round(4 * rate))) for name in TENANTS}

        def of_two(**_: Any) -> dict[str, ClosedLoop]:
            return {name: ClosedLoop(users=[turns(name, 2)]) for name in ("T1", "T2")}

        def reclaimed(arm: Arm, **_: Any) -> tuple[dict[str, float], dict[str, float] | None]:
            resident = {"ttft_128_p50_ms": 50.0, "failed_requests": 0.0}
            counts = {"wakes": 4.0, "layers_loaded_a_wake": 12.0, "bytes_loaded_a_wake": 1e8}
            woken = resident | counts | {"ttft_128_p50_ms": 150.0 if "whole" in arm.name else 100.0}
            return resident, None if arm.name == "stock" else woken

        fakes: dict[str, Any] = {
            "check_engine": lambda: None,
            "tenants_engines": lambda recipes, **_: [engine for engine in base() if engine.name in recipes],
            "arm_pool": pool,
            "temporal": sweep,
            "spatial": of_two,
            "QUIET_S": 0.0,
        }
        for name, value in fakes.items():
            monkeypatch.setattr(tenants, name, value)

        async def streamed(*_: Any, **__: Any) -> dict[str, float]:
            return {"step_0_ms": 20.0, "step_1_ms": 22.0, "formula_1_ms": 20.0, "layer_1_ms": 5.0, "worst_error": 0.1}

        monkeypatch.setattr(tenants_comeback, "resident_and_reclaimed", reclaimed)
        monkeypatch.setattr(tenants_streaming, "measure_streaming", streamed)
        monkeypatch.setattr(tenants_equality, "SETTLE_S", 0.0)
        monkeypatch.setattr(tenants_equality, "PROMPTS", 1)
        yield names


def test_every_stage_gets_to_the_result(started: list[str], tmp_path: Path) -> None:
    plan = replace(FULL_TENANTS, rates=(0.5, 3.0))
    json_file, html_file = tmp_path / "tenants.json", tmp_path / "tenants.html"
    result = tenants.TenantsBench(plan, workdir=tmp_path, console=Console(quiet=True)).run(json_file, html_file)
    assert read_result(json_file).arms == result.arms
    run = [arm for arm in ARMS if arm in plan.order]
    assert set(result.arms) == {
        *(f"{arm}-{load}" for arm in run for load in ("x0.5", "x3", "spatial")),
        *run,
        *("stock-resident", "polder-resident", "stock-anew", "polder-streamed", "polder-whole"),
        *("polder-streamed-link", "polder-whole-link", "polder-streaming"),
        "polder-equality",
    }
    assert result.arms["stock-x0.5"]["all"]["requests"] == 12, "two runs of two requests to each of three models"
    assert result.arms["stock"]["all"] == result.arms["stock-x3"]["all"], "the rate at which stock preempts"
    wanted = {
        "polder/stock:all.output_tokens_per_s",
        "polder/kv-only:all.ttft_p99_ms",
        "kv-only-x0.5/stock-x0.5:all.tbt_p50_ms",
        "polder-spatial/stock-spatial:all.output_tokens_per_s",
        "polder-streamed/stock-anew:T2.ttft_128_p50_ms",
        "polder-streamed/stock-resident:T2.ttft_128_p50_ms",
    }
    assert wanted <= result.ratios.keys()
    assert {"polder/stock:all.ttft_p99_ms", "polder-x3/stock-x3:all.tbt_p99_ms"} <= result.conditions[
        "intervals"
    ].keys()
    assert set(result.checks) == {
        "stock_exhausts_its_kv_at_some_rates_not_at_all",
        "temporal_throughput_at_least_1_40",
        "temporal_ttft_p99_at_most_0_25",
        "temporal_tbt_p99_at_most_0_55",
        "below_saturation_no_worse_by_2_percent_x0_5",
        "streamed_at_least_1_30_sooner_than_whole",
        "reclaimed_model_had_lost_all_its_layers",
        "streaming_step_within_15_percent_of_the_formula",
        "tokens_equal",
        "no_failed_requests",
    }
    assert result.checks["no_failed_requests"]
    assert result.checks["streamed_at_least_1_30_sooner_than_whole"]
    assert not result.checks["tokens_equal"], "these engines have no weights to move"
    played = [(one["arm"], one["load"]) for one in result.conditions["runs"]]
    assert played[:6] == [
        *(("stock", "x0.5"), ("stock", "x3"), ("stock", "spatial")),
        *(("polder", "x3"), ("polder", "x0.5"), ("polder", "spatial")),
    ]
    assert started == [
        *("stock", "polder", "kv-only"),
        "stock",
        *("stock-comeback", "polder-streamed-comeback", "polder-whole-comeback"),
        *("polder-streamed-link-comeback", "polder-whole-link-comeback", "polder-link-streaming"),
        *("stock-equality", "polder-equality"),
    ]
    assert "<svg" in html_file.read_text()
    assert (tmp_path / "tenants-runs.json").exists()


def test_only_what_is_asked_for_is_started(started: list[str], tmp_path: Path) -> None:
    plan = QUICK_TENANTS.only(stages=["equality"])
    result = tenants.TenantsBench(plan, workdir=tmp_path, console=Console(quiet=True)).run(tmp_path / "tenants.json")
    assert started == ["stock-equality", "polder-equality"]
    assert set(result.checks) == {"tokens_equal", "no_failed_requests"}
