"""An operator's word to sleep, on a real engine whose requests come and are aborted meanwhile."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest

from polder.broker.client import request
from polder.broker.wire import Sleep
from tests.engines.harness import ORDINARY, SMALL_VOCABULARY, TINY, Broker, Engine, prompts, tokens_of, wait_for

pytestmark = pytest.mark.engine

ASKED = prompts(4, 100, seed=61, vocabulary=SMALL_VOCABULARY)
TURNS = 12


def test_an_operators_sleep_comes_when_the_last_request_was_aborted() -> None:
    draw = random.Random(7)
    with tempfile.TemporaryDirectory(prefix="ps-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=200).start()
        settings = {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "a", "POLDER_WEIGHTS": "elastic"}
        try:
            engine = Engine.start("a", TINY, settings, like=ORDINARY)
            try:
                right = tokens_of(engine.generate(ASKED, 16))
                for turn in range(TURNS):
                    waiting: list[str] = []
                    for number in range(6):
                        waiting.append(f"{turn}-{number}")
                        engine.submit(draw.choice(ASKED), 200, waiting[-1])
                        if draw.random() < 0.4:
                            request(broker.socket, Sleep(engine="a"))
                        if draw.random() < 0.7:
                            engine.abort(waiting.pop(draw.randrange(len(waiting))))
                    engine.utility(
                        "polder_check"
                    )  # it has what was submitted: a request that it meets asleep would wake it
                    request(broker.socket, Sleep(engine="a"))
                    for name in waiting:
                        engine.abort(name)
                    wait_for(lambda: broker.engine("a").asleep, "a to sleep")
                    assert broker.status().devices[0].pages_by_owner.get("a/weights", 0) == 0
                    if turn % 3 == 2:
                        assert tokens_of(engine.generate(ASKED, 16)) == right
                assert engine.utility("polder_check")["sleeps_total"] >= TURNS // 3
            finally:
                engine.stop()
        finally:
            broker.stop()
