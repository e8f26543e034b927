"""vLLM's own parser says what is wrong with a model's arguments, before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from polder.engines.vllm.arguments import refusal, serve_parser

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "vocab_size": 2000,
    "max_position_embeddings": 8192,
    "dtype": "bfloat16",
}


def test_vllm_itself_says_what_is_wrong_with_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_PLUGINS", "")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    parser = serve_parser()

    def said(*args: str, **env: str) -> str:
        return refusal(parser, str(tmp_path), [*args, "--skip-tokenizer-init"], env)

    assert said("--enforce-eager", "--max-num-seqs", "4") == ""
    assert "--enforce-eagr; did you mean --enforce-eager?" in said("--enforce-eagr")
    assert "invalid int value: 'many'" in said("--max-num-seqs", "many")
    assert "greater than the derived max_model_len" in said("--max-model-len", "9000")
    assert said("--max-model-len", "9000", VLLM_ALLOW_LONG_MAX_MODEL_LEN="1") == ""
    assert "needs --kv-transfer-config" in said(POLDER_BROKER="/b", POLDER_TIERS="host", POLDER_HOST="1GiB")
    assert refusal(parser, "owner/name", ["--max-num-seqs", "4"], {}) == "", "no network is asked"
