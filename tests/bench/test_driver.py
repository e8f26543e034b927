"""The driver against a server without a model: who is sent when, and what is written down."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from polder.bench.harness.driver import ClosedLoop, OpenLoop, Played, Tally, Turn, Workload, greedy, play
from tests.bench.fake_server import FakeEngine, serving

SLACK_S = 0.15
"""Delays of a machine that others use too."""


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    with serving(FakeEngine()) as served:
        yield served


def turn(key: str, *, tokens: int = 2, **more: object) -> Turn:
    return greedy("m", key, [5, 6, 7], tokens, **more)


def run(engine: FakeEngine, workload: Workload) -> Played:
    return asyncio.run(play({"m": (engine.url, workload)}))


def test_a_reply_is_written_down_token_by_token(engine: FakeEngine) -> None:
    engine.first_token_s, engine.token_s, engine.cached_tokens = 0.1, 0.05, 2
    (record,) = run(engine, OpenLoop(turns=[turn("a", tokens=3)])).records["m"]
    assert record.error == ""
    assert record.output_ids == [100, 101, 102]
    assert (record.prompt_tokens, record.cached_tokens) == (3, 2)
    first, second, third = record.token_s
    assert first - record.sent_s >= 0.1
    assert second - first >= 0.04
    assert third <= record.end_s


def test_the_body_asks_for_exactly_these_greedy_tokens(engine: FakeEngine) -> None:
    run(engine, OpenLoop(turns=[turn("a", tokens=7)]))
    (body,) = engine.asked
    assert body["prompt"] == [5, 6, 7]
    assert (body["max_tokens"], body["temperature"], body["ignore_eos"]) == (7, 0, True)
    assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})


def test_closed_loop_waits_for_the_reply_and_then_thinks(engine: FakeEngine) -> None:
    engine.first_token_s = 0.2
    user = [turn("a"), turn("b", think_s=0.3)]
    first, second = run(engine, ClosedLoop(users=[user])).records["m"]
    assert second.scheduled_s == pytest.approx(first.end_s + 0.3)
    assert second.scheduled_s <= second.sent_s <= second.scheduled_s + SLACK_S
    assert engine.asked_at[1] - engine.asked_at[0] >= 0.5


def test_closed_loop_users_start_one_after_the_other_and_do_not_wait_for_each_other(engine: FakeEngine) -> None:
    engine.first_token_s = 0.3
    played = run(engine, ClosedLoop(users=[[turn("a")], [turn("b")], [turn("c")]], stagger_s=0.1))
    records = {record.key: record for record in played.records["m"]}
    assert [records[key].scheduled_s for key in "abc"] == pytest.approx([0.0, 0.1, 0.2])
    assert records["c"].sent_s < records["a"].end_s


def test_open_loop_does_not_wait_for_slow_replies(engine: FakeEngine) -> None:
    engine.first_token_s = 0.5
    turns = [turn(str(number), at_s=0.1 * number) for number in range(4)]
    records = {record.key: record for record in run(engine, OpenLoop(turns=turns)).records["m"]}
    for number in range(4):
        assert records[str(number)].sent_s == pytest.approx(0.1 * number, abs=SLACK_S)
    assert records["3"].sent_s < records["0"].end_s


def test_a_run_ends_with_its_last_measured_request(engine: FakeEngine) -> None:
    load = [turn("load", at_s=0.0), turn("never", at_s=60.0, measured=False)]
    played = run(engine, OpenLoop(turns=load))
    assert [record.key for record in played.records["m"]] == ["load"]
    assert played.wall_s < 10


def test_engines_are_played_at_once_until_both_are_through(engine: FakeEngine) -> None:
    ended: list[int] = []
    tally = Tally(on_end=ended.append)
    workloads: dict[str, tuple[str, Workload]] = {
        "A": (engine.url, ClosedLoop(users=[[turn("a")]])),
        "B": (engine.url, OpenLoop(turns=[turn("b", at_s=0.3)])),
    }
    played = asyncio.run(play(workloads, tally))
    assert {name: len(records) for name, records in played.records.items()} == {"A": 1, "B": 1}
    assert (tally.ended, tally.output_tokens, tally.over, ended) == (2, 4, True, [1, 2])
    assert played.client_cpu_s > 0


def test_a_refusal_is_a_failed_request_and_the_user_goes_on(engine: FakeEngine) -> None:
    engine.fail_with = 503
    records = run(engine, ClosedLoop(users=[[turn("a"), turn("b")]])).records["m"]
    assert [record.error[:8] for record in records] == ["HTTP 503", "HTTP 503"]


def test_a_short_reply_is_a_failed_request(engine: FakeEngine) -> None:
    engine.cut_after = 1
    (record,) = run(engine, OpenLoop(turns=[turn("a", tokens=3)])).records["m"]
    assert record.error == "1 tokens came, 3 were asked for"


def test_a_server_that_is_not_there_fails_requests_not_the_run() -> None:
    (record,) = asyncio.run(play({"m": ("http://127.0.0.1:9", OpenLoop(turns=[turn("a")]))})).records["m"]
    assert record.error.startswith("ConnectError")
