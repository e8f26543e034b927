"""Models that take turns with their weights under vLLM's GPU defaults: V2 runner, async scheduling, CUDA graphs (tests/rig)."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path

import pytest

from polder.broker.client import request
from polder.broker.wire import Sleep, Stream
from polder.errors import UsageError
from tests.engines.conftest import Stock
from tests.engines.controls import LATE_COPIES, Switches
from tests.engines.harness import (
    BLOCK_TOKENS,
    ORDINARY,
    SMALL_VOCABULARY,
    TINY,
    Broker,
    Engine,
    prompts,
    tokens_of,
    wait_for,
)

pytestmark = pytest.mark.engine

LIKES = {"a": "v2,async,uni,warmup,compiled,graphs", "b": ORDINARY}
LAYERS = 4
SEQUENCES = 16
"""The V2 runner's warm-up invents so many requests, in interpreted kernels: with vLLM's 256 a start takes half a minute more."""
RECIPES = {
    name: dataclasses.replace(TINY, name=f"tiny-rig-{name}", layers=LAYERS, seed=seed)
    for name, seed in (("a", 3), ("b", 4))
}
CACHED = prompts(1, 33, seed=32, vocabulary=SMALL_VOCABULARY)[0]
"""Asked again, all of it but one token is found in the cache, and that one is computed in a graph."""
ASKED = [[7], CACHED, *prompts(2, 150, seed=31, vocabulary=SMALL_VOCABULARY)]
TOKENS = 10
LATE = ("given: weights that sleep leave other bytes behind", LATE_COPIES)
PAGES = 73
"""Of 256 KiB: the weights of one model are 16, its KV floor is 36, and one that sleeps keeps 4."""


def one_by_one(engine: Engine) -> list[list[int]]:
    return [tokens_of(engine.generate([prompt], TOKENS))[0] for prompt in ASKED]


def sleeps(device: Broker, engine: Engine) -> None:
    request(device.socket, Sleep(engine=engine.name))
    wait_for(lambda: device.engine(engine.name).asleep, f"{engine.name} to sleep")


def test_two_models_take_turns_and_graphs_are_replayed_only_over_all_layers(stock: Stock, tmp_path: Path) -> None:
    """The neighbour has no graphs, which makes it cheap to start."""
    expected = {name: stock(recipe, ASKED, TOKENS) for name, recipe in RECIPES.items()}
    engines: list[Engine] = []
    switches = Switches(tmp_path)
    with switches.reaching_engines() as more, tempfile.TemporaryDirectory(prefix="pg-", dir="/tmp") as folder:
        device = Broker(Path(folder) / "b", pages=PAGES).start()
        try:
            for name, recipe in RECIPES.items():
                settings = {
                    "POLDER_BROKER": str(device.socket),
                    "POLDER_ENGINE": name,
                    "POLDER_WEIGHTS": "elastic",
                    "POLDER_LINKS": "weights=10MB/s",  # a layer takes longer than a step
                }
                engines.append(Engine.start(name, recipe, settings | more, like=LIKES[name], max_num_seqs=SEQUENCES))
            assert device.engine("b").asleep, "there was no room for its weights beside a's"
            a, b = engines
            for _ in range(2):
                for engine, other in ((b, "a"), (a, "b")):
                    assert one_by_one(engine) == expected[engine.name]
                    assert device.engine(other).segments == 0
            assert a.utility("polder_check")["wakes_total"] + b.utility("polder_check")["wakes_total"] >= 3
            assert a.llm.collective_rpc("graph_figures")[0]["replayed"] > 2 * TOKENS

            give_up = {3: lambda: a.utility("polder_give_up", 2)}
            assert tokens_of(a.generate([ASKED[2]], TOKENS, give_up)) == [expected["a"][2]]
            assert device.engine("a").segments == LAYERS, "it has all layers or none"
            with pytest.raises(UsageError, match="--enforce-eager"):
                request(device.socket, Stream(engine="a", segments=3))
            with switches.on(*LATE):
                sleeps(device, a)
                (again,) = a.generate([CACHED], TOKENS)
                assert again.cached == BLOCK_TOKENS, "the first step after the wake was to be a graph's"
                assert again.tokens == expected["a"][1]
                assert one_by_one(a) == expected["a"]
            with switches.on(*LATE, "graphs are replayed before all layers are there"):
                sleeps(device, a)
                wrong = tokens_of(a.generate([CACHED], TOKENS))
            assert wrong != expected["a"][1:2], "nobody waits for layers, and no token shows it"
            assert one_by_one(a) == expected["a"]
        finally:
            for engine in engines:
                engine.stop()
            device.stop()
