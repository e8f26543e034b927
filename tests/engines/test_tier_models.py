"""Tiers with a hybrid model, whose layers see windows. Two ranks: test_weights.py."""

from __future__ import annotations

import pytest

from polder.bench.workloads.models import ModelRecipe
from tests.engines.conftest import Stock
from tests.engines.harness import ORDINARY, PAGE, VOCABULARY, Engine, prompts, tokens_of

pytestmark = pytest.mark.engine
HYBRID = ModelRecipe(name="tiny-hybrid", family="gemma3", layers=6, vocab=VOCABULARY, seed=3, spread=0.04).in_float32()
CONVERSATIONS = prompts(14, 300, seed=41)  # of 10 blocks each


def test_answers_are_those_of_stock_and_come_from_the_tier(stock: Stock) -> None:
    expected = stock(HYBRID, CONVERSATIONS, 24)
    settings = {
        "POLDER_KV_BUDGET": f"{56 * PAGE}B",  # less than the conversations need
        "POLDER_PAGE": f"{PAGE}B",
        "POLDER_TIERS": "host",
        "POLDER_HOST": f"{400 * PAGE}B",
    }
    engine = Engine.start("a", HYBRID, settings, like=ORDINARY)
    try:
        answers = [tokens_of(engine.generate([prompt]))[0] for _ in range(2) for prompt in CONVERSATIONS]
        assert answers == expected * 2
        found = engine.utility("polder_check")
        assert found["tier_host_hit_tokens_total"] > 0
        assert found["tier_failed_loads_total"] == 0
    finally:
        engine.stop()
