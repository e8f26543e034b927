"""One elastic engine beside a stock one: whatever happens to its memory, its tokens are stock's."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.harness import ORDINARY, Broker, Engine, prompts, tokens_of

pytestmark = pytest.mark.engine
UNITS = 40


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    import tempfile

    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=8 * UNITS).start()
        yield broker
        broker.stop()


@pytest.fixture(scope="module")
def stock() -> Iterator[Engine]:
    engine = Engine.start("stock", num_gpu_blocks_override=4 * UNITS)
    yield engine
    engine.stop()


@pytest.fixture(scope="module")
def elastic(broker: Broker) -> Iterator[Engine]:
    engine = Engine.start("a", settings={"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "a"}, like=ORDINARY)
    yield engine
    engine.stop()


@pytest.fixture(autouse=True)
def fresh(broker: Broker, stock: Engine, elastic: Engine) -> Iterator[None]:
    """Every test starts with empty prefix caches and the policy in charge; the laws hold at its end."""
    broker.pin("a", 0)
    for engine in (stock, elastic):
        assert engine.utility("reset_prefix_cache", False, False)
    yield
    elastic.utility("polder_check")


def counters(elastic: Engine) -> dict[str, float]:
    return dict(elastic.utility("polder_check"))


def test_growing_from_the_floor_by_demand_gives_the_tokens_of_stock(
    stock: Engine, elastic: Engine, broker: Broker
) -> None:
    broker.resize("a", broker.engine("a").floor_units)
    broker.pin("a", 0)
    asked = prompts(8, 250, seed=1)
    assert tokens_of(elastic.generate(asked)) == tokens_of(stock.generate(asked))
    assert broker.engine("a").held_units > broker.engine("a").floor_units


def test_shrinking_and_growing_in_mid_request_moves_busy_blocks_and_keeps_the_tokens(
    stock: Engine, elastic: Engine, broker: Broker
) -> None:
    broker.resize("a", UNITS)
    before = counters(elastic)
    asked, lengths = (
        prompts(12, 150, seed=2),
        [4, 40] * 6,
    )  # every other one ends early and leaves holes among the others
    events = {
        20: lambda: broker.resize("a", 13),
        25: lambda: broker.resize("a", UNITS),
        30: lambda: broker.resize("a", 14),
        34: lambda: broker.resize("a", 33),
    }
    outputs = elastic.generate(asked, lengths, events)
    assert tokens_of(outputs) == tokens_of(stock.generate(asked, lengths))
    after = counters(elastic)
    assert after["migrated_blocks_total"] > before["migrated_blocks_total"], "nothing moved: the test shows nothing"
    assert after["giveback_preemptions_total"] == before["giveback_preemptions_total"]
    assert after["shrinks_total"] >= before["shrinks_total"] + 2


def test_prefix_hits_survive_migration(stock: Engine, elastic: Engine, broker: Broker) -> None:
    broker.resize("a", UNITS)
    filler, asked = prompts(4, 300, seed=3), prompts(4, 310, seed=4)
    for engine in (stock, elastic):
        engine.generate(filler, tokens=2)
        engine.generate(asked, tokens=2)
    before = counters(elastic)
    broker.resize("a", 16)  # room for the newer prompts only: the colder half is evicted, the rest moves together
    after = counters(elastic)
    assert after["migrated_blocks_total"] > before["migrated_blocks_total"]
    again, reference = elastic.generate(asked), stock.generate(asked)
    assert [o.cached for o in again] == [o.cached for o in reference]
    assert tokens_of(again) == tokens_of(reference)


def test_evicted_blocks_are_never_hit(stock: Engine, elastic: Engine, broker: Broker) -> None:
    broker.resize("a", UNITS)
    asked = prompts(8, 280, seed=5)
    elastic.generate(asked, tokens=2)
    before = counters(elastic)
    broker.resize("a", broker.engine("a").floor_units)
    broker.resize("a", UNITS)  # other pages, zeroed, under the old block ids
    assert counters(elastic)["evicted_blocks_total"] > before["evicted_blocks_total"]
    again = elastic.generate(asked)
    kept_tokens = broker.engine("a").floor_units * 128
    assert sum(o.cached for o in again) <= kept_tokens
    assert tokens_of(again) == tokens_of(stock.generate(asked))


def test_shrinking_below_what_is_in_use_preempts_and_fails_nobody(
    stock: Engine, elastic: Engine, broker: Broker
) -> None:
    broker.resize("a", UNITS)
    before = counters(elastic)
    asked = prompts(10, 300, seed=6)
    floor = broker.engine("a").floor_units
    events = {20: lambda: broker.resize("a", floor), 40: lambda: broker.resize("a", UNITS)}
    outputs = elastic.generate(asked, tokens=40, events=events)
    after = counters(elastic)
    assert after["giveback_preemptions_total"] > before["giveback_preemptions_total"]
    assert [len(o.tokens) for o in outputs] == [40] * len(asked)
    assert tokens_of(outputs) == tokens_of(stock.generate(asked, tokens=40))


def test_a_pool_of_the_floor_still_serves_the_longest_request(stock: Engine, elastic: Engine, broker: Broker) -> None:
    broker.resize("a", broker.engine("a").floor_units)
    asked = prompts(3, 960, seed=7)
    assert tokens_of(elastic.generate(asked, tokens=16)) == tokens_of(stock.generate(asked, tokens=16))
