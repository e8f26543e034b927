"""What config.json says of some models that people plan for, so that no network is asked. Weights are in bfloat16
unless a row says otherwise."""

from __future__ import annotations

from typing import Any

__all__ = ["CONFIGS"]

_KEYS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size"),
    *("intermediate_size", "vocab_size", "max_position_embeddings", "tie_word_embeddings"),
)
_ROWS: dict[str, tuple[int, ...]] = {
    "Qwen3-0.6B": (28, 16, 8, 128, 1024, 3072, 151936, 40960, True),
    "Qwen3-1.7B": (28, 16, 8, 128, 2048, 6144, 151936, 40960, True),
    "Qwen3-4B": (36, 32, 8, 128, 2560, 9728, 151936, 40960, True),
    "Qwen3-8B": (36, 32, 8, 128, 4096, 12288, 151936, 40960, False),
    "Qwen3-14B": (40, 40, 8, 128, 5120, 17408, 151936, 40960, False),
    "Qwen3-32B": (64, 64, 8, 128, 5120, 25600, 151936, 40960, False),
    "Qwen2.5-7B": (28, 28, 4, 128, 3584, 18944, 152064, 32768, False),
    "Llama-3.2-1B": (16, 32, 8, 64, 2048, 8192, 128256, 131072, True),
    "Llama-3.2-3B": (28, 24, 8, 128, 3072, 8192, 128256, 131072, True),
    "Llama-3.1-8B": (32, 32, 8, 128, 4096, 14336, 128256, 131072, False),
    "Llama-3.1-70B": (80, 64, 8, 128, 8192, 28672, 128256, 131072, False),
    "Llama-3.3-70B": (80, 64, 8, 128, 8192, 28672, 128256, 131072, False),
    "Mistral-7B-v0.3": (32, 32, 8, 128, 4096, 14336, 32768, 32768, False),
    "LWM-7B-1M": (32, 32, 32, 128, 4096, 11008, 32000, 1 << 20, False),
}
CONFIGS: dict[str, dict[str, Any]] = {name: dict(zip(_KEYS, row, strict=True)) for name, row in _ROWS.items()} | {
    "Qwen3-30B-A3B": {
        **dict(zip(_KEYS, (48, 32, 4, 128, 2048, 6144, 151936, 40960, False), strict=True)),
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
    },
    "gpt-oss-20b": {
        **dict(zip(_KEYS, (24, 64, 8, 64, 2880, 2880, 201088, 131072, False), strict=True)),
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "sliding_window_pattern": 2,
        "quantization_config": {"quant_method": "mxfp4"},
    },
    "DeepSeek-V2-Lite": {
        **dict(zip(_KEYS, (27, 16, 16, 128, 2048, 10944, 102400, 163840, False), strict=True)),
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_shared_experts": 2,
        "moe_intermediate_size": 1408,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 512,
        "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128,
        "v_head_dim": 128,
    },
}
