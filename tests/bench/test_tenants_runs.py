"""Figures of the tenants' runs, weights moved by hand, and the stages that ask one arm, all without engines."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from polder.bench import tenants_equality
from polder.bench.harness import weights as tenants_weights
from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.engines import EnginePlan
from polder.bench.harness.progress import reporter_for
from polder.bench.harness.runs import Run
from polder.bench.harness.timeline import Timeline
from polder.bench.harness.weights import COUNTERS, moved, put_to_sleep, rouse, weight_counts
from polder.bench.stages import comeback as tenants_comeback
from polder.bench.stages import streaming as tenants_streaming
from polder.bench.stages.streaming import formula_ms, measure_streaming
from polder.bench.tenants_equality import Act, Round, answer, compare_answers
from polder.bench.tenants_metrics import TenantsRun, exhausted_seconds, ratio_intervals, tenants_metrics
from polder.bench.workloads.tenants_models import TENANTS
from polder.broker import client
from polder.broker.wire import Done, Resize, Rouse, Sleep
from polder.errors import EnvironmentFault
from tests.bench.fake_server import FakeEngine, serving
from tests.bench.test_turns_runs import FakeArm


class OneEngineArm(FakeArm):
    """One engine, and a broker where it is given one."""

    def __init__(self, name: str, log_dir: Path, engine: FakeEngine, broker: Path | None = None) -> None:
        super().__init__(name, log_dir, engine)
        plan = EnginePlan(
            name="T2", recipe=TENANTS["T2"], model_path=Path(), max_model_len=2304, core=0, share_bytes=1 << 20
        )
        self.engines = (plan,)
        self._broker = broker

    @property
    def broker(self) -> Path | None:
        return self._broker


class FakeBroker:
    """Answers as the client module does: sleepers sleep and wake at once, and every wake loads 12 layers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[Resize | Sleep | Rouse] = []
        self.asleep = False
        self.wakes = 0
        self.obeys = True
        monkeypatch.setattr(client, "request", self.request)
        monkeypatch.setattr(client, "status", self.status)
        monkeypatch.setattr(tenants_weights, "REPORT_S", 0.0)

    def request(self, _: Path, message: Resize | Sleep | Rouse) -> Done:
        self.asked.append(message)
        if self.obeys and isinstance(message, Sleep):
            self.asleep = True
        elif self.obeys and isinstance(message, Rouse) and self.asleep:
            self.asleep, self.wakes = False, self.wakes + 1
        return Done()

    def status(self, _: Path) -> Any:
        engine = SimpleNamespace(
            engine="T2",
            asleep=self.asleep,
            layers=12,
            segments=0 if self.asleep else 12,
            weights_reason="for a test",
            stats={"wakes_total": float(self.wakes), "weights_loads_total": 12.0 * self.wakes},
        )
        return SimpleNamespace(engines=[engine])


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> FakeBroker:
    return FakeBroker(monkeypatch)


@contextmanager
def fake_engine(**behaviour: float) -> Iterator[FakeEngine]:
    with ExitStack() as stack:
        yield stack.enter_context(serving(FakeEngine(**behaviour)))  # type: ignore[arg-type]


def record(sent_s: float, end_s: float, prompt_tokens: int, **more: Any) -> RequestRecord:
    times = [sent_s + 0.1, end_s]
    return RequestRecord(
        key="x", scheduled_s=sent_s, sent_s=sent_s, token_s=times, end_s=end_s, prompt_tokens=prompt_tokens, **more
    )


def run(arm: str, load: str, *, wakes: float = 0.0) -> TenantsRun:
    records = {"T1": [record(0, 2, 98), record(1, 3, 98)], "T2": [record(4, 6, 48)], "T3": []}
    return TenantsRun(
        load=load,
        run=Run(
            arm=arm,
            started_at=0,
            wall_s=6,
            client_cpu_s=0,
            load_before=0,
            load_after=0,
            records=records,
            preemptions={"T1": 1.0, "T2": 0.0, "T3": 0.0},
            timeline=Timeline(),
        ),
        weights={name: {**dict.fromkeys(COUNTERS, 0.0), "wakes": wakes} for name in records} if wakes else {},
    )


def test_a_pool_is_exhausted_while_the_contexts_in_flight_do_not_fit_it() -> None:
    records = [record(0, 2, 98), record(1, 3, 98), record(5, 6, 98), record(7, 9, 400, error="HTTP 500")]
    assert exhausted_seconds(records, 150) == (4.0, 1.0)
    assert exhausted_seconds(records, 200) == (4.0, 0.0)
    assert exhausted_seconds([], 1) == (0.0, 0.0)


def test_metrics_of_each_engine_in_use_and_of_all_together() -> None:
    found = tenants_metrics([run("polder", "x1", wakes=2.0)] * 2, pool_tokens={"T1": 150, "T2": 150, "T3": 150})
    assert found.keys() == {"T1", "T2", "all"}
    assert found["all"]["requests"] == 6
    assert found["all"]["preemptions"] == 2
    assert found["all"]["output_tokens_per_s"] == pytest.approx(1.0)
    assert found["T1"]["kv_exhausted_part"] == pytest.approx(1 / 3)
    assert found["all"]["kv_exhausted_part"] == pytest.approx(1 / 5)
    assert (found["T1"]["wakes"], found["all"]["wakes"]) == (4, 12), "models without requests wake, too"
    assert "wakes" not in tenants_metrics([run("stock", "x1")], pool_tokens={"T1": 150, "T2": 150})["all"]


def test_intervals_are_of_all_engines_together() -> None:
    intervals = ratio_intervals([run("polder", "x1")], [run("stock", "x1")], name="polder-x1/stock-x1")
    assert intervals.keys() == {
        f"polder-x1/stock-x1:all.{metric}_ms" for metric in ("ttft_p50", "ttft_p99", "tbt_p50", "tbt_p99")
    }
    low, high = intervals["polder-x1/stock-x1:all.ttft_p50_ms"]
    assert low <= 1.0 <= high


def test_weights_are_counted_by_what_engines_report(broker: FakeBroker) -> None:
    before = weight_counts(Path("b"))
    put_to_sleep(Path("b"), "T2")
    rouse(Path("b"), "T2")
    gained = moved(before, weight_counts(Path("b")))
    assert (gained["T2"]["wakes"], gained["T2"]["layers_loaded"]) == (1, 12)
    assert gained["T2"]["sleeps"] == 0, "a counter that is not reported is nought"
    assert broker.asked == [Sleep(engine="T2"), Rouse(engine="T2")]
    assert weight_counts(None) == {}


def test_an_engine_that_never_falls_asleep_is_a_fault(broker: FakeBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tenants_weights, "SETTLE_TIMEOUT_S", 0.0)
    broker.obeys = False
    with pytest.raises(EnvironmentFault, match="T2 does not fall asleep: for a test"):
        put_to_sleep(Path("b"), "T2")


def test_a_reclaimed_model_is_asked_in_turn_with_a_resident_one(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants_comeback, "QUIET_S", 0.0)
    with fake_engine() as engine, reporter_for(Console(quiet=True)).stage("x") as stage:
        arm = OneEngineArm("polder", tmp_path, engine, Path("b"))
        resident, reclaimed = tenants_comeback.resident_and_reclaimed(arm, prompts=(32, 128), samples=2, stage=stage)
        prompts = [str(asked["prompt"]) for asked in engine.asked]
        stock, none = tenants_comeback.resident_and_reclaimed(
            OneEngineArm("stock", tmp_path, engine), prompts=(128,), samples=1, stage=stage
        )
    assert len(set(prompts)) == len(prompts) == 2 * 2 * 3, "a prompt that comes back would be found in the cache"
    assert [type(message) for message in broker.asked[:4]] == [Rouse, Sleep, Rouse, Sleep]
    assert resident.keys() == {"ttft_32_p50_ms", "ttft_128_p50_ms", "failed_requests"}
    assert reclaimed is not None
    assert reclaimed["wakes"] == 5, "the last sleeper is woken by its request, which the fake does not see"
    assert reclaimed["layers_loaded_a_wake"] == 12
    assert none is None
    assert stock.keys() == {"ttft_128_p50_ms", "failed_requests"}


def test_loading_anew_counts_from_the_start(tmp_path: Path) -> None:
    with fake_engine() as engine:
        arm = OneEngineArm("stock", tmp_path, engine)
        found = tenants_comeback.first_token_anew(arm, prompt_tokens=128, started=perf_counter() - 20)
    time_ms = found["ttft_128_p50_ms"]
    assert isinstance(time_ms, float)
    assert 20_000 < time_ms < 22_000
    with fake_engine(fail_with=500) as engine, pytest.raises(EnvironmentFault, match="does not answer"):
        tenants_comeback.first_token_anew(OneEngineArm("stock", tmp_path, engine), prompt_tokens=128, started=0.0)


def test_acts_are_carried_out_in_mid_answer_and_only_where_there_is_a_broker(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants_equality, "SETTLE_S", 0.0)
    rounds = [
        Round(engines=("T2",), acts=(Act(at=0.0, message=Sleep(engine="T2")), Act(at=0.5, message=Rouse(engine="T2")))),  # type: ignore[arg-type]
        Round(engines=("T2",), acts=()),
    ]
    asked = {"T2": [("T20", [5] * 64)]}
    with fake_engine(token_s=0.002) as engine:
        ours = asyncio.run(answer(OneEngineArm("polder", tmp_path, engine, Path("b")), asked, rounds))
        theirs = asyncio.run(answer(OneEngineArm("stock", tmp_path, engine), asked, rounds))
    assert broker.asked == [Sleep(engine="T2"), Rouse(engine="T2")]
    assert set(theirs.counts.values()) == {0.0}
    compared = compare_answers(theirs, ours)
    assert (compared["answers_compared"], compared["answers_different"]) == (2, 0)
    assert (compared["wakes"], compared["layers_loaded"]) == (1, 12)


def test_an_act_that_is_refused_ends_the_stage(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Done:
        raise EnvironmentFault("refused")

    monkeypatch.setattr(client, "request", refuse)
    monkeypatch.setattr(tenants_equality, "SETTLE_S", 0.0)
    rounds = [Round(engines=("T2",), acts=(Act(at=0.0, message=Sleep(engine="T2")),))]
    with fake_engine(token_s=0.001) as engine, pytest.raises(EnvironmentFault, match="refused"):
        asyncio.run(answer(OneEngineArm("polder", tmp_path, engine, Path("b")), {"T2": [("T20", [5] * 64)]}, rounds))


def test_the_formula_takes_the_slots_that_are_faster_and_possible() -> None:
    assert formula_ms(12, 1, step_ms=24.0, layer_load_s=0.001) == pytest.approx(24.0), "hidden in the gaps"
    assert formula_ms(12, 11, step_ms=24.0, layer_load_s=0.010) == pytest.approx(24 + 12 * 10), (
        "each waits for its copy"
    )
    assert formula_ms(12, 10, step_ms=24.0, layer_load_s=0.010) == pytest.approx(120), "two slots: the link alone"


@pytest.mark.parametrize(("loads_a_step", "holds"), [(24.0, True), (0.0, False)])
def test_streaming_is_measured_for_every_number_of_segments(
    loads_a_step: float, holds: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = [4]
    stats = {"weights_loads_total": 0.0, "weights_copy_seconds_total": 0.0}

    async def step_ms(*_: object) -> float:
        if held[-1] < 4:
            stats["weights_loads_total"] += loads_a_step
            stats["weights_copy_seconds_total"] += loads_a_step * 0.010
        return 40.0 if held[-1] == 4 else 50.0

    monkeypatch.setattr(tenants_streaming, "_step_ms", step_ms)
    monkeypatch.setattr(tenants_streaming, "REPORT_S", 0.0)
    monkeypatch.setattr(tenants_streaming, "hold", lambda broker, engine, segments: held.append(segments))
    monkeypatch.setattr(tenants_streaming, "rouse", lambda broker, engine: held.append(4))
    status = SimpleNamespace(engines=[SimpleNamespace(engine="T2", layers=4, stats=stats)])
    monkeypatch.setattr(client, "status", lambda _: status)
    arm = OneEngineArm("polder", tmp_path, FakeEngine(), Path("b"))
    with reporter_for(Console(quiet=True)).stage("x") as stage:
        measuring = measure_streaming(arm, "T2", stage=stage)
        if not holds:
            with pytest.raises(EnvironmentFault, match="3 of 4 segments and copies nothing"):
                asyncio.run(measuring)
            return
        found = asyncio.run(measuring)
    assert held[1:] == [4, 3, 2, 1, 4]
    assert (found["step_0_ms"], found["step_3_ms"]) == (40.0, 50.0)
    assert found["formula_2_ms"] == pytest.approx(40.0), "four layers in two slots, each copied in 10 ms"
    assert found["worst_error"] == pytest.approx(max(abs(50 - found[f"formula_{n}_ms"]) / 50 for n in (1, 2, 3)))  # type: ignore[operator]
