"""Weights between engines, message by message: who is asked, who waits, who gets."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TypeVar

import pytest

from polder.broker.config import BrokerConfig
from polder.broker.core import BrokerCore
from polder.broker.fetching import check_fetch
from polder.broker.ledger import Owner
from polder.broker.policy import PolicyConfig
from polder.broker.wire import (
    USES,
    Demand,
    Done,
    Fetch,
    FromBroker,
    Grant,
    Grown,
    Held,
    Hello,
    NeedWeights,
    Pages,
    Recall,
    Refused,
    Returned,
    Sleep,
    Use,
    Wake,
    Welcome,
)
from polder.errors import ProtocolError
from polder.planner.sharing import SharingConfig
from tests.broker.test_server import PAGE
from tests.broker.test_server import hello as plain_hello

DEVICE = "cpu:0"
OPERATOR = 99
Lease = TypeVar("Lease", Grant, Recall)


def hello(name: str, **values: object) -> Hello:
    """Ten layers of four pages, and a KV floor of three units of two."""
    return plain_hello(name, **{"layers": 10, "layer_pages": 4, **values})


class Broker:
    """A core, and the last message of each kind that each engine got. `a` is connection 1, process 101, and so on."""

    def __init__(self, total: int = 64, **sharing: float) -> None:
        config = BrokerConfig(
            socket=Path("unused"),
            devices={DEVICE: total * PAGE, "cpu:1": total * PAGE},
            page_bytes=PAGE,
            policy=PolicyConfig(reserve_low_ratio=0.0, reserve_high_ratio=0.0),
            sharing=SharingConfig(**{"low_ratio": 0.0, "min_hold_s": 1.0, "min_idle_s": 0.5, **sharing}),
        )
        self.core = BrokerCore(config=config, generation=1, started_at=0.0)
        self.now = 0.0

    def say(self, name: str, message: object, now: float | None = None) -> list[FromBroker]:
        """What the engine is told in answer, news of the others apart."""
        self.now = self.now if now is None else now
        number = OPERATOR if name == "operator" else ord(name) - ord("a") + 1
        self.core.outbox.clear()
        self.core.handle(number, 100 + number, message, self.now)  # type: ignore[arg-type]
        self.core.check_integrity()
        return self.told(name)

    def told(self, name: str) -> list[FromBroker]:
        number = OPERATOR if name == "operator" else ord(name) - ord("a") + 1
        return [m for to, m in self.core.outbox if to == number and type(m).__name__ != "Neighbours"]

    def welcome(self, name: str, **values: object) -> Welcome:
        message = self.say(name, hello(name, **values))[0]
        assert isinstance(message, Welcome), message
        return message

    def demand(self, name: str, now: float | None = None, **values: object) -> list[FromBroker]:
        sizes = ("held_units", "busy_units", "waiting_units", "peak_units", "cached_units")
        defaults = {**dict.fromkeys(sizes, 0), "held_units": 3, "curve": [], "urgent": False}
        return self.say(name, Demand(**{**defaults, **values}), now)  # type: ignore[arg-type]

    def idle(self, name: str, now: float) -> list[FromBroker]:
        return self.demand(name, now, idle_s=10.0, spare_segments=10, next_use_s=math.inf)

    def pages(self, name: str, use: Use = "weights", device: str = DEVICE) -> list[int]:
        pages: list[int] = self.core.ledger.pages_of(device, Owner(name, use)).tolist()
        return pages

    def give_back(
        self, name: str, recall: Recall, units: int | None = None, now: float | None = None
    ) -> list[FromBroker]:
        """Returns what was recalled, or `units` of it."""
        units = recall.units if units is None else units
        pages = self.pages(name, recall.use)[: units * (2 if recall.use == "kv" else 4)]
        short = recall.units - units
        return self.say(name, Returned(lease=recall.lease, use=recall.use, pages=[pages], short=short), now)

    def state(self, name: str) -> tuple[int, bool]:
        status = next(e for e in self.core.status(self.now).engines if e.engine == name)
        return status.segments, status.asleep

    def actions(self) -> list[tuple[str, str, int]]:
        return [(d.engine, d.action, d.segments) for d in self.core.status(self.now).decisions]


def only(messages: list[FromBroker], kind: type[Lease], use: Use = "weights") -> Lease:
    found = [message for message in messages if isinstance(message, kind) and message.use == use]
    assert len(found) == 1, messages
    return found[0]


def two_in_turns() -> Broker:
    """`a` runs and is idle, `b` sleeps: both together do not fit."""
    broker = Broker()
    assert len(broker.welcome("a").held.weights[0]) == 40
    welcome = broker.welcome("b")
    assert welcome.held.weights == []
    assert [len(pages) for pages in welcome.held.kv] == [2], "one that starts asleep gets a unit"
    broker.demand("b", asleep=True, held_units=1)
    broker.idle("a", 10.0)
    return broker


def test_the_first_gets_all_of_its_weights_and_the_next_sleeps() -> None:
    broker = two_in_turns()
    assert broker.state("a") == (10, False)
    assert broker.state("b") == (0, True)


def test_one_that_wakes_gets_all_layers_at_once_from_one_that_is_idle() -> None:
    broker = two_in_turns()
    assert broker.say("b", NeedWeights(), 11.0) == []
    recall = only(broker.told("a"), Recall)
    assert recall.units == 10
    broker.give_back("a", recall)
    grant = only(broker.told("b"), Grant)
    assert [len(pages) for pages in grant.pages] == [40]
    assert broker.state("a") == (0, True)
    broker.say("b", Grown(lease=grant.lease))
    broker.demand("b", 11.2, held_units=1, busy_units=1)
    assert len(broker.pages("b", "kv")) >= 6, "awake, it has its floor"
    assert broker.actions()[-3:] == [("b", "wake", 10), ("a", "recall", 10), ("b", "grant", 10)]


def test_one_that_serves_is_not_put_to_sleep_for_one_that_wakes() -> None:
    broker = two_in_turns()
    broker.demand("a", 11.0, busy_units=3)
    broker.say("b", NeedWeights())
    assert not broker.told("a")
    broker.idle("a", 12.0)
    assert only(broker.told("a"), Recall)


def test_two_that_never_are_idle_take_turns() -> None:
    broker = two_in_turns()
    broker.demand("a", 11.0, busy_units=3)
    broker.say("b", NeedWeights())
    broker.demand("a", 13.9, busy_units=3)
    assert not broker.told("a")
    running, waiting = "a", "b"
    for now in (14.1, 17.2, 20.3):
        broker.demand(running, now, busy_units=3)
        recall = only(broker.told(running), Recall)
        assert recall.preempt
        assert recall.units == 10
        broker.give_back(running, recall)
        grant = only(broker.told(waiting), Grant)
        broker.say(waiting, Grown(lease=grant.lease))
        broker.demand(waiting, held_units=3, busy_units=3)
        broker.say(running, NeedWeights())
        assert not broker.told(waiting), "it has just begun"
        running, waiting = waiting, running
    assert ("a", "pause", 10) in broker.actions()


def test_pages_that_come_free_go_to_one_that_wakes_and_not_to_a_cache() -> None:
    broker = Broker(total=72)
    broker.welcome("a", layers=0, layer_pages=0)
    assert only(broker.demand("a", held_units=3, busy_units=28, waiting_units=0), Grant, "kv")
    broker.welcome("b")
    broker.say("b", NeedWeights(), 1.0)
    recall = only(broker.told("a"), Recall, "kv")
    curve = [float(units) for units in range(33)]
    for _ in range(2):
        broker.give_back("a", recall, 2)
        assert not [
            m for m in broker.demand("a", 3.0, held_units=20, cached_units=20, curve=curve) if isinstance(m, Grant)
        ]


def test_what_a_waker_needs_is_recalled_from_caches_above_their_floors() -> None:
    broker = Broker(total=72)
    broker.welcome("a", layers=0, layer_pages=0)
    broker.demand("a", held_units=3, busy_units=28)
    broker.demand("a", held_units=28, busy_units=3, cached_units=28)
    broker.welcome("b")
    broker.say("b", NeedWeights(), 1.0)
    recall = only(broker.told("a"), Recall, "kv")
    assert not recall.preempt
    broker.give_back("a", recall)
    assert only(broker.told("b"), Grant)


def test_two_that_wake_are_served_in_the_order_in_which_they_asked() -> None:
    broker = Broker()
    for name in "abc":
        broker.welcome(name)
        broker.demand(name, asleep=name != "a", held_units=3 if name == "a" else 1)
    broker.idle("a", 10.0)
    broker.say("c", NeedWeights())
    recall = only(broker.told("a"), Recall)
    broker.say("b", NeedWeights(), 10.01)
    broker.give_back("a", recall)
    assert only(broker.told("c"), Grant)
    assert not broker.told("b")


def test_requests_that_lack_memory_take_an_idle_engines_weights_and_give_them_back_later() -> None:
    broker = Broker(total=80)
    broker.welcome("a")
    broker.welcome("b", layers=0, layer_pages=0)
    broker.idle("a", 10.0)
    broker.demand("b", 11.0, busy_units=3, waiting_units=20)
    recall = only(broker.told("a"), Recall)
    broker.give_back("a", recall)
    assert len(broker.pages("b", "kv")) == 46
    broker.demand("a", asleep=True)
    broker.demand("b", 11.5, held_units=23, busy_units=23)
    for now in (12.1, 12.6, 13.0):
        assert not broker.demand("b", now, held_units=23, busy_units=3), (
            "not before it has been ample for the hold time"
        )
    broker.demand("b", 13.2, held_units=23, busy_units=3)
    recall = only(broker.told("b"), Recall, "kv")
    assert not recall.preempt
    broker.give_back("b", recall)
    assert only(broker.told("a"), Grant)


def test_one_that_serves_gives_up_what_it_can_stream() -> None:
    broker = Broker()
    broker.welcome("a")
    broker.demand("a", 10.0, busy_units=3, waiting_units=12, spare_segments=2)
    recall = only(broker.told("a"), Recall)
    assert recall.units == 2
    broker.give_back("a", recall)
    assert broker.state("a") == (8, False)


def test_an_answer_that_falls_short_is_asked_again_later() -> None:
    broker = two_in_turns()
    broker.say("b", NeedWeights(), 11.0)
    recall = only(broker.told("a"), Recall)
    assert not broker.give_back("a", recall, 0, 11.01)
    assert only(broker.idle("a", 11.2), Recall)


def test_an_operator_puts_to_sleep_and_wakes() -> None:
    broker = Broker(total=128)
    broker.welcome("a")
    broker.demand("a", 10.0, idle_s=1.0)
    assert isinstance(broker.say("operator", Sleep(engine="a"))[0], Done)
    recall = only(broker.told("a"), Recall)
    assert recall.units == 10
    broker.give_back("a", recall)
    for now in (20.0, 40.0, 60.0):
        assert not [m for m in broker.demand("a", now, asleep=True, idle_s=now) if isinstance(m, Grant)], "sleep holds"
    assert isinstance(broker.say("operator", Wake(engine="a"))[0], Done)
    assert only(broker.told("a"), Grant)


def test_one_that_serves_sleeps_when_its_requests_have_ended() -> None:
    broker = Broker(total=128)
    broker.welcome("a")
    broker.demand("a", 10.0, busy_units=3)
    broker.say("operator", Sleep(engine="a"))
    for step in range(1, 20):
        assert not broker.demand("a", 10.0 + step / 5, busy_units=3)
    recall = only(broker.demand("a", 14.0, idle_s=0.001), Recall)
    assert recall.units == 10
    broker.give_back("a", recall, 0, 14.01)
    assert only(broker.idle("a", 14.2), Recall), "a request had come, and is over"
    assert len(broker.actions()) == 2, "asking again is no new decision"


def test_requests_that_waited_when_an_operator_spoke_delay_its_sleep_and_do_not_end_it() -> None:
    broker = two_in_turns()
    broker.say("b", NeedWeights(), 11.0)
    recall = only(broker.told("a"), Recall)
    broker.demand("b", 11.1, asleep=True, held_units=1, waiting_units=2)
    broker.say("operator", Sleep(engine="b"))
    broker.say("b", NeedWeights(), 12.0)
    broker.give_back("a", recall)
    grant = only(broker.told("b"), Grant)
    broker.say("b", Grown(lease=grant.lease))
    assert not [m for m in broker.demand("b", 12.2, busy_units=2) if isinstance(m, Recall)]
    assert only(broker.demand("b", 13.0, idle_s=0.001), Recall)


def test_a_report_that_was_under_way_when_an_operator_spoke_does_not_carry_its_sleep_out() -> None:
    broker = two_in_turns()
    broker.say("operator", Sleep(engine="b"), 11.0)
    broker.demand("b", 11.01, asleep=True, held_units=1, idle_s=3.0)
    broker.say("b", NeedWeights(), 11.02)  # of a request that came before it, and is aborted
    broker.give_back("a", only(broker.told("a"), Recall))
    grant = only(broker.told("b"), Grant)
    assert only(broker.say("b", Grown(lease=grant.lease)), Recall), "it sleeps after all"


def test_a_request_that_comes_as_soon_as_the_sleep_is_carried_out_ends_it() -> None:
    broker = Broker(total=128)
    broker.welcome("a")
    broker.idle("a", 10.0)
    broker.say("operator", Sleep(engine="a"), 11.0)
    broker.give_back("a", only(broker.told("a"), Recall), now=11.05)
    broker.demand("a", 11.06, asleep=True, idle_s=3.0)
    grant = only(broker.say("a", NeedWeights(), 11.1), Grant)
    answers = broker.say("a", Grown(lease=grant.lease), 11.2) + broker.demand("a", 13.0, idle_s=0.5)
    assert not [m for m in answers if isinstance(m, Recall)], "it sleeps again"


def test_a_sleep_that_is_repeated_while_the_first_is_carried_out_is_no_less_certain() -> None:
    broker = Broker(total=128)
    broker.welcome("a")
    broker.idle("a", 10.0)
    broker.say("operator", Sleep(engine="a"), 11.0)
    recall = only(broker.told("a"), Recall)
    broker.say("operator", Sleep(engine="a"), 11.05)
    broker.give_back("a", recall, now=11.06)
    broker.demand("a", 11.07, asleep=True, idle_s=3.0)  # as what was given back, sent before the word was repeated
    grant = only(broker.say("a", NeedWeights(), 11.08), Grant)  # and so was this request, which is aborted
    assert only(broker.say("a", Grown(lease=grant.lease), 11.2), Recall), "it sleeps after all"


def test_one_that_streams_and_waits_for_the_rest_of_its_layers_is_paused_for_one_that_has_waited_longer() -> None:
    broker = two_in_turns()
    broker.demand("a", 11.0, busy_units=1, spare_segments=5)
    broker.say("b", NeedWeights(), 11.1)
    broker.give_back("a", only(broker.told("a"), Recall))
    broker.say("a", NeedWeights(), 11.3)
    recall = only(broker.demand("a", 20.0, busy_units=1), Recall)
    assert recall.preempt
    broker.give_back("a", recall)
    assert only(broker.told("b"), Grant).units == 10


@pytest.mark.parametrize("woken", [False, True])
def test_who_woke_for_requests_that_were_aborted_waits_no_longer_unless_an_operator_said_so(woken: bool) -> None:
    broker = two_in_turns()
    broker.say("b", NeedWeights(), 11.0)
    if woken:
        broker.say("operator", Wake(engine="b"))
    broker.demand("b", 11.1, asleep=True, held_units=1, idle_s=0.05)
    weights = broker.core.engines["b"].weights
    assert (weights.waking_since is not None) == woken


def test_who_waits_for_weights_is_not_kept_waiting_by_one_that_is_to_sleep_and_has_requests_without_end() -> None:
    broker = two_in_turns()
    broker.demand("a", 11.0, busy_units=2)
    broker.say("operator", Sleep(engine="a"))
    broker.say("b", NeedWeights(), 12.0)
    told: list[FromBroker] = []
    for step in range(1, 60):
        broker.demand("a", 12.0 + step / 10, busy_units=2)
        told += broker.told("a")
    assert any(isinstance(m, Recall) and m.use == "weights" and m.preempt for m in told), "its turn is over"


def test_a_request_ends_an_operators_sleep() -> None:
    broker = Broker(total=128)
    broker.welcome("a")
    broker.say("operator", Sleep(engine="a"), 10.0)
    recall = only(broker.told("a"), Recall)
    broker.say("a", NeedWeights())
    broker.give_back("a", recall)
    assert only(broker.told("a"), Grant)


def test_only_weights_that_move_can_be_put_to_sleep() -> None:
    broker = Broker()
    broker.welcome("a", layers=0, layer_pages=0)
    assert isinstance(broker.say("operator", Sleep(engine="a"))[0], Refused)
    with pytest.raises(ProtocolError):
        broker.say("a", NeedWeights())


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("pages", [[[0, 1, 2]], [[0, 1, 2, 3], [4, 5, 6, 7]], [[60, 61, 62, 63]]])
def test_what_is_no_unit_of_ones_own_is_not_taken_back(use: Use, pages: Pages) -> None:
    """Too few pages for a unit, too many ranks, somebody else's."""
    broker = Broker()
    broker.welcome("a")
    with pytest.raises(ProtocolError):
        broker.say("a", Returned(lease=0, use=use, pages=pages))
    assert (len(broker.pages("a", "kv")), len(broker.pages("a"))) == (6, 40)


def test_pages_of_one_use_are_not_taken_back_for_another() -> None:
    broker = Broker()
    broker.welcome("a")
    with pytest.raises(ProtocolError):
        broker.say("a", Returned(lease=0, use="kv", pages=[broker.pages("a")[:2]]))
    assert len(broker.pages("a")) == 40


def test_a_process_that_ends_frees_its_weights() -> None:
    broker = two_in_turns()
    broker.say("b", NeedWeights(), 11.0)
    broker.core.outbox.clear()
    broker.core.process_ended(101, 11.1)
    assert only(broker.told("b"), Grant)
    broker.core.check_integrity()


def test_a_late_giver_is_shown_as_overdue() -> None:
    broker = two_in_turns()
    broker.say("b", NeedWeights(), 11.0)
    broker.core.plan(12.0)
    status = broker.core.status(12.0)
    assert status.overdue == 1
    assert next(e for e in status.engines if e.engine == "a").state == "overdue"
    assert broker.state("a") == (10, False), "nobody else gets a page that may still be read"


def test_one_that_comes_back_claims_what_it_holds() -> None:
    broker = Broker()
    first = broker.welcome("a").held
    held = Held(kv=first.kv, weights=[first.weights[0][:28]])
    for core in (broker, Broker()):  # the same broker, and one that was started in its place
        core.core.disconnected(1)
        again = core.welcome("a", held=held)
        assert again.held == held
        assert again.lease == 0
        assert core.state("a") == (7, False)


def test_one_that_comes_back_late_gets_other_numbers_for_as_many_pages() -> None:
    held = Broker().welcome("a").held
    broker = Broker(total=128)
    broker.welcome("b")
    again = broker.welcome("a", held=held).held
    assert not set(again.kv[0]) & set(held.kv[0])
    assert (len(again.kv[0]), len(again.weights[0])) == (6, 40)


def test_what_cannot_run_even_alone_is_refused_with_the_numbers() -> None:
    broker = Broker()
    broker.welcome("a")
    answer = broker.say("b", hello("b", layers=16))[0]
    assert isinstance(answer, Refused)
    assert not answer.retry_s
    assert "272 KiB" in answer.reason


def test_an_engine_with_pages_of_another_size_is_refused() -> None:
    """A broker was started again with another page size, and an engine of the former one reports."""
    answer = Broker().say("a", hello("a", page_bytes=2 * PAGE, held=Held(kv=[[0, 1]])))[0]
    assert isinstance(answer, Refused)
    assert not answer.retry_s


def test_all_ranks_get_and_give_the_same_segments() -> None:
    broker = Broker()
    welcome = broker.welcome("a", devices=[DEVICE, "cpu:1"])
    assert [len(pages) for pages in welcome.held.weights] == [40, 40]
    broker.idle("a", 10.0)
    broker.welcome("b")
    broker.demand("b", asleep=True, held_units=1)
    broker.say("b", NeedWeights(), 11.0)
    recall = only(broker.told("a"), Recall)
    broker.say("a", Returned(lease=recall.lease, use="weights", pages=welcome.held.weights))
    assert not broker.pages("a", device="cpu:1")
    assert only(broker.told("b"), Grant)


def test_handles_of_ones_own_segments_are_given_out_and_of_others_not() -> None:
    broker = two_in_turns()
    roster, mine = broker.core.roster, broker.pages("a")[:4]
    assert check_fetch(roster, 101, Fetch(engine="a", rank=0, device=DEVICE, pages=mine)) is None
    with pytest.raises(ProtocolError):
        check_fetch(roster, 102, Fetch(engine="b", rank=0, device=DEVICE, pages=mine))


def test_only_the_last_decisions_are_told() -> None:
    broker = Broker(total=128)
    broker.welcome("a")
    for _ in range(50):
        broker.say("operator", Sleep(engine="a"))
        broker.say("operator", Wake(engine="a"))
    decisions = broker.core.status(1.0).decisions
    assert len(decisions) == 64
    assert all(decision.reason for decision in decisions)


def test_a_load_that_swings_does_not_move_weights_to_and_fro() -> None:
    """Ten times a second, for half a minute; both engines answer at once."""
    broker = Broker(total=80, min_hold_s=5.0)
    broker.welcome("a")
    broker.welcome("b", layers=0, layer_pages=0)
    taken = 0

    def answer(name: str) -> None:
        nonlocal taken
        for message in broker.told(name):
            if isinstance(message, Recall):
                taken += message.use == "weights"
                broker.give_back(name, message)

    for step in range(300):
        now = 10.0 + step / 10
        asleep = broker.state("a")[1]
        broker.demand("a", now, asleep=asleep, idle_s=10.0, spare_segments=0 if asleep else 10)
        answer("a")
        held = len(broker.pages("b", "kv")) // 2
        broker.demand("b", held_units=held, busy_units=3, waiting_units=step % 2 * 25)
        answer("b")
        answer("a")
    assert 1 <= taken <= 1 + 30 / 5.0
