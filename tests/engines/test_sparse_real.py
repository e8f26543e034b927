"""SmolLM2 over 4,096 tokens of real text: 100 % read through slots is dense, token by token; a part is near it."""

from __future__ import annotations

import pytest

from polder.bench.workloads.retrieval import text_of
from tests.engines import real_models
from tests.engines.answers import varied
from tests.engines.harness import ORDINARY, Engine
from tests.engines.test_sparse import ask

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not real_models.all_wanted(), reason="takes minutes of CPU time: POLDER_REAL_MODELS=all"),
]
CONTEXT, TOKENS = 4096, 64
SETTINGS = {"POLDER_KV_BUDGET": "512MiB", "POLDER_PAGE": "192KiB", "POLDER_SPARSE": "512MiB"}


@pytest.mark.parametrize("like", [ORDINARY, f"{ORDINARY},compiled"])
def test_100_percent_through_slots_is_dense_eager_and_compiled(like: str) -> None:
    model = real_models.smollm2()
    prompt, _ = text_of("quote", real_models.Tokenizer(model).more, CONTEXT, TOKENS)
    longest = CONTEXT + TOKENS + 1
    engine = Engine.start("real", model, SETTINGS, like=like, max_model_len=longest, block_size=16)
    try:
        (dense,), (all_of_it,), (tenth,) = (ask(engine, [prompt], [budget], TOKENS) for budget in (None, "100%", "10%"))
    finally:
        engine.stop()
    varied([dense.tokens])
    assert all_of_it.tokens == dense.tokens
    assert all_of_it.said["slots"] == all_of_it.said["units"] == (CONTEXT - 256) // 16 - 2
    assert tenth.said["unread"] < 0.2
    agreeing = sum(one == other for one, other in zip(tenth.tokens, dense.tokens, strict=True))
    assert agreeing > 8, "a passage is quoted: far from a wrong selection's"
