"""Polder's CUDA backend under real vLLM: memory that the fake driver maps, copies in its streams, steps that it carries out late.

The rig's word `driver` (tests/rig/README.md). The fake driver finds each piece of work that is not ordered behind what it needs,
and memory that is unmapped under work, whatever the delays are: one such finding fails the test. With POLDER_DRIVER_SEEDS=100 each
engine answers that often, with other delays each time.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polder.bench.workloads.models import ModelRecipe
from polder.broker.client import request
from polder.broker.wire import Wake
from tests.engines.conftest import Stock
from tests.engines.harness import A32, B32, ORDINARY, PAGE, Broker, Engine, prompts, tokens_of, wait_for
from tests.engines.test_window import DEEP, WINDOW
from tests.memory.machines import build_fakecuda

LIKE = f"{ORDINARY},driver"
SEEDS = int(os.environ.get("POLDER_DRIVER_SEEDS", "2"))
pytestmark = [pytest.mark.engine, pytest.mark.timeout(1200 + 60 * SEEDS)]
A_PAGES, B_PAGES = 8, 4
"""Of a unit, which holds 128 tokens."""


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables of processes that use the fake driver."""
    library = build_fakecuda(tmp_path_factory.mktemp("fakecuda"))
    return {
        "FAKECUDA_LIBRARY": str(library),
        "FAKECUDA_MB": "512",
        "FAKECUDA_GRANULARITY": str(64 << 10),
        "FAKECUDA_DELAY_US": "1500",
    }


class Fleet:
    """A broker and engines over the fake driver."""

    def __init__(self, folder: Path, driver: dict[str, str]) -> None:
        self._socket, self._driver = folder / "b", driver
        self._running: list[Any] = []

    def broker(self, pages: int, host_pages: int = 0) -> Broker:
        broker = Broker(self._socket, pages=pages, host_pages=host_pages, variables=self._driver).start()
        self._running.append(broker)
        return broker

    def engine(self, name: str, recipe: ModelRecipe, settings: dict[str, str], **options: Any) -> Engine:
        own = {"POLDER_ENGINE": name} | self._driver | settings
        if "POLDER_KV_BUDGET" not in settings:
            own["POLDER_BROKER"] = str(self._socket)
        engine = Engine.start(name, recipe, own, like=LIKE, **options)
        self._running.append(engine)
        return engine

    def stop(self) -> None:
        for each in reversed(self._running):
            each.stop()


@pytest.fixture
def fleet(driver: dict[str, str]) -> Iterator[Fleet]:
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        fleet = Fleet(Path(folder), driver)
        yield fleet
        fleet.stop()


def figures(engine: Engine) -> dict[str, Any]:
    (found,) = engine.llm.llm_engine.engine_core.collective_rpc("driver_figures")
    return dict(found)


def check(engine: Engine) -> dict[str, Any]:
    """All laws hold, and the driver has found nothing. Returns what both count."""
    counters: dict[str, Any] = engine.utility("polder_check")
    found = figures(engine)
    assert found["driver"] == ""
    assert found["violations"] == 0
    return counters | found


def fixed(units: int, pages: int) -> dict[str, str]:
    size = f"{units * pages * PAGE}B"
    return {"POLDER_KV_FLOOR": size, "POLDER_KV_SHARE": size, "POLDER_KV_CEILING": size}


def rounds(count: int = SEEDS) -> Iterator[int]:
    """What is done in each round has other delays; `-s` shows how many were made."""
    for number in range(count):
        yield number
        print(f"{number + 1} of {count} rounds", flush=True)


def ask(engine: Engine, questions: list[list[int]]) -> list[list[int]]:
    """One after another."""
    return [tokens_of(engine.generate([question]))[0] for question in questions]


def test_memory_comes_and_goes_under_late_steps(stock: Stock, fleet: Fleet) -> None:
    questions = prompts(5, 180, seed=71)
    expected = stock(A32, questions, 32)
    broker = fleet.broker(40 * A_PAGES)
    engine = fleet.engine("a", A32, {})
    for _ in rounds():
        events = {
            3: lambda: broker.resize("a", 30),
            8: lambda: broker.resize("a", 14),
            14: lambda: broker.resize("a", 24),
            20: lambda: broker.resize("a", 12),
        }
        assert tokens_of(engine.generate(questions, tokens=32, events=events)) == expected
    assert check(engine)["cuMemUnmap"] > 0


CONVERSATIONS = prompts(6, 300, seed=21)
A_FIXED = 11
"""Units: one conversation beside the one that runs."""
TIERS = {"POLDER_TIERS": "host", "POLDER_HOST": f"{96 * PAGE}B"}


def test_blocks_that_go_to_the_host_while_steps_run_come_back_right(stock: Stock, fleet: Fleet) -> None:
    expected = stock(A32, CONVERSATIONS, 24)
    fleet.broker(A_FIXED * A_PAGES, host_pages=96)
    engine = fleet.engine("a", A32, TIERS | fixed(A_FIXED, A_PAGES))
    for _ in rounds(1 + SEEDS):
        assert ask(engine, CONVERSATIONS) == expected
    found = check(engine)
    assert found["tier_host_hit_tokens_total"] > 0
    assert found["tier_host_corrupt_blocks_total"] == 0
    assert found["cuMemcpyAsync"] + found["cuMemcpyBatchAsync_v2"] > 0


def test_without_marks_the_driver_finds_copies_of_blocks_that_are_still_written(fleet: Fleet) -> None:
    """The control."""
    fleet.broker(A_FIXED * A_PAGES, host_pages=96)
    engine = fleet.engine("a", A32, TIERS | fixed(A_FIXED, A_PAGES) | {"GPULIKE_FENCES": "off"})
    ask(engine, CONVERSATIONS[:3])
    assert "read while it is written" in figures(engine)["driver"]


def test_blocks_in_a_neighbours_memory_come_back_right_and_the_neighbours_are_its_own(
    stock: Stock, fleet: Fleet
) -> None:
    load = prompts(10, 330, seed=22)
    expected, expected_b = stock(A32, CONVERSATIONS, 24), stock(B32, load, 24)
    fleet.broker(A_FIXED * A_PAGES + 40 * B_PAGES)
    b = fleet.engine("b", B32, {"POLDER_LEND": f"{16 * B_PAGES * PAGE}B"} | fixed(40, B_PAGES))
    a = fleet.engine("a", A32, {"POLDER_TIERS": "peer"} | fixed(A_FIXED, A_PAGES))
    wait_for(lambda: b.utility("polder_check")["lent_offered_bytes"] >= 12 * B_PAGES * PAGE, "b to lend")
    for _ in rounds():
        until_hits(a, expected, _hits(a))
        answers: list[list[int]] = []
        burst = {3: lambda into=answers: into.extend(tokens_of(b.generate(load)))}
        assert tokens_of(a.generate(CONVERSATIONS, events=burst)) == expected
        assert answers == expected_b, "the lender's own answers"
    assert check(a)["tier_peer_corrupt_blocks_total"] == 0
    assert check(b)["lent_borrowed_recalls_total"] > 0


def until_hits(engine: Engine, expected: list[list[int]], before: float) -> None:
    """It looks for lenders once a second."""
    wait_for(lambda: ask(engine, CONVERSATIONS) == expected and _hits(engine) > before, "hits in lent memory")


def _hits(engine: Engine) -> float:
    return float(engine.utility("polder_check")["tier_peer_hit_tokens_total"])


def test_weights_leave_are_streamed_and_come_back_under_late_steps(stock: Stock, fleet: Fleet) -> None:
    questions = prompts(4, 200, seed=51)
    expected = stock(A32, questions, 24)
    broker = fleet.broker(900)
    engine = fleet.engine("a", A32, {"POLDER_WEIGHTS": "elastic"})
    layers = broker.engine("a").layers
    events = {
        3: lambda: engine.utility("polder_give_up", 3),
        8: lambda: engine.utility("polder_give_up", 2),
        12: lambda: request(broker.socket, Wake(engine="a")),
        18: lambda: engine.utility("polder_give_up", layers - 2),
    }
    for _ in rounds():
        for question, tokens in zip(questions, expected, strict=True):
            assert tokens_of(engine.generate([question], events=dict(events))) == [tokens]
            request(broker.socket, Wake(engine="a"))
            wait_for(lambda: broker.engine("a").segments == layers, "all layers to be back")
    assert check(engine)["weights_loads_total"] > 10 * layers


def test_windowed_contexts_have_stocks_tokens_under_late_steps(stock: Stock, fleet: Fleet) -> None:
    long, short = prompts(1, 1500, seed=32)[0], prompts(2, 40, seed=33)
    asked, lengths = [short[0], long, short[1]], [24, 16, 20]
    expected = stock(DEEP, asked, lengths)
    engine = fleet.engine("w", DEEP, WINDOW, max_model_len=3600)
    for _ in rounds():
        assert tokens_of(engine.generate(asked, lengths)) == expected
    assert check(engine)["window_loaded_bytes_total"] > 0
