"""Memory that comes and goes under what every GPU user of vLLM gets (tests/rig): tokens are those of stock vLLM on a CPU."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engines.conftest import Stock
from tests.engines.harness import ORDINARY, PAGE, SMALL_VOCABULARY, TINY, Broker, Engine, prompts, tokens_of, wait_for

pytestmark = pytest.mark.engine
UNIT = 2 * PAGE
"""4 blocks = 128 tokens."""
UNITS, BORROWER_UNITS = 40, 11
EVERYTHING = "v2,async,uni,warmup,compiled,graphs"
ASKED, LENGTHS = prompts(12, 150, seed=2, vocabulary=SMALL_VOCABULARY), [4, 60] * 6
LONG = prompts(10, 300, seed=6, vocabulary=SMALL_VOCABULARY)
TALKS, LOAD = (
    prompts(6, 300, seed=21, vocabulary=SMALL_VOCABULARY),
    prompts(8, 330, seed=22, vocabulary=SMALL_VOCABULARY),
)

Answers = Callable[[list[list[int]], int | list[int]], list[list[int]]]


@pytest.fixture(scope="module")
def right(stock: Stock) -> Answers:
    return functools.partial(stock, TINY)


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Engine, Broker]]:
    """With a host tier; it lends, too. Its floor has far fewer blocks than the warm-up has requests."""
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as folder:
        broker = Broker(Path(folder) / "b", pages=2 * (UNITS + BORROWER_UNITS), host_pages=400).start()
        settings = {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "a", "POLDER_LEND": f"{16 * UNIT}B"}
        tiers = {"POLDER_TIERS": "host", "POLDER_HOST": f"{400 * PAGE}B"}
        try:
            engine = Engine.start("a", TINY, settings | tiers, like=EVERYTHING, max_num_seqs=64)
            assert broker.engine("a").floor_units * 4 < 64
            yield engine, broker
            engine.stop()
        finally:
            broker.stop()


def test_the_engine_has_the_defaults(served: tuple[Engine, Broker]) -> None:
    engine, _ = served
    config = engine.llm.llm_engine.vllm_config
    assert config.use_v2_model_runner
    assert config.scheduler_config.async_scheduling
    assert config.parallel_config.distributed_executor_backend == "uni"
    captured = engine.llm.collective_rpc("graph_figures")[0]["captured"]
    decode_sizes, sizes, pieces = 7, 9, TINY.layers + 1  # up to 64 requests; up to 256 tokens; split at each attention
    assert captured == decode_sizes + sizes * pieces, "whole decode steps, and pieces for steps that prefill"


def figures(engine: Engine) -> dict[str, Any]:
    return dict(engine.utility("polder_check"))


def test_blocks_move_in_mid_request_and_what_was_generated_comes_back_from_a_tier(
    served: tuple[Engine, Broker], right: Answers
) -> None:
    engine, broker = served
    first = right(ASKED, LENGTHS)
    turns = [prompt + answer for prompt, answer, length in zip(ASKED, first, LENGTHS, strict=True) if length == 60]
    expected = right(turns, 8)
    before = figures(engine)
    broker.resize("a", UNITS)
    sizes = {20: 13, 24: UNITS, 30: 12, 34: UNITS}
    events = {at: lambda units=units: broker.resize("a", units) for at, units in sizes.items()}
    assert tokens_of(engine.generate(ASKED, LENGTHS, events)) == first
    broker.resize("a", broker.engine("a").floor_units)
    engine.generate(
        prompts(1, 960, seed=3, vocabulary=SMALL_VOCABULARY), 1
    )  # takes the whole cache: what is found is the tier's
    assert [tokens_of(engine.generate([turn], 8))[0] for turn in turns] == expected
    assert engine.llm.collective_rpc("graph_figures")[0]["replayed"] > 100
    after = figures(engine)
    assert after["migrated_blocks_total"] > before["migrated_blocks_total"]
    found = after["tier_host_hit_tokens_total"] - before["tier_host_hit_tokens_total"]
    assert found > sum(map(len, turns)) * 0.7


def test_requests_that_lose_their_blocks_and_are_resumed_at_once_lose_no_token(
    served: tuple[Engine, Broker], right: Answers
) -> None:
    engine, broker = served
    broker.resize("a", UNITS)
    floor = broker.engine("a").floor_units
    sizes = {at + after: units for at in (14, 20, 26, 32) for after, units in ((0, floor), (1, floor + 14), (3, UNITS))}
    events = {at: lambda units=units: broker.resize("a", units) for at, units in sizes.items()}
    before = figures(engine)
    assert tokens_of(engine.generate(LONG, 40, events)) == right(LONG, 40)
    preempted = figures(engine)["giveback_preemptions_total"] - before["giveback_preemptions_total"]
    assert 0 < preempted < 4 * len(LONG), "no more than are in the way"


def test_blocks_that_were_lent_are_zeroed(served: tuple[Engine, Broker], right: Answers) -> None:
    lender, broker = served
    size = f"{BORROWER_UNITS * UNIT}B"
    sizes = {"POLDER_KV_FLOOR": size, "POLDER_KV_SHARE": size, "POLDER_KV_CEILING": size}
    settings = sizes | {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "b", "POLDER_TIERS": "peer"}
    broker.resize("a", UNITS)
    borrower = Engine.start("b", TINY, settings, like=ORDINARY)
    try:
        wait_for(lambda: figures(lender)["lent_offered_bytes"] >= 12 * UNIT, "an offer")
        before = figures(lender)["lent_borrowed_recalls_total"]
        for _ in range(2):
            assert [tokens_of(borrower.generate([talk]))[0] for talk in TALKS] == right(TALKS, 24)
        assert figures(lender)["lent_borrowed_bytes"] > 0
        assert tokens_of(lender.generate(LOAD)) == right(LOAD, 24)
        assert figures(lender)["lent_borrowed_recalls_total"] > before
    finally:
        borrower.stop()
