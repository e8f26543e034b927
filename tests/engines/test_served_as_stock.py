"""Models that Polder can do nothing for: stock vLLM where there is no KV cache, no tier where prefixes are not cached."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers

from polder.engines.vllm.settings import read_settings
from polder.engines.vllm.tiers.agreement import agree_on_tiers, check_caching
from polder.engines.vllm.tiers.worker import caches_prefixes
from polder.errors import ConfigError
from tests.engines.harness import ORDINARY, VOCABULARY, Broker, Engine

pytestmark = pytest.mark.engine
SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
}


def test_a_model_without_a_kv_cache_is_served_and_the_broker_knows(tmp_path: Path, short_dir: Path) -> None:
    transformers.BertModel(transformers.BertConfig(**SMALL)).save_pretrained(tmp_path)
    broker = Broker(short_dir / "b", pages=8).start()
    try:
        settings = {"POLDER_BROKER": str(broker.socket), "POLDER_ENGINE": "bert"}
        engine = Engine.start("bert", tmp_path, settings, like=ORDINARY, runner="pooling", max_model_len=128)
        try:
            (output,) = engine.llm.embed([{"prompt_token_ids": [2, 3, 4]}], use_tqdm=False)
            assert len(output.outputs.embedding) == SMALL["hidden_size"]
            assert broker.status().stock == {"bert": "this model has no KV cache"}
            assert not broker.status().engines
        finally:
            engine.stop()
    finally:
        broker.stop()


def test_a_tier_is_refused_where_vllm_does_not_cache_prefixes(tmp_path: Path) -> None:
    """MLA on a CPU without AMX: vLLM would compute something else from a cached prefix there, and has switched prefix caching off
    before the engine is made. Decisions that workers make later are theirs to tell."""
    from vllm.engine.arg_utils import EngineArgs

    heads = {"kv_lora_rank": 32, "q_lora_rank": None, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16}
    config = transformers.DeepseekV2Config(
        **SMALL, **heads, num_key_value_heads=4, architectures=["DeepseekV2ForCausalLM"]
    )
    config.save_pretrained(tmp_path)
    without_amx = {"attention_backend": "CPU_MLA"}
    arguments = EngineArgs(str(tmp_path), skip_tokenizer_init=True, max_model_len=128, **without_amx)
    engine = arguments.create_engine_config()
    assert engine.model_config.use_mla
    caches = engine.cache_config.enable_prefix_caching
    with pytest.raises(ConfigError, match="this engine does not cache prefixes"):
        check_caching([caches])
    with pytest.raises(ConfigError, match="this engine does not cache prefixes"):
        check_caching([True, True, caches_prefixes(SimpleNamespace(vllm_config=engine))])
    check_caching([True, True])
    settings = read_settings({"polder": {"kv_budget": "8MiB", "tiers": "host", "host": "8MiB"}}, default_name="a")
    for core, ranks in ((False, [True, True]), (True, [True, False])):
        config = SimpleNamespace(cache_config=SimpleNamespace(enable_prefix_caching=core))
        with pytest.raises(ConfigError, match="this engine does not cache prefixes"):
            agree_on_tiers(config, settings, None, None, None, None, None, lambda function, ranks=ranks: ranks)
