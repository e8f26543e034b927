"""Tiers that fail: loads that do not come, bytes that arrive changed, links too slow to be worth it. No token and no request
suffers."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import Stock
from tests.engines.harness import A32, ORDINARY, PAGE, ROUNDS, Broker, Engine, prompts, tokens_of

pytestmark = pytest.mark.engine
CONVERSATIONS = prompts(6, 300, seed=31)
SETTINGS = {
    "POLDER_KV_BUDGET": f"{11 * 8 * PAGE}B",
    "POLDER_PAGE": f"{PAGE}B",
    "POLDER_TIERS": "host",
    "POLDER_HOST": f"{320 * PAGE}B",
}


@pytest.fixture(scope="module")
def expected(stock: Stock) -> list[list[int]]:
    return stock(A32, CONVERSATIONS, 24)


@pytest.fixture
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    engine = Engine.start("a", A32, SETTINGS | request.param, like=ORDINARY)
    yield engine
    engine.stop()


def ask(engine: Engine, rounds: int) -> list[list[int]]:
    return [tokens_of(engine.generate([prompt]))[0] for _ in range(rounds) for prompt in CONVERSATIONS]


@pytest.mark.parametrize("engine", [{"POLDER_FAULTS": "fail=0.05,corrupt=0.05,seed=7"}], indirect=True)
def test_failing_and_corrupt_loads_are_counted_misses(engine: Engine, expected: list[list[int]]) -> None:
    answers = ask(engine, rounds=3)
    answers += tokens_of(engine.generate(CONVERSATIONS))
    assert answers == expected * 4
    found: dict[str, Any] = engine.utility("polder_check")
    assert found["tier_failed_loads_total"] > 2
    assert found["tier_host_corrupt_blocks_total"] > 0
    assert found["tier_host_failed_blocks_total"] > 0
    assert found["tier_host_hit_tokens_total"] > 0


@pytest.mark.parametrize("engine", [{"POLDER_FAULTS": "fail=1,seed=1"}], indirect=True)
def test_when_every_load_fails_every_request_is_computed_and_none_loops(
    engine: Engine, expected: list[list[int]]
) -> None:
    assert ask(engine, rounds=2) == expected * 2
    found: dict[str, Any] = engine.utility("polder_check")
    assert 1 <= found["tier_failed_loads_total"] <= len(CONVERSATIONS), "each request tried once"
    assert found["steps_total"] < 2000


@pytest.mark.parametrize("engine", [{"POLDER_LINKS": "host=2MB/s"}], indirect=True)
def test_a_tier_slower_than_computing_is_refused_and_said_so(engine: Engine, expected: list[list[int]]) -> None:
    assert ask(engine, rounds=2) == expected * 2
    found: dict[str, Any] = engine.utility("polder_check")
    assert found["tier_refused_loads_total"] >= len(CONVERSATIONS) - 1, "the first load tells how slow the tier is"
    assert found["tier_host_hit_tokens_total"] < found["tier_refused_tokens_total"]


@pytest.fixture(scope="module")
def resized() -> Iterator[tuple[Engine, Broker]]:
    """An engine with a host tier, and the broker that gives and takes its memory."""
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=320, host_pages=640).start()
        settings = {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "a", "POLDER_LINKS": "host=400MB/s"}
        engine = Engine.start(
            "a", A32, settings | {"POLDER_TIERS": "host", "POLDER_HOST": f"{640 * PAGE}B"}, like=ORDINARY
        )
        try:
            yield engine, broker
        finally:
            engine.stop()
            broker.stop()


def test_a_cache_that_shrinks_and_grows_while_blocks_travel_loses_no_token(
    resized: tuple[Engine, Broker], expected: list[list[int]]
) -> None:
    """Blocks move, their pages go, and transfers of the same blocks are under way."""
    engine, broker = resized
    for sizes in ((40, 12, 30), (11, 25, 10)):
        events = {5 * (i + 1): lambda units=units: broker.pin("a", units) for i, units in enumerate(sizes)}
        answers = engine.generate(CONVERSATIONS, events=events)
        assert tokens_of(answers) == expected
        assert [tokens_of(engine.generate([prompt]))[0] for prompt in CONVERSATIONS] == expected
    found: dict[str, Any] = engine.utility("polder_check")
    assert found["shrinks_total"] >= 2
    assert found["tier_host_hit_tokens_total"] > 0
    assert found["tier_failed_loads_total"] == 0


@pytest.mark.timeout(1200 + 120 * ROUNDS)
def test_what_a_request_has_generated_while_its_blocks_moved_is_right_in_its_next_turn(
    resized: tuple[Engine, Broker], stock: Stock
) -> None:
    """A block that moves before it is full is stored from where it is. Where it was there are zeros by then, or others' bytes.

    POLDER_ROUNDS says how often, and `-s` shows how many answers were compared.
    """
    engine, broker = resized
    lengths = [4, 60] * 6
    counts: Counter[str] = Counter()
    start: dict[str, Any] = engine.utility("polder_check")
    for seed in range(2, 2 + ROUNDS):
        asked = prompts(12, 150, seed)
        first = stock(A32, asked, lengths)
        turns = [prompt + answer for prompt, answer, length in zip(asked, first, lengths, strict=True) if length == 60]
        expected = stock(A32, turns, 24)
        before: dict[str, Any] = engine.utility("polder_check")
        broker.resize("a", 40)
        events = {20: lambda: (broker.resize("a", 13), broker.resize("a", 40))}
        answers = tokens_of(engine.generate(asked, lengths, events))  # type: ignore[arg-type]
        broker.resize("a", broker.engine("a").floor_units)
        filler = prompts(1, 960, 1000 + seed)
        engine.generate(filler, 1)  # takes the whole cache, so that all that is found comes from the tier
        answers += [tokens_of(engine.generate([turn]))[0] for turn in turns]
        after: dict[str, Any] = engine.utility("polder_check")
        assert after["migrated_blocks_total"] > before["migrated_blocks_total"]
        found = after["tier_host_hit_tokens_total"] - before["tier_host_hit_tokens_total"]
        assert found > sum(map(len, turns)) * 0.7
        counts["answers"] += len(answers)
        counts["differing"] += sum(one != other for one, other in zip(answers, first + expected, strict=True))
        for name in ("migrated_blocks_total", "tier_host_hit_tokens_total", "tier_host_corrupt_blocks_total"):
            counts[name] = int(after[name] - start[name])
        print(seed - 1, dict(counts), flush=True)
    assert counts["differing"] == 0
    assert counts["tier_host_corrupt_blocks_total"] == 0
