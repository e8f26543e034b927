"""A model's sizes as far as memory and time depend on them, from its config.json or from a short list.

Decoders with plain full attention and a gated MLP in every layer, not quantised, on one rank. Anything else is refused by name:
an estimate for the wrong shape is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from polder.errors import ConfigError

__all__ = ["KNOWN", "ModelShape", "model_shape", "read_shape"]

_ELEMENT_BYTES = {
    "float32": 2,
    "float16": 2,
    "half": 2,
    "bfloat16": 2,
}  # vLLM's "auto" serves float32 models in half precision
_REFUSED = {  # keys of config.json, and what they mean
    "kv_lora_rank": "latent attention (MLA)",
    "text_config": "a multimodal model",
    "is_encoder_decoder": "an encoder and a decoder",
    "quantization_config": "quantised weights",
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "num_kv_shared_layers": "layers that share their KV",
    "cross_attention_layers": "cross attention",
    "block_configs": "layers of different shapes",
    "attn_layer_period": "a hybrid of attention and other layers",
    "attn_layer_indices": "a hybrid of attention and other layers",
    "layers_block_type": "a hybrid of attention and other layers",
    "hybrid_override_pattern": "a hybrid of attention and other layers",
    "full_attention_interval": "a hybrid of attention and other layers",
    "linear_attn_config": "a hybrid of attention and other layers",
    "ssm_cfg": "a state space model",
    "mamba_d_state": "a state space model",
    "mamba_expand": "a state space model",
}


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    name: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied_embeddings: bool = False
    element_bytes: int = 2
    """Of a weight and of a KV element."""
    trained_tokens: int | None = None
    """The model's own limit (max_position_embeddings)."""

    @property
    def kv_bytes_of_layer(self) -> int:
        """Of one token: keys and values."""
        return 2 * self.kv_heads * self.head_dim * self.element_bytes

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * self.kv_bytes_of_layer

    @property
    def qkv_parameters(self) -> int:
        return self.hidden * (self.heads + 2 * self.kv_heads) * self.head_dim

    @property
    def layer_parameters(self) -> int:
        """Matrices of a layer: QKV, output projection, gated MLP. Norms are left out: a few parts in a hundred thousand."""
        return self.qkv_parameters + self.heads * self.head_dim * self.hidden + 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        embeddings = self.head_parameters * (1 if self.tied_embeddings else 2)
        return self.layers * self.layer_parameters + embeddings

    @property
    def weight_bytes(self) -> int:
        return self.parameters * self.element_bytes

    @property
    def flops_per_token(self) -> int:
        """Matrix products of one token through all layers; its attention and the LM head come on top."""
        return 2 * self.layers * self.layer_parameters

    @property
    def attention_flops_of_layer(self) -> int:
        """For each pair of a query and a key: 2 for its score, 2 for its value, in every dimension of every head."""
        return 4 * self.heads * self.head_dim

    @property
    def activation_bytes_per_token(self) -> int:
        """Peak of a forward pass: residual and input of the MLP, its two halves and their product."""
        return (2 * self.hidden + 3 * self.intermediate) * self.element_bytes


def _shape(name: str, *, heads: tuple[int, int], sizes: tuple[int, int, int, int], trained_tokens: int) -> ModelShape:
    """`heads` of queries and of KV, all of 128 dimensions; `sizes`: layers, hidden, intermediate, vocabulary."""
    layers, hidden, intermediate, vocab = sizes
    return ModelShape(
        name=name,
        layers=layers,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads[0],
        kv_heads=heads[1],
        head_dim=128,
        vocab=vocab,
        trained_tokens=trained_tokens,
    )


KNOWN = {
    shape.name: shape
    for shape in (
        _shape("Qwen3-8B", heads=(32, 8), sizes=(36, 4096, 12288, 151936), trained_tokens=40960),
        _shape("Qwen3-14B", heads=(40, 8), sizes=(40, 5120, 17408, 151936), trained_tokens=40960),
        _shape("Qwen3-32B", heads=(64, 8), sizes=(64, 5120, 25600, 151936), trained_tokens=40960),
        _shape("Llama-3.1-8B", heads=(32, 8), sizes=(32, 4096, 14336, 128256), trained_tokens=131072),
        _shape("Llama-3.1-70B", heads=(64, 8), sizes=(80, 8192, 28672, 128256), trained_tokens=131072),
        _shape("LWM-7B-1M", heads=(32, 32), sizes=(32, 4096, 11008, 32000), trained_tokens=1 << 20),
    )
}
"""bfloat16; the LM head is not tied to the embeddings."""


def model_shape(model: str) -> ModelShape:
    """Of a name in the list, with or without its organisation, or of a folder. Raises ConfigError when it is neither."""
    path = Path(model)
    if (path / "config.json").is_file():
        return read_shape(path)
    names = {name.lower(): shape for name, shape in KNOWN.items()}
    found = names.get(path.name.lower())
    if found is None:
        raise ConfigError(
            f"model: {model!r} is no folder with a config.json, and not one of {', '.join(KNOWN)}, which need none"
        )
    return found


def read_shape(path: Path) -> ModelShape:
    """Of the folder `path`. Raises ConfigError for what is not a plain decoder."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: cannot read {path / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model: {path / 'config.json'} holds no table of settings")
    _refuse_others(path, config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    if dtype not in _ELEMENT_BYTES:
        raise ConfigError(f"model: {path} has weights of type {dtype}; planned are {', '.join(_ELEMENT_BYTES)}")
    heads, hidden = _count(path, config, "num_attention_heads"), _count(path, config, "hidden_size")
    return ModelShape(
        name=path.resolve().name,
        layers=_count(path, config, "num_hidden_layers"),
        hidden=hidden,
        intermediate=_count(path, config, "intermediate_size"),
        heads=heads,
        kv_heads=_count(path, config, "num_key_value_heads", default=heads),
        head_dim=_count(path, config, "head_dim", default=hidden // heads),
        vocab=_count(path, config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        element_bytes=_ELEMENT_BYTES[dtype],
        trained_tokens=_count(path, config, "max_position_embeddings", default=0) or None,
    )


def _refuse_others(path: Path, config: Mapping[str, Any]) -> None:
    meanings = [meaning for key, meaning in _REFUSED.items() if config.get(key)]
    if config.get("sliding_window") and config.get("use_sliding_window") is not False:
        meanings.append("a sliding window")
    if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        meanings.append("layers of different kinds of attention")
    if meanings:
        raise ConfigError(
            f"model: {path} has {meanings[0]}; `polder plan` knows decoders with plain full attention in every layer only"
        )


def _count(path: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"model: {path / 'config.json'}: {key} is {value!r}, not a number above 0")
    return value
