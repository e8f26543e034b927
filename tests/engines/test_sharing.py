"""Two engines with different models under one budget: memory flows by demand, and no death of anybody harms the others."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.conftest import Stock
from tests.engines.harness import A32, B32, ORDINARY, Broker, Engine, Output, prompts, tokens_of, wait_for

pytestmark = pytest.mark.engine
PAGES = 320
"""A unit of A is 8 pages, one of B 4; both hold 128 tokens. Equal shares: 20 units of A, 40 of B."""
LOAD_A, LOAD_B = prompts(10, 300, seed=11), prompts(12, 330, seed=12)


@pytest.fixture(scope="module")
def broker() -> Iterator[Broker]:
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=PAGES).start()
        yield broker
        broker.stop()


def settings(broker: Broker, name: str) -> dict[str, str]:
    return {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": name}


@pytest.fixture(scope="module")
def expected(stock: Stock) -> tuple[list[list[int]], list[list[int]]]:
    """What stock engines answer to both loads."""
    return stock(A32, LOAD_A, 48), stock(B32, LOAD_B, 48)


@pytest.fixture(scope="module")
def engines(broker: Broker, expected: object) -> Iterator[dict[str, Engine]]:
    started = {
        "a": Engine.start("a", A32, settings(broker, "a"), like=ORDINARY),
        "b": Engine.start("b", B32, settings(broker, "b"), like=ORDINARY),
    }
    yield started
    for engine in started.values():
        engine.stop()


def conserved(broker: Broker) -> bool:
    device = broker.status().devices[0]
    return device.free_pages + sum(device.pages_by_owner.values()) == device.total_pages == PAGES


def test_memory_flows_to_whoever_has_requests_and_back(
    broker: Broker, engines: dict[str, Engine], expected: tuple[list[list[int]], list[list[int]]]
) -> None:
    a, b = engines["a"], engines["b"]
    answers_b: list[Output] = []

    def b_bursts() -> None:
        wait_for(lambda: broker.engine("a").borrowed_units > 0, "a to borrow")
        answers_b.extend(b.generate(LOAD_B, tokens=48))

    answers_a = a.generate(LOAD_A * 2, tokens=48, events={8: b_bursts})
    assert tokens_of(answers_a) == expected[0] * 2
    assert tokens_of(answers_b) == expected[1]
    assert broker.engine("a").recalled_units > 0, "b's burst never took anything from a: the test shows nothing"
    assert broker.status().giveback_ms
    assert conserved(broker)
    for engine in engines.values():
        engine.utility("polder_check")


def test_a_killed_broker_is_survived_and_replaced(
    broker: Broker, engines: dict[str, Engine], expected: tuple[list[list[int]], list[list[int]]]
) -> None:
    a, b = engines["a"], engines["b"]
    held: dict[str, int] = {}

    def while_it_is_gone() -> None:
        assert tokens_of(b.generate(LOAD_B[:3], tokens=48)) == expected[1][:3]

    def come_back() -> None:
        broker.start()
        wait_for(lambda: len(broker.status().engines) == 2, "both engines to report")
        held.update({e.engine: e.held_units for e in broker.status().engines})

    answers = a.generate(LOAD_A, tokens=48, events={8: broker.kill, 12: while_it_is_gone, 30: come_back})
    assert tokens_of(answers) == expected[0]
    assert all(units > 0 for units in held.values())
    assert conserved(broker)
    # Memory moves again, pages of the former broker's segment included.
    wait_for(lambda: broker.status().uptime_s > 2.5, "recovery to end")
    floor = broker.engine("a").floor_units
    broker.resize("a", floor)
    broker.resize("a", 30)
    broker.pin("a", 0)
    assert tokens_of(a.generate(LOAD_A, tokens=48)) == expected[0]
    for engine in engines.values():
        engine.utility("polder_check")


def test_engines_killed_and_restarted_in_turn_harm_nobody(
    broker: Broker, engines: dict[str, Engine], expected: tuple[list[list[int]], list[list[int]]]
) -> None:
    for victim, other, load, answers in (("a", "b", LOAD_B, expected[1]), ("b", "a", LOAD_A, expected[0])):
        wait_for(lambda: len(broker.status().engines) == 2, "both engines to serve")
        processes = engines[victim].processes()

        def kill(victim: str = victim) -> None:
            os.kill(engines[victim].core_pid(), signal.SIGKILL)
            wait_for(lambda: [e.engine for e in broker.status().engines] != ["a", "b"], "the dead to be noticed")
            wait_for(lambda: len(broker.status().engines) == 1, "its pages to come back, before a successor comes")

        assert tokens_of(engines[other].generate(load, tokens=48, events={10: kill})) == answers
        assert conserved(broker)
        engines[victim].stop()
        assert not any(p.is_running() and p.status() != "zombie" for p in processes)
        recipe = A32 if victim == "a" else B32
        engines[victim] = Engine.start(victim, recipe, settings(broker, victim), like=ORDINARY)
    assert tokens_of(engines["a"].generate(LOAD_A, tokens=48)) == expected[0]
    assert tokens_of(engines["b"].generate(LOAD_B, tokens=48)) == expected[1]
