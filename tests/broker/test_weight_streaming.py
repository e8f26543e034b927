"""Layers that are streamed because an operator said so: `polder ctl stream`."""

from __future__ import annotations

import pytest

from polder.broker.wire import Done, Grant, Grown, NeedWeights, Recall, Refused, Stream, Wake
from tests.broker.turns import Broker, only, two_in_turns


def test_one_that_computes_in_graphs_cannot_stream() -> None:
    broker = Broker(total=128)
    broker.welcome("a", streams=False)
    broker.demand("a", 10.0, busy_units=3)
    answer = broker.say("operator", Stream(engine="a", segments=6))[0]
    assert isinstance(answer, Refused)
    assert "--enforce-eager" in answer.reason
    assert "cudagraph_mode=PIECEWISE" in answer.reason


def test_an_operator_lets_an_engine_stream() -> None:
    broker = Broker(total=128)
    broker.welcome("a")
    broker.demand("a", 10.0, busy_units=3)
    assert isinstance(broker.say("operator", Stream(engine="a", segments=6))[0], Done)
    recall = only(broker.told("a"), Recall)
    assert (recall.units, recall.preempt) == (4, False)
    broker.give_back("a", recall)
    assert not broker.say("a", NeedWeights(), 30.0), "its own word that steps are too short does not end it"
    assert not broker.demand("a", 60.0, busy_units=3)
    assert isinstance(broker.say("operator", Stream(engine="a", segments=9))[0], Done)
    grant = only(broker.told("a"), Grant)
    assert grant.units == 3
    broker.say("a", Grown(lease=grant.lease))
    broker.say("operator", Wake(engine="a"))
    assert only(broker.told("a"), Grant)


@pytest.mark.parametrize("segments", [-1, 0, 11])
def test_a_number_of_layers_that_makes_no_sense_is_refused(segments: int) -> None:
    broker = Broker(total=128)
    broker.welcome("a")
    assert isinstance(broker.say("operator", Stream(engine="a", segments=segments))[0], Refused)


def test_one_that_sleeps_cannot_stream() -> None:
    broker = two_in_turns()
    assert isinstance(broker.say("operator", Stream(engine="b", segments=5))[0], Refused)
