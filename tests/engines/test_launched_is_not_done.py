"""On a GPU a step is launched, and done later. The rig's device thread does that here: what relies on "launched" shows."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.engines.conftest import Stock
from tests.engines.harness import ORDINARY, PAGE, SMALL_VOCABULARY, TINY, Broker, Engine, prompts, tokens_of, wait_for

pytestmark = pytest.mark.engine

LIKE = f"{ORDINARY},late"
UNITS, UNIT_PAGES, HOST_PAGES = 40, 2, 400
ASKED, LENGTHS = prompts(12, 150, seed=2, vocabulary=SMALL_VOCABULARY), [4, 40] * 6
"""Every other one ends early and leaves holes among the others."""
Started = Callable[..., Engine]


@pytest.fixture(scope="module")
def expected(stock: Stock) -> list[list[int]]:
    return stock(TINY, ASKED, LENGTHS)


@pytest.fixture
def broker() -> Iterator[Broker]:
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=UNITS * UNIT_PAGES, host_pages=HOST_PAGES).start()
        yield broker
        broker.stop()


@pytest.fixture
def start(broker: Broker) -> Iterator[Started]:
    engines: list[Engine] = []

    def start_it(seed: int, fences: str) -> Engine:
        settings = {
            "POLDER_BROKER": str(broker.socket),
            "POLDER_ENGINE": "a",
            "POLDER_TIERS": "host",
            "POLDER_HOST": f"{HOST_PAGES * PAGE}B",
            "GPULIKE_SEED": str(seed),
            "GPULIKE_FENCES": fences,
        }
        engines.append(Engine.start("a", TINY, settings, like=LIKE))
        return engines[-1]

    yield start_it
    for engine in engines:
        engine.stop()


def answers(engine: Engine, broker: Broker) -> list[list[list[int]]]:
    """All prompts while memory shrinks, moves and grows; then once more, from the tier alone."""
    broker.resize("a", UNITS)
    events = {
        12: lambda: broker.resize("a", 13),
        16: lambda: broker.resize("a", UNITS),
        22: lambda: broker.resize("a", 14),
        26: lambda: broker.resize("a", 33),
    }
    first = tokens_of(engine.generate(ASKED, LENGTHS, events))
    wait_for(lambda: bool(engine.utility("polder_forget_local")), "no block to be in use")
    return [first, tokens_of(engine.generate(ASKED, LENGTHS))]


def test_memory_that_shrinks_moves_and_is_stored_waits_for_steps_under_way(
    start: Started, broker: Broker, expected: list[list[int]]
) -> None:
    engine = start(1, "on")
    found = answers(engine, broker)
    figures = engine.llm.collective_rpc("late_figures")[0]
    counters = engine.utility("polder_check")
    assert figures["violations"] == 0
    assert found == [expected, expected]
    assert figures["layers"] > 100
    assert counters["migrated_blocks_total"] > 0
    assert counters["tier_host_hit_tokens_total"] > 0


def test_without_fences_the_same_requests_show_it(start: Started, broker: Broker, expected: list[list[int]]) -> None:
    """A negative control: the test above can fail."""
    engine = start(1, "off")
    found = answers(engine, broker)
    assert engine.llm.collective_rpc("late_figures")[0]["violations"] > 0
    assert found != [expected, expected]
