"""Who gives weights up and who gets them back: the rules, one test each, and that nothing moves to and fro."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polder.errors import ConfigError
from polder.planner.sharing import Balance, Pattern, SharingConfig, WeightView, arrival_pattern, weight_moves

TURNS = Pattern("round-robin", 1.0)
IRREGULAR = Pattern("irregular", 0.5)
CONFIG = SharingConfig(low_ratio=0.0, high_ratio=0.1, min_hold_s=5.0, min_idle_s=1.0)


def view(name: str = "a", **values: object) -> WeightView:
    defaults: dict[str, object] = {"layers": 10, "layer_pages": 4, "segments": 10, "spare_segments": 10, "idle_s": 60.0}
    return WeightView(name=name, **{**defaults, **values})  # type: ignore[arg-type]


def missing(pages: int, *, waker: int = 0) -> Balance:
    return Balance(total_pages=200, kv_missing_pages=pages, waker_missing_pages=waker)


def ample(pages: int) -> Balance:
    return Balance(total_pages=200, ample_pages=pages)


def takes(
    balance: Balance, *views: WeightView, pattern: Pattern = TURNS, config: SharingConfig = CONFIG
) -> dict[str, int]:
    moves = weight_moves(balance, views, pattern, config)
    assert not moves.gives
    assert all(move.reason for move in moves.takes.values())
    return {name: move.segments for name, move in moves.takes.items()}


def gives(balance: Balance, *views: WeightView, config: SharingConfig = CONFIG) -> dict[str, int]:
    moves = weight_moves(balance, views, TURNS, config)
    assert not moves.takes
    return {name: move.segments for name, move in moves.gives.items()}


def test_nothing_moves_while_nothing_is_missing_or_ample() -> None:
    assert takes(missing(0), view()) == {}
    assert gives(ample(0), view(segments=5)) == {}


def test_when_engines_take_turns_the_one_that_ran_last_sleeps() -> None:
    assert takes(missing(4), view("a", idle_s=9.0), view("b", idle_s=2.0)) == {"b": 10}


def test_else_the_one_that_expects_its_next_request_last_sleeps() -> None:
    late, soon = view("a", idle_s=2.0, next_use_s=500.0), view("b", idle_s=9.0, next_use_s=3.0)
    assert takes(missing(4), soon, late, pattern=IRREGULAR) == {"a": 10}


def test_an_idle_engine_is_taken_wholly_unless_it_can_run_without_what_is_missing() -> None:
    assert takes(missing(8), view(streamable=1)) == {"a": 10}
    assert takes(missing(8), view(streamable=4)) == {"a": 2}
    assert takes(missing(8), view(streamable=4, segments=7)) == {"a": 7}


def test_what_is_taken_beyond_need_never_costs_another_its_weights() -> None:
    config = SharingConfig(low_ratio=0.05, min_hold_s=5.0, min_idle_s=1.0)
    assert takes(missing(8), view(streamable=5), config=config) == {"a": 5}
    assert takes(missing(40), view("a"), view("b", idle_s=70.0), config=config) == {"a": 10}


def test_idle_engines_go_before_spare_layers_of_those_that_serve() -> None:
    serving = view("a", idle_s=0.0, spare_segments=4)
    assert takes(missing(8), serving, view("b")) == {"b": 10}
    assert takes(missing(48), serving, view("b")) == {"b": 10, "a": 2}
    assert takes(missing(400), serving) == {"a": 4}


def test_one_that_serves_keeps_the_layers_that_it_must_have() -> None:
    assert takes(missing(400), view(idle_s=0.0, spare_segments=9)) == {"a": 5}
    assert takes(missing(400), view(idle_s=0.0, spare_segments=9, segments=6)) == {"a": 1}


def test_a_floor_is_never_taken() -> None:
    config = SharingConfig(floor_ratio=0.25, min_idle_s=1.0)
    assert takes(missing(400), view(), config=config) == {"a": 7}


def test_who_wakes_or_has_just_stopped_is_left_alone() -> None:
    assert takes(missing(8), view(waking=True), view("b", idle_s=0.5), view("c", segments=0)) == {}


def test_the_hold_time_counts_for_requests_and_not_for_an_engine_that_wakes() -> None:
    recent = view(since_change_s=1.0)
    assert takes(missing(8), recent) == {}
    assert takes(missing(0, waker=8), recent) == {"a": 10}


def waiting(s: float) -> Balance:
    return Balance(total_pages=200, waker_missing_pages=40, waker_waits_s=s)


def test_after_a_turns_length_one_that_serves_is_paused_for_one_that_waits() -> None:
    serving = view(idle_s=0.0, spare_segments=0)
    assert takes(waiting(2.9), serving) == {}
    moves = weight_moves(waiting(3.1), [serving], TURNS, CONFIG)
    assert [(name, move.segments, move.preempt) for name, move in moves.takes.items()] == [("a", 10, True)]


def test_nobody_is_paused_before_its_own_turn_is_over_or_more_than_needed() -> None:
    just, long, longer = (
        view(n, idle_s=0.0, spare_segments=2, since_change_s=s) for n, s in zip("abc", (1, 5, 9), strict=True)
    )
    assert takes(waiting(10.0), just, long, longer) == {"a": 2, "b": 2, "c": 10}
    assert takes(waiting(10.0), just) == {"a": 2}
    assert takes(waiting(10.0), long, view("d")) == {"d": 10}, "not if one that is idle has enough"


def test_nobody_is_paused_for_requests_of_one_that_runs() -> None:
    assert takes(Balance(total_pages=200, kv_missing_pages=40), view(idle_s=0.0, spare_segments=0)) == {}


def test_who_serves_gets_its_layers_back_first() -> None:
    asleep, serving = view("a", segments=0), view("b", segments=8, idle_s=0.0)
    assert gives(ample(68), asleep, serving) == {"a": 10, "b": 2}
    assert gives(ample(64), asleep, serving) == {"b": 2}, "one that sleeps gets all or none"


def test_of_those_that_sleep_the_one_needed_soonest_comes_back() -> None:
    late, soon = view("a", segments=0, next_use_s=50.0), view("b", segments=0, next_use_s=2.0)
    assert gives(ample(70), late, soon) == {"b": 10}


def test_giving_back_waits_and_leaves_the_high_watermark() -> None:
    assert gives(ample(100), view(segments=0, since_change_s=4.9)) == {}
    assert gives(ample(59), view(segments=0)) == {}
    assert gives(ample(60), view(segments=0)) == {"a": 10}


def test_an_operators_word_holds() -> None:
    assert gives(ample(200), view(segments=0, pinned=True)) == {}


@pytest.mark.parametrize("bad", [{"low_ratio": 0.2}, {"floor_ratio": 1.5}, {"min_hold_s": -1.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        SharingConfig(**bad)


views = st.builds(
    lambda number, layers, pages, held, spare, idle, hold, streamable, waking: view(
        str(number),
        layers=layers,
        layer_pages=pages,
        segments=min(held, layers),
        spare_segments=min(spare, held, layers),
        idle_s=idle,
        since_change_s=hold,
        streamable=streamable,
        waking=waking,
    ),
    st.uuids(),
    st.integers(1, 12),
    st.integers(1, 9),
    st.integers(0, 12),
    st.integers(0, 12),
    st.sampled_from([0.0, 0.5, 10.0]),
    st.sampled_from([0.0, 60.0]),
    st.integers(0, 12),
    st.booleans(),
)


@given(st.lists(views, max_size=5), st.integers(0, 150), st.integers(0, 150), st.sampled_from([TURNS, IRREGULAR]))
def test_any_decision_can_be_carried_out(engines: list[WeightView], lacking: int, much: int, pattern: Pattern) -> None:
    balance = Balance(total_pages=300, kv_missing_pages=lacking, ample_pages=much)
    config = SharingConfig(floor_ratio=0.2)
    moves = weight_moves(balance, engines, pattern, config)
    by_name = {engine.name: engine for engine in engines}
    assert not any(move.preempt for move in moves.takes.values())
    for name, move in moves.takes.items():
        engine = by_name[name]
        assert 0 < move.segments <= min(engine.segments, engine.spare_segments)
        assert not engine.waking
        assert engine.segments - move.segments >= config.floor_ratio * engine.layers
    for name, move in moves.gives.items():
        assert 0 < move.segments <= by_name[name].lost
    given_pages = sum(move.segments * by_name[name].layer_pages for name, move in moves.gives.items())
    assert not given_pages or much - given_pages >= config.high_ratio * 300


@given(st.lists(st.sampled_from([0, 30, 90, 150]), min_size=20, max_size=200), st.sampled_from([0.1, 1.0, 3.0]))
def test_a_load_that_swings_moves_each_engine_at_most_once_a_hold_time(loads: list[int], step_s: float) -> None:
    """200 pages, of which two idle engines' weights take 80 and requests what the load says."""
    held, changed, moved = {"a": 10, "b": 10}, {"a": -60.0, "b": -60.0}, {"a": 0, "b": 0}
    for number, load in enumerate(loads):
        now = number * step_s
        slack = 200 - load - 4 * sum(held.values())
        balance = Balance(total_pages=200, kv_missing_pages=max(0, -slack), ample_pages=max(0, slack))
        engines = [
            view(name, segments=held[name], spare_segments=held[name], since_change_s=now - changed[name])
            for name in held
        ]
        moves = weight_moves(balance, engines, IRREGULAR, CONFIG)
        for sign, each in ((-1, moves.takes), (1, moves.gives)):
            for name, move in each.items():
                held[name], changed[name], moved[name] = held[name] + sign * move.segments, now, moved[name] + 1
    assert max(moved.values()) <= 1 + len(loads) * step_s / CONFIG.min_hold_s


def test_turns_in_a_cycle_are_recognised_with_a_few_out_of_order() -> None:
    cycle = list("abcd") * 8
    assert arrival_pattern(cycle) == ("round-robin", 1.0)
    cycle[9], cycle[10] = cycle[10], cycle[9]
    assert arrival_pattern(cycle).kind == "round-robin"
    assert arrival_pattern([name for name in cycle for _ in range(3)]).kind == "round-robin"


def test_random_turns_are_irregular() -> None:
    turns = random.Random(7).choices("abcd", k=200)
    pattern = arrival_pattern(turns)
    assert pattern.kind == "irregular"
    assert 0.4 < pattern.score < 0.6


def test_turns_that_come_back_soon_score_lowest() -> None:
    assert arrival_pattern(list("abcd" + "cd" * 30)).score < 0.1


def test_too_few_turns_tell_nothing() -> None:
    assert arrival_pattern([]).kind == "irregular"
    assert arrival_pattern(list("abca")).kind == "irregular"
