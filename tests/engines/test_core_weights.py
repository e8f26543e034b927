"""The core's side of elastic weights, with workers of a few lines: what it gives up, offers and asks for."""

from __future__ import annotations

import time
from typing import Any

import pytest

pytest.importorskip("vllm")
from vllm.v1.core.sched.interface import PauseState

from polder.broker.wire import Demand, Grant, Grown, NeedWeights, Recall, Returned
from polder.engines.vllm.plans import Taken, WeightsFound
from polder.engines.vllm.weights import calls
from polder.engines.vllm.weights.core import TOO_SLOW_S, CoreWeights
from polder.engines.vllm.weights.streaming import SLOWDOWN
from polder.planner.rotation_cost import pass_seconds

LAYERS = 8
PAGES = 2


class Scheduler:
    def __init__(self) -> None:
        self.requests: dict[str, object] = {}
        self.pause_state = PauseState.UNPAUSED

    def set_pause_state(self, state: PauseState) -> None:
        self.pause_state = state

    def has_requests(self) -> bool:
        return bool(self.requests)


class Core:
    """CoreWeights over one rank, and all that it says."""

    def __init__(self, *, layer_load_s: float = 0.001, copy_share: float = 0.0, streams: bool = True) -> None:
        self.said: list[Any] = []
        self.now = 100.0
        self.fails = ""
        self.mapping_s = 0.0
        self.in_transfer = False
        self.held: list[tuple[int, ...]] = []
        self.counts = {"weights_loads_total": 0.0, "weights_copy_seconds_total": 0.0, "weights_pass_stall_seconds": 0.0}
        self.layer_load_s = layer_load_s
        self.scheduler = Scheduler()
        found = WeightsFound(
            layers=LAYERS, layer_pages=PAGES, moved_bytes=1, resident_bytes=0, copy_share=copy_share, streams=streams
        )
        self.weights = CoreWeights(self.scheduler, found, self.rpc, self.said.append, lambda: self.in_transfer)
        self.weights.start(1, pages(0, LAYERS))

    def rpc(self, function: Any, *args: Any) -> list[Any]:
        if function in (calls.adopt, calls.give):
            if self.fails:
                return [self.fails]
            time.sleep(self.mapping_s)
            self.held += [tuple(ranks[0]) for ranks in args[1]]
            return [""]
        if function is calls.take:
            if self.fails:
                return [Taken(error=self.fails)]
            count = args[0]
            taken, self.held = self.held[-count:], self.held[:-count]
            return [Taken(segments=tuple(taken))]
        if function is calls.undo_give:
            return [Taken(segments=tuple(tuple(ranks[0]) for ranks in args[1]))]
        assert function is calls.figures
        self.counts["weights_loads_total"] += 10
        self.counts["weights_copy_seconds_total"] += 10 * self.layer_load_s
        return [dict(self.counts)]

    def steps(self, seconds: float, count: int = 4) -> None:
        """So many steps, and the workers are asked meanwhile."""
        self.scheduler.requests["r"] = object()
        for _ in range(count):
            self.now += 1.1
            self.weights.on_step([(1, seconds)], self.now)
            self.weights.stats(self.now)

    def take(self, count: int, **values: bool) -> Returned:
        self.weights.on_recall(recall(count, **values), 1, self.now)
        return next(m for m in reversed(self.said) if isinstance(m, Returned))

    def give(self, first: int, count: int) -> None:
        grant = Grant(lease=9, use="weights", units=count, pages=pages(first, count))
        self.weights.on_grant(grant, 1, self.now)

    @property
    def spare(self) -> int:
        spare: int = self.weights.demand(self.now)["spare_segments"]
        return spare


def pages(first: int, count: int) -> list[list[int]]:
    """The pages of some segments on one rank."""
    return [list(range(PAGES * first, PAGES * (first + count)))]


def recall(units: int, **values: bool) -> Recall:
    return Recall(lease=7, use="weights", units=units, deadline_s=1.0, **values)


def test_who_has_requests_gives_all_up_only_when_paused_and_asks_for_them_at_once() -> None:
    core = Core()
    core.scheduler.requests["r"] = object()
    assert core.take(LAYERS).short == LAYERS
    assert core.take(LAYERS, preempt=True).short == 0
    assert core.weights.asleep
    assert core.scheduler.pause_state == PauseState.PAUSED_ALL
    assert isinstance(core.said[-1], NeedWeights)
    core.give(20, LAYERS)
    assert core.scheduler.pause_state == PauseState.UNPAUSED
    assert isinstance(core.said[-1], Grown)
    assert core.weights.counters["pauses_total"] == 1


def test_no_step_runs_while_it_sleeps_unless_a_transfer_needs_one() -> None:
    core = Core()
    core.take(LAYERS)
    core.scheduler.requests["r"] = object()
    assert not core.scheduler.has_requests()
    core.in_transfer = True
    assert core.scheduler.has_requests()
    core.in_transfer = False
    core.give(20, LAYERS)
    assert core.scheduler.has_requests()


def test_a_scheduler_that_somebody_paused_stays_paused_when_the_weights_are_back() -> None:
    core = Core()
    core.scheduler.set_pause_state(PauseState.PAUSED_NEW)
    core.take(LAYERS)
    core.give(20, LAYERS)
    assert core.scheduler.pause_state == PauseState.PAUSED_NEW


def test_a_request_wakes_what_sleeps_and_asks_once() -> None:
    core = Core()
    core.take(LAYERS)
    for _ in range(3):
        core.weights.on_request(core.now)
    assert [type(message) for message in core.said] == [Returned, NeedWeights]


@pytest.mark.parametrize("layer_load_s", [0.0005, 0.002, 0.003, 0.02])
@pytest.mark.parametrize("copy_share", [0.0, 0.016, 0.5])
def test_what_it_offers_is_what_its_own_formula_allows(layer_load_s: float, copy_share: float) -> None:
    core = Core(layer_load_s=layer_load_s, copy_share=copy_share)
    core.steps(0.010)
    offered = core.spare
    possible = [slots for slots in (1, 2) if offered + slots <= LAYERS]
    best = min(pass_seconds(LAYERS, offered + slots, slots, 0.010, layer_load_s, copy_share) for slots in possible)
    assert not offered or best <= 0.010 * (1 + SLOWDOWN)
    if layer_load_s == 0.02 or copy_share == 0.5:
        assert offered == 0, "a link too slow for it, or cores that have no time for it"
    else:
        assert offered > 0


def test_time_that_steps_stood_still_makes_no_room_for_more_streaming() -> None:
    core = Core(layer_load_s=0.002)
    core.steps(0.010)
    offered = core.spare
    assert offered > 0
    core.take(offered)
    assert core.spare == 0, "nothing is known of steps with fewer layers yet"
    core.counts["weights_pass_stall_seconds"] = 0.020
    core.steps(0.030)
    assert core.spare == 0
    assert not any(isinstance(message, NeedWeights) for message in core.said), "nor do they need layers back"


def test_when_steps_have_become_too_short_it_wants_its_layers_back() -> None:
    core = Core(layer_load_s=0.002)
    core.steps(0.010)
    core.take(core.spare)
    core.steps(0.003, count=2 + int(TOO_SLOW_S))
    assert isinstance(core.said[-1], NeedWeights)


def test_a_wish_that_the_broker_passed_over_does_not_keep_a_later_request_from_waking() -> None:
    core = Core(layer_load_s=0.002)
    core.steps(0.010)
    core.take(core.spare)
    core.steps(0.003, count=2 + int(TOO_SLOW_S))
    core.scheduler.requests.clear()
    core.take(LAYERS - core.weights.lost)
    assert core.weights.asleep
    core.said.clear()
    core.weights.on_request(core.now)
    assert [type(message) for message in core.said] == [NeedWeights]


def test_who_waits_for_its_weights_asks_again_but_not_all_the_time() -> None:
    core = Core()
    core.take(LAYERS)
    core.weights.on_request(core.now)
    core.scheduler.requests["r"] = object()
    for seconds in (0.1, 0.9, 1.0, 1.1, 2.1):
        core.weights.on_tick(core.now + seconds)
    assert [type(message) for message in core.said] == [Returned, NeedWeights, NeedWeights, NeedWeights]
    core.give(20, LAYERS)
    core.weights.on_tick(core.now + 9.0)
    assert isinstance(core.said[-1], Grown)


def test_a_request_waits_from_its_arrival_until_the_weights_are_mapped() -> None:
    core = Core()
    core.take(LAYERS)
    core.weights.on_request(core.now)
    core.now, core.mapping_s = core.now + 0.5, 0.1
    core.give(20, LAYERS)
    counters = core.weights.stats(core.now)
    assert counters["wakes_total"] == counters["sleeps_total"] == 1
    assert counters["wake_seconds_total"] == counters["wake_max_seconds"] >= 0.6


def test_what_cannot_be_mapped_goes_back_and_the_engine_stays_as_it_was() -> None:
    core = Core()
    core.take(LAYERS)
    core.fails = "no room"
    core.give(20, LAYERS)
    assert core.weights.asleep
    assert core.said[-1] == Returned(lease=9, use="weights", pages=pages(20, LAYERS))


def test_a_take_that_fails_on_the_workers_is_answered_with_nothing() -> None:
    core = Core()
    core.fails = "cannot map"
    answer = core.take(LAYERS)
    assert (answer.pages, answer.short) == ([], LAYERS)
    assert core.weights.lost == 0


def test_a_turn_to_idle_busy_asleep_or_awake_is_told_at_once() -> None:
    core = Core()

    def sent() -> Demand:
        sizes = dict.fromkeys(("held_units", "busy_units", "waiting_units", "peak_units", "cached_units"), 0)
        return Demand(**sizes, curve=[], urgent=False, **core.weights.demand(core.now))

    before = sent()
    assert not core.weights.turned(before)
    core.scheduler.requests["r"] = object()
    assert core.weights.turned(before)
    before = sent()
    core.take(LAYERS, preempt=True)
    assert core.weights.turned(before)


def test_ranks_may_choose_different_segments() -> None:
    scheduler, said = Scheduler(), []
    found = WeightsFound(layers=2, layer_pages=1, moved_bytes=1, resident_bytes=0, copy_share=0.0)
    answers = {
        calls.adopt: [""] * 2,
        calls.take: [Taken(segments=((1,),)), Taken(segments=((12,),))],
    }
    weights = CoreWeights(scheduler, found, lambda function, *_: answers[function], said.append, lambda: False)
    weights.start(1, [[1, 2], [11, 12]])
    weights.on_recall(recall(1), 1, 0.0)
    assert said[-1].pages == [[1], [12]]
    assert weights.pages == [[2], [11]]


def test_when_one_rank_cannot_give_up_the_others_get_theirs_back() -> None:
    scheduler, said, given = Scheduler(), [], []
    found = WeightsFound(layers=2, layer_pages=1, moved_bytes=1, resident_bytes=0, copy_share=0.0)
    answers = {
        calls.adopt: [""] * 2,
        calls.take: [Taken(segments=((2,),)), Taken(error="rank 1: no room")],
        calls.give: ["", "rank 1: a segment of no pages"],
    }

    def rpc(function: Any, *args: Any) -> list[Any]:
        if function is calls.give:
            given.append(args)
        return answers[function]

    weights = CoreWeights(scheduler, found, rpc, said.append, lambda: False)
    weights.start(1, [[1, 2], [11, 12]])
    weights.on_recall(recall(1), 1, 0.0)
    assert given == [(1, [[[2], []]])]
    assert said == [Returned(lease=7, use="weights", pages=[], short=1)]
    assert weights.lost == 0


def test_when_one_rank_cannot_map_a_grant_all_hold_as_much_as_before() -> None:
    scheduler, said, undone = Scheduler(), [], []
    found = WeightsFound(layers=3, layer_pages=1, moved_bytes=1, resident_bytes=0, copy_share=0.0)
    answers = {
        calls.adopt: [""] * 2,
        calls.take: [Taken(segments=((3,),)), Taken(segments=((13,),))],
        calls.give: ["", "rank 1: no room"],
        calls.undo_give: [Taken(segments=((2,),)), Taken(segments=((14,),))],
    }

    def rpc(function: Any, *args: Any) -> list[Any]:
        undone.extend([args] if function is calls.undo_give else [])
        return answers[function]

    weights = CoreWeights(scheduler, found, rpc, said.append, lambda: False)
    weights.start(1, [[1, 2, 3], [11, 12, 13]])
    weights.on_recall(recall(1), 1, 0.0)
    weights.on_grant(Grant(lease=9, use="weights", units=1, pages=[[4], [14]]), 1, 0.0)
    assert undone == [(1, [[[4], [14]]], 1)]
    assert said[-1] == Returned(lease=9, use="weights", pages=[[2], [14]])
    assert [sorted(pages) for pages in weights.pages] == [[1, 4], [11, 12]]


def test_one_that_computes_in_graphs_gives_all_up_or_nothing() -> None:
    core = Core(streams=False)
    core.steps(0.010)
    assert core.spare == 0
    assert core.take(3).short == 3
    core.scheduler.requests.clear()
    assert core.spare == LAYERS
    assert core.take(3).short == 3
    assert core.take(LAYERS).short == 0


def test_a_request_that_follows_an_aborted_one_wakes_what_sleeps() -> None:
    """The broker forgets a wake when it reads that there is no request: the next one has to be said again at once."""
    core = Core()
    core.take(LAYERS)
    core.weights.on_request(core.now)
    core.weights.demand(core.now)
    core.weights.on_request(core.now)
    assert [type(message) for message in core.said] == [Returned, NeedWeights, NeedWeights]
