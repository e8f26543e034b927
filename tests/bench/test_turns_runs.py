"""Runs of several arms without engines: the pool of arms, and figures out of a played run."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from rich.console import Console

from polder.bench.harness.arms import Arm
from polder.bench.harness.completions import encode_body
from polder.bench.harness.driver import ClosedLoop, Endpoint, OpenLoop, Turn
from polder.bench.harness.pool import ArmPool
from polder.bench.harness.progress import reporter_for
from polder.bench.harness.runs import run_once
from polder.bench.harness.scrape import Sample
from polder.bench.turns_equality import TIER_HITS, answer, compare_answers
from polder.bench.turns_metrics import ratio_intervals, turns_metrics
from tests.bench.fake_server import FakeEngine, serving


class FakeArm(Arm):
    """An arm on a fake server: no processes, counters of its own."""

    def __init__(self, name: str, log_dir: Path, engine: FakeEngine | None = None, journal: list[str] | None = None):
        super().__init__(name, [], log_dir)
        self._engine = engine or FakeEngine()
        self._journal = journal if journal is not None else []
        self.resets = 0

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint(base_url=self._engine.url)

    def start(self) -> None:
        self._journal.append(f"start {self.name}")

    def wait_ready(self) -> None:
        self._journal.append(f"ready {self.name}")

    def check(self) -> None:
        pass

    def stop(self) -> None:
        self._journal.append(f"stop {self.name}")

    def engine_url(self, engine: str) -> str:
        return self._engine.url

    def reset_prefix_caches(self) -> None:
        self.resets += 1

    def preemptions(self) -> dict[str, float]:
        return {"A": 0.0, "B": 0.0}

    def samples(self) -> dict[str, dict[str, Sample]]:
        found = {
            TIER_HITS: Sample(value=16.0 * len(self._engine.asked), kind="counter"),
            "polder_tier_used_bytes{tier=peer}": Sample(value=4096.0, kind="gauge"),
        }
        return {"A": found, "B": {}}


@pytest.fixture
def journal() -> list[str]:
    return []


@contextmanager
def fake_arm(tmp_path: Path, **behaviour: float) -> Iterator[FakeArm]:
    with ExitStack() as stack:
        engine = stack.enter_context(serving(FakeEngine(**behaviour)))  # type: ignore[arg-type]
        yield FakeArm("polder", tmp_path, engine)


def test_at_most_two_arms_are_up_and_the_one_used_longest_ago_goes(tmp_path: Path, journal: list[str]) -> None:
    prepared: list[str] = []
    pool = ArmPool(
        lambda name: FakeArm(name, tmp_path, journal=journal), lambda arm: prepared.append(arm.name), at_most=2
    )
    for name in ("stock", "polder", "native", "native", "polder"):
        assert pool.get(name).name == name
    assert [line for line in journal if not line.startswith("ready")] == [
        "start stock",
        "start polder",
        "stop stock",
        "start native",
    ]
    assert prepared == ["stock", "polder", "native"]
    pool.close()
    assert journal[-2:] == ["stop native", "stop polder"]


def test_an_arm_that_never_gets_ready_is_stopped_with_the_others(tmp_path: Path, journal: list[str]) -> None:
    class Broken(FakeArm):
        def wait_ready(self) -> None:
            raise RuntimeError("no engine")

    pool = ArmPool(lambda name: Broken(name, tmp_path, journal=journal), lambda _: None, at_most=2)
    with pytest.raises(RuntimeError):
        pool.get("stock")
    pool.close()
    assert journal == ["start stock", "stop stock"]


def turns(model: str, count: int) -> list[Turn]:
    body = encode_body(model=model, prompt=list(range(100, 164)), output_tokens=3)
    return [Turn(key=f"{model}{number}", body=body, output_tokens=3) for number in range(count)]


def test_a_run_brings_the_tiers_counters_and_splits_its_hits(tmp_path: Path) -> None:
    with fake_arm(tmp_path, cached_tokens=48, token_s=0.001) as arm, reporter_for(Console()).stage("x") as stage:
        load_a, load_b = ClosedLoop(users=[turns("A", 4)]), OpenLoop(turns=turns("B", 4))
        runs = [asyncio.run(run_once(arm, load_a, load_b, stage)) for _ in range(2)]
    found = turns_metrics(runs, ideal_hit_ratio=0.75)
    assert arm.resets == 2
    assert found["A"]["requests"] == 8
    assert found["A"]["hit_ratio"] == 0.75
    assert found["A"]["hit_ratio_by_tier"] == pytest.approx({"own": 0.25, "tiers": 0.5, "computed": 0.25})
    assert found["A"]["counters"] == {TIER_HITS: 256.0, "polder_tier_used_bytes{tier=peer}": 4096.0}
    intervals = ratio_intervals(runs, runs, name="polder/stock")
    assert intervals.keys() == {
        f"polder/stock:{engine}.{metric}_ms"
        for engine in "AB"
        for metric in ("ttft_p50", "ttft_p90", "ttft_p99", "tbt_p99")
    }
    low, high = intervals["polder/stock:A.ttft_p50_ms"]
    assert low <= 1.0 <= high


def test_answers_are_compared_round_by_round_with_what_the_tiers_served(tmp_path: Path) -> None:
    rounds = [{"A": [("A0", [5] * 40)], "B": [("B0", [6] * 40)]}] * 2
    with fake_arm(tmp_path, cached_tokens=32) as arm:
        found = asyncio.run(answer(arm, rounds))
    compared = compare_answers(found, found)
    assert compared["answers_compared"] == 4
    assert compared["answers_different"] == 0
    assert compared["cached_tokens"] == 64
    assert compared["tier_hit_tokens"] == 64
