"""A model's sizes, as far as memory and time depend on them, from its config.json or from a short list.

`read_kv_shape` knows decoders with plain full attention in every layer. `model_shape` knows those whose layers also
have a gated MLP and weights that are not quantised, on one rank. Any other model is refused by name: an estimate for
the wrong shape is worse than none.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from polder.errors import ConfigError

__all__ = ["KNOWN", "KvShape", "ModelShape", "element_bytes", "model_shape", "read_config", "read_kv_shape"]

_HYBRID, _STATES = "a hybrid of attention and other layers", "a state space model"
_OTHER_KV = {  # keys of config.json, and what they mean
    "kv_lora_rank": "latent attention (MLA)",
    "text_config": "a multimodal model",
    "is_encoder_decoder": "an encoder and a decoder",
    "num_kv_shared_layers": "layers that share their KV",
    "cross_attention_layers": "cross attention",
    "block_configs": "layers of different shapes",
    **dict.fromkeys(
        ("attn_layer_period", "attn_layer_indices", "layers_block_type", "hybrid_override_pattern"), _HYBRID
    ),
    **dict.fromkeys(("full_attention_interval", "linear_attn_config"), _HYBRID),
    **dict.fromkeys(("ssm_cfg", "mamba_d_state", "mamba_expand"), _STATES),
}
_OTHER_WEIGHTS = {
    "quantization_config": "quantised weights",
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), "a mixture of experts"),
}


class KvShape(NamedTuple):
    layers: int
    kv_heads: int
    head_dim: int

    def bytes_of_layer(self, element_bytes: int) -> int:
        """Keys and values of one token."""
        return 2 * self.kv_heads * self.head_dim * element_bytes


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    name: str
    kv: KvShape
    hidden: int
    intermediate: int
    heads: int
    vocab: int
    tied_embeddings: bool = False
    element_bytes: int = 2
    """Size of a weight and of a KV element."""
    trained_tokens: int | None = None
    """The model's own limit (max_position_embeddings)."""

    @property
    def layers(self) -> int:
        return self.kv.layers

    @property
    def kv_bytes_of_layer(self) -> int:
        return self.kv.bytes_of_layer(self.element_bytes)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * self.kv_bytes_of_layer

    @property
    def qkv_parameters(self) -> int:
        return self.hidden * (self.heads + 2 * self.kv.kv_heads) * self.kv.head_dim

    @property
    def layer_parameters(self) -> int:
        """Matrices of a layer: QKV, output projection, gated MLP. Norms are left out: a few parts in a hundred
        thousand."""
        return self.qkv_parameters + self.heads * self.kv.head_dim * self.hidden + 3 * self.hidden * self.intermediate

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
    def attention_flops_of_layer(self) -> int:
        """For each pair of a query and a key: 2 for its score, 2 for its value, in every dimension of every head."""
        return 4 * self.heads * self.kv.head_dim

    @property
    def activation_bytes_per_token(self) -> int:
        """Peak of a forward pass: residual and input of the MLP, its two halves and their product."""
        return (2 * self.hidden + 3 * self.intermediate) * self.element_bytes


KNOWN = {
    name: ModelShape(
        name=name,
        kv=KvShape(layers, kv_heads, 128),
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        vocab=vocab,
        trained_tokens=trained,
    )
    for name, layers, heads, kv_heads, hidden, intermediate, vocab, trained in (
        ("Qwen3-8B", 36, 32, 8, 4096, 12288, 151936, 40960),
        ("Qwen3-14B", 40, 40, 8, 5120, 17408, 151936, 40960),
        ("Qwen3-32B", 64, 64, 8, 5120, 25600, 151936, 40960),
        ("Llama-3.1-8B", 32, 32, 8, 4096, 14336, 128256, 131072),
        ("Llama-3.1-70B", 80, 64, 8, 8192, 28672, 128256, 131072),
        ("LWM-7B-1M", 32, 32, 32, 4096, 11008, 32000, 1 << 20),
    )
}
"""bfloat16; the LM head is not tied to the embeddings."""


def model_shape(model: str) -> ModelShape:
    """The shape of a folder, or of a name in the list with or without its organisation. Raises ConfigError for
    others."""
    path = Path(model)
    if not (path / "config.json").is_file():
        found = {name.lower(): shape for name, shape in KNOWN.items()}.get(path.name.lower())
        if found is None:
            raise ConfigError(f"model: {model!r} is no folder with a config.json, and not one of {', '.join(KNOWN)}")
        return found
    config = read_config(path)
    _refuse(path, [meaning for key, meaning in _OTHER_WEIGHTS.items() if config.get(key)])
    kv, heads = read_kv_shape(path, config), _count(path, config, "num_attention_heads")
    size = element_bytes(config)
    if size is None:
        raise ConfigError(f"model: {path} has weights of a type that is not planned for: give a model in 16 bits")
    return ModelShape(
        name=path.resolve().name,
        kv=kv,
        hidden=_count(path, config, "hidden_size"),
        intermediate=_count(path, config, "intermediate_size"),
        heads=heads,
        vocab=_count(path, config, "vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        element_bytes=size,
        trained_tokens=_count(path, config, "max_position_embeddings", default=0) or None,
    )


def read_config(path: Path) -> Mapping[str, Any]:
    """The folder's config.json. Raises ConfigError when it cannot be read."""
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"model: cannot read {path / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"model: {path / 'config.json'} holds no table of settings")
    return config


def read_kv_shape(path: Path, config: Mapping[str, Any]) -> KvShape:
    """Raises ConfigError unless every layer has a KV cache of plain full attention."""
    meanings = [meaning for key, meaning in _OTHER_KV.items() if config.get(key)]
    if config.get("sliding_window") and config.get("use_sliding_window") is not False:
        meanings.append("a sliding window")
    if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        meanings.append("layers of different kinds of attention")
    if "kv_cache" in json.dumps(config.get("quantization_config")):
        meanings.append("a checkpoint that chooses the KV cache's type")
    if "bert" in str(config.get("model_type")):
        meanings.append("an encoder, which has no KV cache")
    _refuse(path, meanings)
    heads = _count(path, config, "num_attention_heads")
    head_dim = _count(path, config, "head_dim", default=0) or _count(path, config, "hidden_size") // heads
    return KvShape(
        layers=_count(path, config, "num_hidden_layers"),
        kv_heads=_count(path, config, "num_key_value_heads", default=heads),
        head_dim=head_dim,
    )


def element_bytes(config: Mapping[str, Any], asked: str = "auto") -> int | None:
    """Bytes of a weight and of a KV element; None for a type that is not known. `asked`: vLLM's --dtype."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16") if asked == "auto" else asked
    if asked == "auto" and dtype == "float32":
        return 2  # vLLM's "auto" serves float32 models in half precision
    return {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}.get(dtype)


def _refuse(path: Path, meanings: list[str]) -> None:
    if meanings:
        raise ConfigError(
            f"model: {path} has {meanings[0]}; this is known for plain full attention in every layer only"
        )


def _count(path: Path, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"model: {path / 'config.json'}: {key} is {value!r}, not a number above 0")
    return value
