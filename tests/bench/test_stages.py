"""What stages make of what they see: resizes, taxes, answers, sleep and streaming, all without engines."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest
from rich.console import Console

from polder.bench.harness import control
from polder.bench.harness.arms import ArmSpec
from polder.bench.harness.control import obeyed
from polder.bench.harness.driver import RequestRecord
from polder.bench.harness.progress import Reporter
from polder.bench.harness.runs import Run
from polder.bench.harness.scrape import PREEMPTIONS, gained
from polder.bench.harness.timeline import Timeline, new_givebacks
from polder.bench.report.metrics import (
    WEIGHT_COUNTERS,
    arm_metrics,
    exhausted_seconds,
    ratio_intervals,
    weight_metrics,
)
from polder.bench.stages import restart, weights
from polder.bench.stages.context import planned_tbt_ms, planned_ttft_ms
from polder.bench.stages.equality import OUTPUT_TOKENS, Answered, Round, answer, compare
from polder.bench.stages.resize import Resized, resize_metrics
from polder.bench.stages.tax import tax_intervals, tax_metrics
from polder.bench.suites.context import ContextSuite
from polder.broker import client, wire
from polder.broker.wire import Done, Resize, Sleep, Wake
from polder.errors import EnvironmentFault
from polder.planner.context_cost import Stream
from tests.bench.fakes import LAYERS, FakeArm, FakeBroker, no_waiting, one_engine

BROKER = Path("broker")


@pytest.fixture
def broker(monkeypatch: pytest.MonkeyPatch) -> FakeBroker:
    no_waiting(monkeypatch)
    return FakeBroker(monkeypatch)


def up(tmp_path: Path, system: Any = "polder", **behaviour: Any) -> FakeArm:
    arm = FakeArm(system, ArmSpec(system, [one_engine()]), tmp_path, [], **behaviour)
    arm.start()
    return arm


def record(sent_s: float, end_s: float, prompt_tokens: int = 98, **more: Any) -> RequestRecord:
    times = {"scheduled_s": sent_s, "sent_s": sent_s, "token_s": [sent_s + 0.1, end_s], "end_s": end_s}
    return RequestRecord(key="x", prompt_tokens=prompt_tokens, **(times | more))


def run(arm: str, *, wakes: float = 0.0) -> Run:
    records = {"T1": [record(0, 2), record(1, 3)], "T2": [record(4, 6, 48)], "T3": []}
    counts = dict.fromkeys(WEIGHT_COUNTERS.values(), 0.0) | {WEIGHT_COUNTERS["wakes"]: wakes}
    times = {"started_at": 0.0, "wall_s": 6.0, "client_cpu_s": 0.0, "load_before": 0.0, "load_after": 0.0}
    return Run(
        arm=arm,
        records=records,
        timeline=Timeline(),
        samples={engine: {PREEMPTIONS: float(engine == "T1")} | (counts if wakes else {}) for engine in records},
        **times,  # type: ignore[arg-type]
    )


# ---------------------------------------------------------------------- figures


@pytest.mark.parametrize(
    ("before", "now", "new"),
    [
        ([], [1.0], [1.0]),
        ([1.0, 2.0], [1.0, 2.0], []),
        ([1.0, 2.0, 3.0], [3.0, 4.0, 5.0], [4.0, 5.0]),
        ([1.0, 2.0], [7.0, 8.0], [7.0, 8.0]),
    ],
)
def test_new_givebacks_also_when_old_ones_have_left(before: list[float], now: list[float], new: list[float]) -> None:
    assert new_givebacks(before, now) == new


def test_resize_metrics_take_the_longest_gap_around_a_resize() -> None:
    times = [0.1 * i for i in range(20)]
    times[10:] = [t + 0.25 for t in times[10:]]  # a gap of 350 ms from 0.9 to 1.25
    resized = [
        Resized(grew=False, started=100.95, ended=101.0, engine_ms=30),
        Resized(grew=True, started=101.6, ended=101.62, engine_ms=15),
    ]
    found = resize_metrics(resized, [record(0, 3, token_s=times)], started_at=100.0)
    assert found["tbt_p50_ms"] == pytest.approx(100)
    assert found["shrink_p50_ms"] == pytest.approx(50)
    assert found["shrink_engine_max_ms"] == 30
    assert found["shrink_step_delay_max_ms"] == pytest.approx(250)
    assert found["grow_step_delay_max_ms"] == pytest.approx(0, abs=1e-6)


def tax_run(scale: float) -> list[RequestRecord]:
    return [record(i, i + 0.2 * scale, token_s=[i + 0.1 * scale, i + 0.2 * scale]) for i in range(5)]


def test_tax_is_paired_and_its_ratio_is_the_metrics_ratio() -> None:
    stock, polder = [tax_run(1.0), tax_run(2.0)], [tax_run(1.01), tax_run(2.02)]
    intervals = tax_intervals(stock, polder)
    assert intervals["ttft_p50_ms"] == pytest.approx((1.01, 1.01))
    assert intervals["busy_output_tokens_per_s"] == pytest.approx((1 / 1.01, 1 / 1.01))
    ratio = tax_metrics(polder)["ttft_p50_ms"] / tax_metrics(stock)["ttft_p50_ms"]  # type: ignore[operator]
    assert ratio == pytest.approx(1.01)


def test_a_pool_is_exhausted_while_the_contexts_in_flight_do_not_fit_it() -> None:
    records = [record(0, 2), record(1, 3), record(5, 6), record(7, 9, 400, error="HTTP 500")]
    assert exhausted_seconds(records, 150) == (4.0, 1.0)
    assert exhausted_seconds(records, 200) == (4.0, 0.0)
    assert exhausted_seconds([], 1) == (0.0, 0.0)


def test_metrics_of_each_engine_in_use_and_of_all_together() -> None:
    runs, tokens = [run("polder", wakes=2.0)] * 2, {"T1": 150, "T2": 150, "T3": 150}
    found = arm_metrics(runs)
    assert found.keys() == {"T1", "T2", "all"}
    assert (found["all"]["requests"], found["all"]["preemptions"]) == (6, 2)
    assert found["all"]["output_tokens_per_s"] == pytest.approx(1.0)
    assert weight_metrics(runs, tokens, "T1")["kv_exhausted_part"] == pytest.approx(1 / 3)
    assert weight_metrics(runs, tokens, "all")["kv_exhausted_part"] == pytest.approx(1 / 5)
    assert weight_metrics(runs, tokens, "all")["wakes"] == 12, "models without requests wake, too"
    assert "wakes" not in weight_metrics([run("stock")], tokens, "all")


def test_intervals_of_single_engines_and_of_all_together() -> None:
    intervals = ratio_intervals([run("polder")], [run("stock")], name="polder/stock")
    quantiles = [f"{metric}_p{q}_ms" for metric in ("ttft", "tbt") for q in (50, 90, 99)]
    keys = {f"polder/stock:{engine}.{metric}" for engine in ("T1", "T2", "all") for metric in quantiles}
    assert intervals.keys() == keys, "T3 has no requests"
    low, high = intervals["polder/stock:all.ttft_p50_ms"]
    assert low <= 1.0 <= high


def test_answers_differ_when_any_token_does() -> None:
    same = list(range(OUTPUT_TOKENS))
    stock, ours = (
        Answered(rounds=[{"a": same, "b": of_b}], cached_tokens=5.0, counts={}) for of_b in (same, [*same[:-1], 7])
    )
    found = compare(stock, ours)
    assert (found["answers_compared"], found["answers_different"], found["failed_requests"]) == (2, 1, 0)
    short = Answered(rounds=[{"a": same[:5], "b": same}], cached_tokens=0.0, counts={})
    assert compare(stock, short)["failed_requests"] == 1


def test_the_plan_adds_nothing_where_nothing_is_windowed_and_the_links_time_where_it_is_the_bound() -> None:
    plan, stream = ContextSuite.quick, Stream(link_bytes_per_s=1e9, window_layers=2)
    shape = plan.shape("window")
    short, long = plan.longest("stock") // 2, plan.longest("window")
    assert planned_tbt_ms(shape, stream, short, 14.0) == pytest.approx(14.0)
    link_ms = shape.windowed_blocks(long - 32) * shape.block_bytes * shape.window.layers / 1e9 * 1e3
    assert planned_tbt_ms(shape, stream, long, 14.0) == pytest.approx(link_ms, rel=0.1)
    ttfts = {n: 0.6 * (n - 64) + 1e-4 * (n - 64) ** 2 for n in (short, 2 * short, long)}
    assert planned_ttft_ms(shape, stream, short, ttfts) == pytest.approx(ttfts[short])
    planned = planned_ttft_ms(shape, stream, long, ttfts)
    assert ttfts[long] <= planned <= ttfts[long] + link_ms * -(-long // plan.batched_tokens)


# ---------------------------------------------------------------------- weights


def test_engines_are_counted_by_what_they_report(broker: FakeBroker, tmp_path: Path) -> None:
    arm, stock = up(tmp_path), up(tmp_path, "stock")
    assert arm.broker is not None
    before = arm.samples()
    for order in (Sleep(engine="T2"), Wake(engine="T2")):
        obeyed(arm.broker, order)
    found = gained(before["T2"], arm.samples()["T2"])
    assert [found[WEIGHT_COUNTERS[name]] for name in ("wakes", "sleeps", "layers_loaded")] == [1, 1, LAYERS]
    assert not stock.samples()["T2"].keys() & WEIGHT_COUNTERS.values()
    for one in (arm, stock):
        one.stop()


@pytest.mark.parametrize(
    "order", [Sleep(engine="T2"), wire.Stream(engine="T2", segments=2), Resize(engine="T2", units=5)]
)
def test_an_engine_that_does_not_obey_is_a_fault(
    order: control.Order, broker: FakeBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control, "SETTLE_TIMEOUT_S", 0.0)
    broker.obeys = False
    with pytest.raises(EnvironmentFault, match="T2 does not"):
        obeyed(BROKER, order)


def test_a_reclaimed_model_is_asked_in_turn_with_a_resident_one(broker: FakeBroker, tmp_path: Path) -> None:
    with Reporter(Console(quiet=True)).stage("x") as update:
        arm = up(tmp_path)
        resident, reclaimed = weights.resident_and_reclaimed(arm, prompts=(32, 128), samples=2, update=update)
        prompts = [str(asked["prompt"]) for asked in arm.engine.asked]
        stock = up(tmp_path, "stock")
        _, none = weights.resident_and_reclaimed(stock, prompts=(128,), samples=1, update=update)
        for one in (arm, stock):
            one.stop()
    assert len(set(prompts)) == len(prompts) == 2 * 2 * 3, "a prompt that comes back would be found in the cache"
    assert [type(message) for message in broker.asked[:4]] == [Wake, Sleep, Wake, Sleep]
    assert resident.keys() == {"ttft_32_p50_ms", "ttft_128_p50_ms", "failed_requests"}
    assert reclaimed["layers_loaded_a_wake"] == LAYERS
    assert not none


def test_loading_anew_counts_from_the_start_of_the_arm(broker: FakeBroker, tmp_path: Path) -> None:
    def start(**behaviour: Any) -> FakeArm:
        started = perf_counter()
        while perf_counter() - started < 0.2:
            pass
        return up(tmp_path, "stock", **behaviour)

    def measured(**behaviour: Any) -> dict[str, Any]:
        with Reporter(Console(quiet=True)).stage("x") as update:
            return weights.measure_comeback(
                "stock", lambda: start(**behaviour), prompts=(128,), anew_prompt=128, samples=1, update=update
            )

    found = measured()
    assert found["stock-anew"]["ttft_128_p50_ms"] > 200
    assert found.keys() == {"stock-anew", "stock-resident"}
    with pytest.raises(EnvironmentFault, match="does not answer"):
        measured(fail_with=500)


def test_acts_are_carried_out_in_mid_answer_and_only_where_there_is_a_broker(
    broker: FakeBroker, tmp_path: Path
) -> None:
    acts: Any = {0.0: Sleep(engine="T2"), 0.5: Wake(engine="T2")}
    rounds = [Round({"T2": {"T20": [5] * 64}}, of) for of in (acts, {})]
    ours, theirs = (
        answer(up(tmp_path, system, token_s=0.002), rounds, {"wakes": WEIGHT_COUNTERS["wakes"]}, settle_s=0.0)
        for system in ("polder", "stock")
    )
    assert broker.asked == [Sleep(engine="T2"), Wake(engine="T2")]
    found = compare(theirs, ours)
    assert (found["answers_compared"], found["answers_different"]) == (2, 0)
    assert (found["wakes"], theirs.counts["wakes"]) == (1, 0)


def test_an_act_that_is_refused_ends_the_stage(
    broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> Done:
        raise EnvironmentFault("refused")

    monkeypatch.setattr(client, "request", refuse)
    rounds = [Round({"T2": {"T20": [5] * 64}}, {0.0: Sleep(engine="T2")})]
    with pytest.raises(EnvironmentFault, match="refused"):
        answer(up(tmp_path, token_s=0.001), rounds, {}, settle_s=0.0)


def test_the_formula_takes_the_slots_that_are_faster_and_possible() -> None:
    formula = weights.formula_ms
    assert formula(12, 1, step_ms=24.0, layer_load_s=0.001) == pytest.approx(24.0), "hidden in the gaps"
    assert formula(12, 11, step_ms=24.0, layer_load_s=0.010) == pytest.approx(24 + 12 * 10), "each waits for its copy"
    assert formula(12, 10, step_ms=24.0, layer_load_s=0.010) == pytest.approx(120), "two slots: the link alone"


@pytest.mark.parametrize("copies", [True, False])
def test_streaming_is_measured_for_every_number_of_segments(
    copies: bool, broker: FakeBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not copies:
        monkeypatch.setattr(broker, "count", lambda **_: None)
    arm = up(tmp_path, token_s=0.0001)
    with Reporter(Console(quiet=True)).stage("x") as update:
        if not copies:
            with pytest.raises(EnvironmentFault, match="3 of 4 segments and copies nothing"):
                weights.measure_streaming(arm, "T2", update)
            return
        found = weights.measure_streaming(arm, "T2", update)
    assert [message.segments for message in broker.asked[:-1]] == [4, 3, 2, 1]  # type: ignore[union-attr]
    assert {f"{name}_{n}_ms" for name in ("step", "formula", "layer") for n in (1, 2, 3)} < found.keys()
    assert found["layer_1_ms"] == pytest.approx(1.0)


# ---------------------------------------------------------------------- restart


def restart_arm(name: str, folder: Path, rate: float | None = 400e6) -> ArmSpec:
    return restart.restart_arm(name, one_engine("A"), folder, "polder-test-region", rate)


def test_after_a_restart_native_tiers_have_the_bytes_of_polders(tmp_path: Path) -> None:
    (polder,), (native,) = (restart_arm(name, tmp_path).engines for name in ("polder-disk", "native-fs"))
    extra = json.loads(native.extra_args[1])["kv_connector_extra_config"]
    assert extra["cpu_bytes_to_use"] == polder.keys["host"] + restart.STAGED_BYTES
    assert extra["disk_bytes_per_s"] == len(polder.memory["disks"]) * restart.DISK_BYTES_PER_S
    assert polder.extra_env["POLDER_LINKS"] == "host=400MB/s,disk=75MB/s"
    assert not restart_arm("polder-disk", tmp_path, None).engines[0].extra_env


def test_the_region_is_where_vllm_puts_it() -> None:
    pytest.importorskip("vllm")
    from vllm.config import KVTransferConfig
    from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion

    (engine,) = restart_arm("native-fs", Path("/disks"), None).engines
    engine_id = KVTransferConfig(**json.loads(engine.extra_args[1])).engine_id
    assert engine_id == "polder-test-region"
    region = SharedOffloadRegion(engine_id=engine_id, num_chunks=1, rank=0, kv_bytes_per_chunk=4096, cpu_page_size=4096)
    try:
        assert restart.offload_file(engine_id).exists()
    finally:
        region.cleanup()
    assert not restart.offload_file(engine_id).exists()
