"""Contexts longer than the device's KV memory on real engines: the same tokens as a stock engine that has enough of it.

Most run with async scheduling and the worker in the core's process, as on a GPU; test_window_defaults.py has the V2 runner.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import pytest

from polder.bench.workloads.models import ModelRecipe
from tests.engines.conftest import Stock
from tests.engines.harness import BLOCK_TOKENS, ORDINARY, VOCABULARY, Engine, prompts, tokens_of, wait_for

pytestmark = pytest.mark.engine

DEEP = ModelRecipe(
    name="tiny-deep",
    family="llama",
    layers=16,
    hidden=128,
    vocab=VOCABULARY,
    intermediate=256,
    heads=2,
    kv_heads=2,
    seed=5,
    spread=0.12,
).in_float32()
PAGE = 64 << 10
UNIT_TOKENS = 64
"""A layer's block of 32 tokens is 32 KiB, so a unit is two blocks in 16 pages: 1 MiB."""
LOCAL_UNITS = 8
LONGEST = 3600
"""7 of 8 units carry 8 windowed ones each: 57 units, less the null block, are 3,616 tokens."""
STOCKS_LONGEST = LOCAL_UNITS * UNIT_TOKENS - BLOCK_TOKENS
WINDOW = {
    "POLDER_KV_BUDGET": f"{LOCAL_UNITS}MiB",
    "POLDER_PAGE": f"{PAGE}B",
    "POLDER_WINDOW": "64MiB",
}
LONG = prompts(1, LONGEST - 70, seed=31)[0]
OTHER = prompts(1, 1500, seed=32)[0]
SHORT = prompts(3, 40, seed=33)
Answers = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def expected(stock: Stock) -> Answers:
    """Answers of stock vLLM with memory for all."""
    return functools.partial(stock, DEEP)


@pytest.fixture(scope="module")
def windowed() -> Iterator[Engine]:
    engine = Engine.start("w", DEEP, WINDOW, like=ORDINARY, max_model_len=LONGEST)
    yield engine
    engine.stop()


def figures(engine: Engine) -> dict[str, float]:
    """Checks all laws, and returns the counters."""
    found: dict[str, float] = engine.utility("polder_check")
    return found


def test_contexts_up_to_nine_tenths_of_layers_over_window_times_stocks_have_its_tokens(
    windowed: Engine, expected: Answers
) -> None:
    assert 0.9 * DEEP.layers / 2 <= LONGEST / STOCKS_LONGEST
    for length in (STOCKS_LONGEST - 64, STOCKS_LONGEST + 100, 1500, LONGEST - 70):
        asked = [LONG[:length]]
        assert tokens_of(windowed.generate(asked, 24)) == expected(asked, 24), f"{length} tokens"
    found = figures(windowed)
    assert found["window_opens_total"] >= 2
    assert found["window_loaded_bytes_total"] > 0
    assert found["window_carriers"] == LOCAL_UNITS - 1


def test_short_contexts_copy_nothing(windowed: Engine, expected: Answers) -> None:
    before = figures(windowed)["window_loaded_bytes_total"]
    assert tokens_of(windowed.generate(SHORT, 16)) == expected(SHORT, 16)
    after = figures(windowed)
    assert after["window_loaded_bytes_total"] == before


def test_a_prefix_that_is_found_again_lies_in_the_store(windowed: Engine, expected: Answers) -> None:
    asked = [[*OTHER, *range(50, 90)]]
    windowed.generate([OTHER], 8)
    answer = windowed.generate(asked, 32)
    assert answer[0].cached >= len(OTHER) - 2 * BLOCK_TOKENS
    assert tokens_of(answer) == expected(asked, 32)


def test_long_and_short_in_one_batch_and_two_long_ones_in_turn(windowed: Engine, expected: Answers) -> None:
    asked = [SHORT[0], LONG, SHORT[1], OTHER, SHORT[2]]
    lengths = [40, 24, 30, 40, 20]
    assert tokens_of(windowed.generate(asked, lengths)) == expected(asked, lengths)


def test_blocks_of_an_aborted_request_serve_the_next(windowed: Engine, expected: Answers) -> None:
    engine = windowed.llm.llm_engine
    windowed.submit(LONG[:3000], tokens=40)
    for _ in range(14):
        engine.step()
    engine.abort_request(list(engine.output_processor.request_states), internal=True)
    while engine.has_unfinished_requests():
        engine.step()
    asked = [LONG[500:3000]]
    assert tokens_of(windowed.generate(asked, 24)) == expected(asked, 24)


def test_memory_goes_back_to_short_requests_when_no_long_one_is_there(windowed: Engine, expected: Answers) -> None:
    windowed.generate([LONG], 4)
    assert figures(windowed)["window_carriers"] > 0
    asked = prompts(6, 150, seed=40)
    assert tokens_of(windowed.generate(asked, 24)) == expected(asked, 24)
    assert figures(windowed)["window_carriers"] == 0


def test_a_decoding_sequence_comes_home_when_it_fits(windowed: Engine, expected: Answers) -> None:
    """The first request holds all regular blocks and leaves windowed ones to the second, until it has ended.

    Together they fit: 48 and 7 blocks of 9 regular and 48 windowed ones.
    """
    asked, lengths = [*prompts(1, 1500, seed=42), *prompts(1, 200, seed=41)], [8, 200]
    before = figures(windowed)["window_home_blocks_total"]
    assert tokens_of(windowed.generate(asked, lengths)) == expected(asked, lengths)
    assert figures(windowed)["window_home_blocks_total"] > before


def test_a_context_that_no_memory_can_hold_is_refused_and_others_are_served(
    windowed: Engine, expected: Answers
) -> None:
    with pytest.raises(Exception, match=f"maximum context length is {LONGEST} tokens"):
        windowed.generate([[*LONG, *LONG]], 4)
    assert tokens_of(windowed.generate(SHORT, 8)) == expected(SHORT, 8)


def test_compiled_on_two_ranks_with_a_tier_a_goal_and_lost_copies_the_tokens_are_the_same(expected: Answers) -> None:
    """With max_model_len "auto", over a link so slow that copies alone decide what the goal allows, on a loaded machine too.

    The copies of the longest context take 1.3 s a step, those of 640 tokens 0.1 s. Copies fail on either rank: that costs a
    recomputation and no token.
    """
    goal = {"POLDER_TBT_GOAL": "1s", "POLDER_LINKS": "window=20MB/s"}
    faults = {"POLDER_FAULTS": "fail=0.001,seed=3"}
    settings = WINDOW | goal | faults | {"POLDER_TIERS": "host", "POLDER_HOST": "64MiB"}
    compiled = {"enforce_eager": False, "compilation_config": {"mode": 2, "backend": "eager"}}
    engine = Engine.start("w2", DEEP, settings, like="async", max_model_len=-1, tensor_parallel_size=2, **compiled)
    try:
        possible = engine.llm.llm_engine.model_config.max_model_len
        assert STOCKS_LONGEST < possible < LONGEST - BLOCK_TOKENS
        with pytest.raises(Exception, match=f"maximum context length is {possible} tokens"):
            engine.generate([LONG], 24)
        first = OTHER[:560]
        asked = [first, [*first, *range(50, 90)]]
        assert [tokens_of(engine.generate([one], 16))[0] for one in asked] == [expected([one], 16)[0] for one in asked]
        wait_for(lambda: bool(engine.utility("polder_forget_local")), "no block to be in use")
        assert tokens_of(engine.generate([asked[1]], 16)) == expected([asked[1]], 16)
        found = figures(engine)
        assert found["tier_host_hit_tokens_total"] >= len(first) - 2 * BLOCK_TOKENS, (
            "windowed blocks came back from the tier"
        )
        assert found["window_lost_total"] > 0
    finally:
        engine.stop()


def test_without_a_store_long_requests_fail_alone(expected: Answers) -> None:
    settings = WINDOW | {"POLDER_FAULTS": "fail=1"}
    engine = Engine.start("lost", DEEP, settings, like=ORDINARY, max_model_len=LONGEST)
    try:
        finished = {}
        for name, prompt in zip("abc", [OTHER, *SHORT[:2]], strict=True):
            engine.submit(prompt, tokens=12, name=name)
        while engine.llm.llm_engine.has_unfinished_requests():
            finished |= {o.request_id: o for o in engine.llm.llm_engine.step() if o.finished}
        reasons = {name[0]: output.outputs[0].finish_reason for name, output in finished.items()}
        assert reasons == {"a": "error", "b": "length", "c": "length"}
        assert tokens_of(engine.generate(SHORT, 16)) == expected(SHORT, 16)
    finally:
        engine.stop()
