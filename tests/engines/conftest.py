"""One stock engine a model for the whole run: what it answers is what everybody else must answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from polder.bench.workloads.models import ModelRecipe
from tests.engines.answers import varied
from tests.engines.harness import Engine, tokens_of

Stock = Callable[[ModelRecipe, list[list[int]], int | list[int]], list[list[int]]]


@pytest.fixture(scope="session")
def stock() -> Iterator[Stock]:
    """Answers of stock vLLM in float32, where neither batch nor chunk changes a token: (model, prompts, tokens each) -> answers.

    Raises AssertionError when they do not vary.
    """
    engines: dict[str, Engine] = {}

    def answers(recipe: ModelRecipe, prompts: list[list[int]], tokens: int | list[int]) -> list[list[int]]:
        if recipe.name not in engines:
            engines[recipe.name] = Engine.start("stock", recipe, num_gpu_blocks_override=400, max_model_len=3600)
        return varied(tokens_of(engines[recipe.name].generate(prompts, tokens=tokens)))

    yield answers
    for engine in engines.values():
        engine.stop()
