"""What an operator says about weights: sleep, wake, and which request ends a sleep."""

from __future__ import annotations

import pytest

from polder.broker.wire import (
    Done,
    FromBroker,
    Grant,
    Grown,
    NeedWeights,
    Recall,
    Refused,
    Sleep,
    Wake,
)
from polder.errors import ProtocolError
from tests.broker.turns import Broker, only, two_in_turns


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
