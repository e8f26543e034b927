"""Weights between engines, message by message: who is asked, who waits, who gets."""

from __future__ import annotations

import pytest

from polder.broker.fetching import check_fetch
from polder.broker.wire import (
    USES,
    Fetch,
    Grant,
    Grown,
    Held,
    NeedWeights,
    Pages,
    Recall,
    Refused,
    Returned,
    Sleep,
    Use,
    Wake,
)
from polder.errors import ProtocolError
from tests.broker.test_server import PAGE
from tests.broker.turns import DEVICE, Broker, hello, only, two_in_turns


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
