"""Tiers with other shapes of engine: two ranks, and a hybrid model whose layers see windows."""

from __future__ import annotations

import pytest

from polder.bench.models import ModelRecipe
from tests.engines.harness import A32, PAGE, Engine, prompts, tokens_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
HYBRID = ModelRecipe(name="tiny-gemma", family="gemma3", layers=6, seed=3).in_float32()
CONVERSATIONS = prompts(14, 300, seed=41)  # of 10 blocks each
RANKS = {"tensor_parallel_size": 2}
CORES = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@pytest.mark.parametrize(
    ("recipe", "options", "environment", "kv_pages", "conversations"),
    [(A32, RANKS, CORES, 11 * 8, CONVERSATIONS[:5]), (HYBRID, {}, {}, 56, CONVERSATIONS)],  # more than the pool holds
    ids=["two ranks", "hybrid"],
)
def test_answers_are_those_of_stock_and_come_from_the_tier(
    recipe: ModelRecipe,
    options: dict[str, int],
    environment: dict[str, str],
    kv_pages: int,
    conversations: list[list[int]],
) -> None:
    stock = Engine.start("stock", recipe, {"VLLM_PLUGINS": "", **environment}, num_gpu_blocks_override=400, **options)
    expected = [tokens_of(stock.generate([prompt]))[0] for prompt in conversations]
    stock.stop()
    settings = {
        "POLDER_KV_BUDGET": f"{kv_pages * PAGE}B",
        "POLDER_PAGE": f"{PAGE}B",
        "POLDER_TIERS": "host",
        "POLDER_HOST": f"{400 * PAGE}B",
    }
    engine = Engine.start("a", recipe, settings | environment, **options)
    try:
        answers = [tokens_of(engine.generate([prompt]))[0] for _ in range(3) for prompt in conversations]
        assert answers == expected * 3
        found = engine.utility("polder_check")
        assert found["tier_host_hit_tokens_total"] > 0
        assert found["tier_failed_loads_total"] == 0
    finally:
        engine.stop()
