"""Real models, whose answers are text and hang on every part of what they were asked: with Polder the tokens are stock's.

SmolLM2 135M is a Llama of 30 layers. Gemma 3 270M is a hybrid: 15 of its 18 layers see 512 tokens, so its KV cache has six groups.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.engines import real_models
from tests.engines.answers import varied
from tests.engines.harness import Broker, Engine, prompts, tokens_of
from tests.engines.texts import passages_of

pytestmark = pytest.mark.engine
LONG = pytest.mark.skipif(
    not real_models.all_wanted(), reason="takes a minute of CPU time more: POLDER_REAL_MODELS=all"
)
PAGE = 64 << 10
ENDING = "In one sentence, this is about"
NEXT = (" Because of that,", " The most important word is")


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model, how its KV cache is cut with pages of 64 KiB and blocks of 32 tokens, and what is done to it."""

    get: Callable[[], Path]
    unit_pages: int
    units: int
    longest: int
    """max_model_len."""
    requests: int
    passages: int
    """In each prompt."""
    sizes: tuple[int, int, int]
    """Units that it has after 9, 14 and 18 steps."""


SMOLLM2 = Model(get=real_models.smollm2, unit_pages=90, units=16, longest=384, requests=6, passages=1, sizes=(8, 12, 7))
"""A layer's block has 48 KiB: a unit is 4 blocks."""
GEMMA3 = Model(
    get=real_models.gemma3, unit_pages=3, units=512, longest=1024, requests=4, passages=5, sizes=(440, 500, 300)
)
"""A layer's block has a page, and a block id stands for 3 layers of a group: a unit is one block. A prompt takes about 110."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    model: Model
    tokenizer: real_models.Tokenizer
    stock: Engine
    elastic: Engine
    broker: Broker

    def asked(self) -> list[list[int]]:
        texts = passages_of(self.model.requests, self.model.passages)
        return [self.tokenizer.prompt(text + ENDING) for text in texts]

    def expected(self, asked: list[list[int]], tokens: int | list[int] = 24) -> list[list[int]]:
        """Stock's answers, which vary."""
        return varied(tokens_of(self.stock.generate(asked, tokens)))

    def figures(self) -> dict[str, float]:
        """Checks all laws, and returns the counters."""
        found: dict[str, float] = self.elastic.utility("polder_check")
        return found

    def resize(self, units: int) -> None:
        self.broker.resize("e", units)

    def events(self) -> dict[int, Callable[[], None]]:
        return {
            step: lambda units=units: self.resize(units)
            for step, units in zip((9, 14, 18), self.model.sizes, strict=True)
        }

    def forget(self) -> None:
        """The elastic engine's own cache has hardly anything of what was asked before."""
        self.resize(self.broker.engine("e").floor_units)
        self.elastic.generate(prompts(1, self.model.longest - 16), 1)
        self.resize(self.model.units)


def available(get: Callable[[], Path]) -> Path:
    try:
        return get()
    except real_models.NotAvailable as reason:
        if real_models.required():
            raise
        pytest.skip(f"this test needs a real model: {reason}")


@contextlib.contextmanager
def start(model: Model, like: str, dtype: str) -> Iterator[Pair]:
    folder = available(model.get)
    started: list[Engine] = []
    options: dict[str, Any] = {
        "dtype": dtype,
        "max_model_len": model.longest,
        "max_num_seqs": 16,
    }
    with tempfile.TemporaryDirectory(prefix="pt-", dir="/tmp") as short:
        pages = model.units * model.unit_pages
        broker = Broker(Path(short) / "b", pages=pages, host_pages=2 * pages, page_bytes=PAGE).start()
        settings = {
            "POLDER_BROKER": str(broker.socket),
            "POLDER_ENGINE": "e",
            "POLDER_TIERS": "host",
            "POLDER_HOST": f"{2 * pages * PAGE}B",
        }
        try:
            blocks = model.units * (1 if model is GEMMA3 else 4)
            started.append(Engine.start("stock", folder, num_gpu_blocks_override=blocks, **options))
            started.append(Engine.start("e", folder, settings, like=like, **options))
            yield Pair(
                model=model,
                tokenizer=real_models.Tokenizer(folder),
                stock=started[0],
                elastic=started[1],
                broker=broker,
            )
        finally:
            for engine in started:
                engine.stop()
            broker.stop()


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((SMOLLM2, "async,uni"), id="SmolLM2, async,uni"),
        pytest.param((SMOLLM2, ""), id="SmolLM2, as on a CPU", marks=LONG),
        pytest.param((GEMMA3, "async,uni"), id="Gemma 3, async,uni", marks=LONG),
    ],
)
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    model, like = request.param
    with start(model, like, "float32") as pair:
        yield pair


def test_text_is_the_same_while_memory_shrinks_and_grows_and_after_it_came_back_from_a_tier(pair: Pair) -> None:
    asked, lengths = pair.asked(), [6, 24] * (pair.model.requests // 2)
    expected = pair.expected(asked, lengths)
    pair.resize(pair.model.units)
    assert tokens_of(pair.elastic.generate(asked, lengths, pair.events())) == expected
    found = pair.figures()
    assert found["shrinks_total"] > 0, "it kept its memory"
    # A unit of Gemma 3 is one block, so those that give up units give up free ones.
    assert found["migrated_blocks_total"] > 0 or pair.model is GEMMA3, "nothing moved"

    # The next turns find blocks that have moved, first in the engine's own cache, then in the tier.
    turns = [prompt + answer for prompt, answer in zip(asked[1::2], expected[1::2], strict=True)]
    for ending, forget in zip(NEXT, (lambda: None, pair.forget), strict=True):
        forget()
        hits = pair.figures()["tier_host_hit_tokens_total"]
        again = [turn + pair.tokenizer.more(ending) for turn in turns]
        answers = pair.elastic.generate(again, 16)
        assert all(answer.cached >= 96 for answer in answers), [answer.cached for answer in answers]
        assert tokens_of(answers) == pair.expected(again, 16)
    assert pair.figures()["tier_host_hit_tokens_total"] > hits
    assert pair.figures()["tier_failed_loads_total"] == 0


@LONG
def test_in_bfloat16_tokens_are_the_same_where_batches_have_the_same_shape() -> None:
    """Both engines are scheduled alike, and no request is preempted. With another shape of a batch stock vLLM itself gives other
    tokens in bfloat16."""
    # A unit has 8 blocks now. Three requests that still run have 15, over four units.
    with start(replace(SMOLLM2, sizes=(3, 12, 3)), "", "bfloat16") as pair:
        pair.resize(pair.model.units)
        asked, lengths = pair.asked(), [6, 24] * (pair.model.requests // 2)
        expected = pair.expected(asked, lengths)
        assert tokens_of(pair.elastic.generate(asked, lengths, pair.events())) == expected
        assert pair.figures()["preemptions_total"] == 0
        assert pair.figures()["migrated_blocks_total"] > 0, "nothing moved"
