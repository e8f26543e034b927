"""A window under vLLM's GPU defaults, emulated on a CPU: V2 model runner, async scheduling, the worker in the core's process,
compiled models. CUDA graphs hold the pieces between the attention ops, for a window's copies are launched there.

One engine with a host tier, a small model and short contexts: the V2 runner's kernels are interpreted here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from polder.bench.workloads.models import ModelRecipe
from tests.engines.answers import varied
from tests.engines.controls import LATE_LAYERS, Switches
from tests.engines.harness import Engine, prompts, tokens_of, wait_for

pytestmark = pytest.mark.engine

LIKE = "v2,async,uni,warmup,compiled,graphs"
VOCABULARY = 2000
SMALL = ModelRecipe(
    name="rig-deep",
    family="llama",
    layers=8,
    hidden=128,
    intermediate=256,
    heads=4,
    kv_heads=2,
    vocab=VOCABULARY,
    dtype="float32",
    spread=0.12,
    seed=7,
)
"""A layer's block of 32 tokens is 32 KiB; a unit is two blocks in 8 pages: 512 KiB."""
PAGE = 64 << 10
LOCAL_UNITS = 8
LONGEST = 1000
OPTIONS: dict[str, Any] = {"max_model_len": LONGEST, "max_num_seqs": 16}
SETTINGS = {
    "POLDER_KV_BUDGET": f"{LOCAL_UNITS * 8 * PAGE}B",
    "POLDER_PAGE": f"{PAGE}B",
    "POLDER_WINDOW": "64MiB",
    "POLDER_TIERS": "host",
    "POLDER_HOST": "64MiB",
    "POLDER_LINKS": "window=400MB/s",  # an emulated link is what a control can make late
}
Answers = Callable[[list[list[int]], int | list[int]], list[list[int]]]


def asked(count: int, length: int, seed: int) -> list[list[int]]:
    return prompts(count, length, seed, VOCABULARY)


LONG = asked(1, 900, 31)[0]
SHORT = asked(3, 40, 33)


@pytest.fixture(scope="module")
def expected() -> Iterator[Answers]:
    """Answers of stock vLLM with memory for all."""
    engine = Engine.start("stock", SMALL, num_gpu_blocks_override=200, **OPTIONS)
    yield lambda prompts, tokens: varied(tokens_of(engine.generate(prompts, tokens)))
    engine.stop()


@pytest.fixture(scope="module")
def switches(tmp_path_factory: pytest.TempPathFactory) -> Switches:
    return Switches(tmp_path_factory.mktemp("controls"))


@pytest.fixture(scope="module")
def windowed(switches: Switches) -> Iterator[Engine]:
    with switches.reaching_engines() as more:
        engine = Engine.start("w", SMALL, SETTINGS | more, like=LIKE, **OPTIONS)
        yield engine
        engine.stop()


def figures(engine: Engine) -> dict[str, float]:
    """Checks all laws, and returns the counters."""
    found: dict[str, float] = engine.utility("polder_check")
    return found


def test_a_context_longer_than_the_memory_beside_short_ones_has_stocks_tokens(
    windowed: Engine, expected: Answers
) -> None:
    prompts = [SHORT[0], LONG, SHORT[1]]
    assert tokens_of(windowed.generate(prompts, 24)) == expected(prompts, 24)
    found = figures(windowed)
    assert found["window_opens_total"] > 0  # it may be closed again by now, for a short request that had no room
    assert found["window_loaded_bytes_total"] > 0
    graphs = windowed.llm.collective_rpc("graph_figures")[0]
    assert graphs["captured"] == 9 * (SMALL.layers + 1), "pieces for each size, and no whole step"
    assert graphs["replayed"] > 20 * (SMALL.layers + 1)


def test_a_request_that_came_home_is_stored_from_its_new_blocks_and_the_next_turn_has_stocks_tokens(
    windowed: Engine, expected: Answers
) -> None:
    """The first request holds all regular blocks and leaves windowed ones to the second, which comes home when the first has ended.

    Together they fit: 27 and 5 blocks of 9 regular and 24 windowed ones.
    """
    before = figures(windowed)["window_home_blocks_total"]
    prompts, lengths = [*asked(1, 850, 41), *asked(1, 145, 60)], [8, 70]
    answers = tokens_of(windowed.generate(prompts, lengths))
    assert answers == expected(prompts, lengths)
    assert figures(windowed)["window_home_blocks_total"] > before
    wait_for(lambda: bool(windowed.utility("polder_forget_local")), "no block to be in use")
    turn = [[*prompts[-1], *answers[-1], 5, 6, 7]]
    found = windowed.generate(turn, 16)
    assert found[0].cached >= 192, "blocks that filled after it had come home are in the tier"
    assert tokens_of(found) == expected(turn, 16)


@pytest.mark.parametrize(
    ("given", "broken"),
    [((), "a window's layer is not stored"), ((LATE_LAYERS,), "a window's layer is not awaited")],
    ids=["not stored", "not awaited"],
)
def test_tokens_differ_when_a_layer_is(
    given: tuple[str, ...], broken: str, windowed: Engine, switches: Switches, expected: Answers
) -> None:
    """Each time other prompts, for what a broken run has cached is wrong."""
    before, meanwhile, after = ([prompt] for prompt in asked(3, 700, 71 if given else 72))
    with switches.on(*given):
        assert tokens_of(windowed.generate(before, 16)) == expected(before, 16)
    with switches.on(*given, broken):
        assert tokens_of(windowed.generate(meanwhile, 16)) != expected(meanwhile, 16)
    assert tokens_of(windowed.generate(after, 16)) == expected(after, 16)
