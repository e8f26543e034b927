"""Models that Polder can do nothing for: stock vLLM where there is no KV cache, no tier where prefixes are not cached."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import transformers

from polder.bench.models import ensure_model
from tests.engines.harness import A32, CONNECTOR, ENVIRONMENT, MODELS, Broker, environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(900)]
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "vocab_size": A32.vocab,
}


def start(folder: Path, settings: dict[str, str], **options: object) -> object:
    from vllm import LLM

    from polder.engines.vllm import plugin

    for file in ensure_model(A32, MODELS).glob("tokenizer*"):
        shutil.copy(file, folder)
    with environment(ENVIRONMENT | settings):
        plugin.register()
        return LLM(str(folder), enforce_eager=True, max_model_len=128, **options)


def test_a_model_without_a_kv_cache_is_served_and_the_broker_knows(tmp_path: Path, short_dir: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    broker = Broker(short_dir / "b", pages=8).start()
    try:
        llm = start(tmp_path, {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "bert"}, runner="pooling")
        try:
            (output,) = llm.embed([{"prompt_token_ids": [2, 3, 4]}], use_tqdm=False)  # type: ignore[attr-defined]
            assert len(output.outputs.embedding) == SMALL["hidden_size"]
            assert broker.status().stock == {"bert": "this model has no KV cache"}
            assert not broker.status().engines
        finally:
            llm.llm_engine.engine_core.shutdown()  # type: ignore[attr-defined]
    finally:
        broker.stop()


def test_a_tier_is_refused_where_vllm_does_not_cache_prefixes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """MLA on the CPU: vLLM computes something else from a cached prefix there, and switches prefix caching off."""
    heads = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    layers = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "first_k_dense_replace": 2,
        "num_key_value_heads": 4,
        "moe_intermediate_size": 64,
    }
    config = transformers.DeepseekV2Config(**SMALL, **heads, **layers)
    transformers.DeepseekV2ForCausalLM(config).save_pretrained(tmp_path)
    settings = {"POLDER_KV_BUDGET": "64MiB", "POLDER_PAGE": "64KiB", "POLDER_TIERS": "host", "POLDER_HOST": "1MiB"}
    before = set(os.listdir("/dev/shm"))
    with pytest.raises(RuntimeError, match="Engine core initialization failed"):
        start(tmp_path, settings, kv_transfer_config=CONNECTOR, dtype="bfloat16")
    printed = "".join(capfd.readouterr())
    assert "this engine does not cache prefixes" in printed
    for left in set(os.listdir("/dev/shm")) - before:
        os.unlink(f"/dev/shm/{left}")
