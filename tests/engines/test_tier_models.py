"""Tiers with a hybrid model, whose layers see windows. Two ranks: test_weights.py."""

from __future__ import annotations

import pytest

from polder.bench.workloads.models import ModelRecipe
from tests.engines.harness import PAGE, Engine, prompts, tokens_of

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]
HYBRID = ModelRecipe(name="tiny-gemma", family="gemma3", layers=6, seed=3).in_float32()
CONVERSATIONS = prompts(14, 300, seed=41)  # of 10 blocks each


def test_answers_are_those_of_stock_and_come_from_the_tier() -> None:
    stock = Engine.start("stock", HYBRID, num_gpu_blocks_override=400)
    expected = [tokens_of(stock.generate([prompt]))[0] for prompt in CONVERSATIONS]
    stock.stop()
    settings = {
        "POLDER_KV_BUDGET": f"{56 * PAGE}B",  # less than the conversations need
        "POLDER_PAGE": f"{PAGE}B",
        "POLDER_TIERS": "host",
        "POLDER_HOST": f"{400 * PAGE}B",
    }
    engine = Engine.start("a", HYBRID, settings)
    try:
        answers = [tokens_of(engine.generate([prompt]))[0] for _ in range(3) for prompt in CONVERSATIONS]
        assert answers == expected * 3
        found = engine.utility("polder_check")
        assert found["tier_host_hit_tokens_total"] > 0
        assert found["tier_failed_loads_total"] == 0
    finally:
        engine.stop()
