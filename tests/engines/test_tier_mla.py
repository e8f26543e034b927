"""A tier with MLA, which caches prefixes on a CPU with AMX. Without AMX it is refused: test_served_as_stock.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.engines.harness import ORDINARY, PAGE, VOCABULARY, Engine, prompts, tokens_of

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cpu._is_amx_tile_supported(), reason="vLLM does not cache MLA's prefixes without AMX"),
]
CONVERSATIONS = prompts(14, 300, seed=41)
SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
    "first_k_dense_replace": 4,
    "initializer_range": 0.05,
}


def test_answers_with_mla_are_those_of_stock_and_come_from_the_tier(tmp_path: Path) -> None:
    """In bfloat16, which AMX wants, a hit rounds otherwise than the whole prompt. So hits are compared with stock's own hits."""
    torch.manual_seed(5)
    config = transformers.DeepseekV2Config(**SHAPE, architectures=["DeepseekV2ForCausalLM"])
    transformers.DeepseekV2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": "bfloat16", "skip_tokenizer_init": True}
    stock = Engine.start("stock", tmp_path, num_gpu_blocks_override=400, like=ORDINARY, **options)
    try:
        expected, expected_of_hits = twice(stock)
    finally:
        stock.stop()
    assert len({tuple(answer) for answer in expected}) == len(expected)
    settings = {
        "POLDER_KV_BUDGET": f"{60 * PAGE}B",  # less than the conversations need
        "POLDER_PAGE": f"{PAGE}B",
        "POLDER_TIERS": "host",
        "POLDER_HOST": f"{400 * PAGE}B",
    }
    engine = Engine.start("a", tmp_path, settings, like=ORDINARY, **options)
    try:
        assert twice(engine) == (expected, expected_of_hits)
        found = engine.utility("polder_check")
        assert found["tier_host_hit_tokens_total"] > 0
        assert found["tier_failed_loads_total"] == 0
    finally:
        engine.stop()


def twice(engine: Engine) -> tuple[list[list[int]], list[list[int]]]:
    first, again = ([tokens_of(engine.generate([prompt]))[0] for prompt in CONVERSATIONS] for _ in range(2))
    return first, again
