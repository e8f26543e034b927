"""A model's sizes, as far as memory and time depend on them, from its config.json or from a short list.

It knows decoders whose layers have attention with a KV cache: grouped queries, latent attention (MLA), sliding windows,
dense MLPs and mixtures of experts, quantised weights. A model with other layers, such as state spaces, is refused by
name: an estimate for the wrong shape is worse than none."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from polder.errors import ConfigError
from polder.planner.checkpoint import checkpoint_bytes, hub_folder
from polder.planner.known_models import CONFIGS

__all__ = [
    *("KNOWN", "KvShape", "ModelShape", "element_bytes", "model_shape", "own_limit", "read_config", "read_kv_shape"),
    "shape_of",
]

_HYBRID, _STATES = "a hybrid of attention and other layers", "a state space model"
_OTHER_KV = {  # keys of config.json, and what they mean
    "is_encoder_decoder": "an encoder and a decoder",
    "num_kv_shared_layers": "layers that share their KV",
    "cross_attention_layers": "cross attention",
    "block_configs": "layers of different shapes",
    "index_topk": "sparse attention with an index of its own",
    **dict.fromkeys(
        ("attn_layer_period", "attn_layer_indices", "layers_block_type", "hybrid_override_pattern"), _HYBRID
    ),
    **dict.fromkeys(("full_attention_interval", "linear_attn_config"), _HYBRID),
    **dict.fromkeys(("ssm_cfg", "mamba_d_state", "mamba_expand"), _STATES),
}
_LENGTH_KEPT = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Types of rope scaling whose max_position_embeddings is the scaled length already, as vLLM takes it."""


class KvShape(NamedTuple):
    layers: int
    kv_heads: int
    head_dim: int
    latent_dim: int = 0
    """Elements that a token has in a layer with latent attention (MLA), keys and values together. 0: keys and values
    for each head."""
    windowed_layers: int = 0
    """Part of `layers` that attends to the last `window_tokens` tokens only, and keeps no others."""
    window_tokens: int = 0
    element_bytes: int | None = None
    """Size of a KV element, if the checkpoint says so; None: as a weight's."""
    copies: int = 1
    """Ranks that have the same KV, because there are more ranks than heads, or the attention is latent."""

    @property
    def plain(self) -> bool:
        """Whether every layer has keys and values of all tokens, in the model's own type."""
        return not self.latent_dim and not self.windowed_layers and self.element_bytes is None

    def bytes_of_layer(self, element_bytes: int) -> int:
        """Keys and values of one token."""
        elements = self.latent_dim or 2 * self.kv_heads * self.head_dim
        return elements * (self.element_bytes or element_bytes) * self.copies

    def attended(self, tokens: float) -> float:
        """Tokens whose KV a layer reads in a context of so many, on average over the layers."""
        windowed = self.windowed_layers / self.layers
        return (1 - windowed) * tokens + windowed * min(tokens, self.window_tokens)


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    name: str
    kv: KvShape
    hidden: int
    heads: int
    vocab: int
    qkv_parameters: int
    output_parameters: int
    mlp_parameters: int
    """What every token uses of a layer's MLP: all of it, or the shared experts and the router. On average over the
    layers."""
    expert_parameters: int = 0
    """One expert of a layer."""
    experts: int = 0
    active_experts: int = 0
    """Experts that a token uses."""
    inner: int
    """Inner elements of the MLP that a token uses."""
    tied_embeddings: bool = False
    element_bytes: int = 2
    """Size of an activation, and of a KV element unless `kv` says otherwise."""
    weight_element_bytes: float = 2
    """Size of a weight of a layer; embeddings and head have `element_bytes`."""
    checkpoint_bytes: int | None = None
    """Bytes of the weights as they are loaded, from the files; None: only the config is known."""
    trained_tokens: int | None = None
    """The model's own limit."""

    @property
    def layers(self) -> int:
        return self.kv.layers

    @property
    def kv_bytes_of_layer(self) -> int:
        return self.kv.bytes_of_layer(self.element_bytes)

    @property
    def kv_bytes_per_token(self) -> int:
        return self.layers * self.kv_bytes_of_layer

    def kv_bytes(self, tokens: int) -> int:
        """KV of one sequence of so many tokens."""
        return int(self.kv_bytes_per_token * self.kv.attended(tokens))

    @property
    def layer_parameters(self) -> int:
        """Matrices of a layer. Norms are left out: a few parts in a hundred thousand."""
        mlp = self.mlp_parameters + self.experts * self.expert_parameters
        return self.qkv_parameters + self.output_parameters + mlp

    def used_parameters(self, rows: int) -> tuple[int, int]:
        """What comes after attention in a layer: (parameters that are read, parameters that one of `rows` tokens uses).

        Tokens choose experts of their own: of few tokens each may read others.
        """
        every = self.output_parameters + self.mlp_parameters
        read = min(self.experts, rows * self.active_experts) * self.expert_parameters
        return every + read, every + self.active_experts * self.expert_parameters

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def embedding_parameters(self) -> int:
        return self.head_parameters * (1 if self.tied_embeddings else 2)

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.embedding_parameters

    @property
    def weight_bytes(self) -> int:
        if self.checkpoint_bytes is not None:
            return self.checkpoint_bytes
        layers = int(self.layers * self.layer_parameters * self.weight_element_bytes)
        return layers + self.embedding_parameters * self.element_bytes

    @property
    def layer_weight_bytes(self) -> int:
        """The weights that can leave the device: those of all decoder layers."""
        return self.weight_bytes - self.embedding_parameters * self.element_bytes

    @property
    def attention_flops_of_layer(self) -> int:
        """For each pair of a query and a key: 2 for its score, 2 for its value, in every dimension of every head."""
        return (2 * self.heads * self.kv.latent_dim * 2) or 4 * self.heads * self.kv.head_dim

    @property
    def activation_bytes_per_token(self) -> int:
        """Peak of a forward pass: residual and input of the MLP, its two halves and their product."""
        return (2 * self.hidden + 3 * self.inner) * self.element_bytes

    @property
    def logit_bytes(self) -> int:
        """What one sequence needs: the head's output, and what sampling makes of it in float32, twice."""
        return self.vocab * (self.element_bytes + 8)


def model_shape(model: str) -> ModelShape:
    """The shape of a folder, of a name in this machine's cache of a hub, or of one in the list with or without its
    owner.

    Raises ConfigError for others. Asks no network.
    """
    path = Path(model)
    folder = path if (path / "config.json").is_file() else hub_folder(model)
    if folder is not None:
        config = read_config(folder)
        shape = shape_of(folder.resolve().name if folder is path else model, config)
        return replace(shape, checkpoint_bytes=checkpoint_bytes(folder, shape.element_bytes))
    found = {name.lower(): shape for name, shape in KNOWN.items()}.get(path.name.lower())
    if found is None:
        raise ConfigError(
            f"model: {model!r} is no folder with a config.json, no model in this machine's cache of a hub (no network is asked: "
            f"fetch it first), and not one of {', '.join(KNOWN)}. {_instead(path.name)}The config.json alone is enough: "
            "`hf download OWNER/NAME config.json`"
        )
    return found


def _instead(name: str) -> str:
    """A hint at the name in the list that `name` begins with, if there is one."""
    near = max((known for known in KNOWN if name.lower().startswith(known.lower())), key=len, default=None)
    if near is None:
        return ""
    return (
        f"{near} has the sizes of its fine-tuned variants, but not of quantised ones or of those with longer contexts. "
    )


def shape_of(name: str, config: Mapping[str, Any]) -> ModelShape:
    """The shape that a config.json describes. Raises ConfigError for one that is not known."""
    config = _of_text(config)
    kv, heads = read_kv_shape(name, config), _count(name, config, "num_attention_heads")
    size = element_bytes(config)
    if size is None:
        raise ConfigError(f"model: {name} has weights of a type that is not planned for: give a model in 16 bits")
    hidden, head_dim = _count(name, config, "hidden_size"), _head_dim(name, config)
    if kv.latent_dim:
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        of_query = heads * (config["qk_nope_head_dim"] + rope)
        queries = hidden * of_query
        if config.get("q_lora_rank"):
            queries = config["q_lora_rank"] * (hidden + of_query)
        qkv = queries + hidden * (rank + rope) + rank * heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
        output = heads * config["v_head_dim"] * hidden
    else:
        qkv, output = hidden * (heads + 2 * kv.kv_heads) * head_dim, heads * head_dim * hidden
    return ModelShape(
        name=name,
        kv=kv,
        hidden=hidden,
        heads=heads,
        vocab=_count(name, config, "vocab_size"),
        qkv_parameters=qkv,
        output_parameters=output,
        **_mlp(name, config, hidden),
        tied_embeddings=bool(config.get("tie_word_embeddings")),
        element_bytes=size,
        weight_element_bytes=_weight_element_bytes(config.get("quantization_config"), size),
        trained_tokens=own_limit(config),
    )


def _mlp(name: str, config: Mapping[str, Any], hidden: int) -> dict[str, int]:
    experts = next(
        (config[key] for key in ("num_experts", "num_local_experts", "n_routed_experts") if config.get(key)), 0
    )
    if not experts:
        inner = _count(name, config, "intermediate_size")
        return {"mlp_parameters": 3 * hidden * inner, "inner": inner}
    inner = config.get("moe_intermediate_size") or _count(name, config, "intermediate_size")
    active = _count(name, config, "num_experts_per_tok")
    shared = config.get("shared_expert_intermediate_size") or inner * (config.get("n_shared_experts") or 0)
    layers, dense = _count(name, config, "num_hidden_layers"), config.get("first_k_dense_replace") or 0
    of_dense = 3 * hidden * config["intermediate_size"] * dense
    # The expert's size is an average over all layers, too, so that both together give the right sum.
    return {
        "mlp_parameters": (of_dense + (layers - dense) * (3 * hidden * shared + experts * hidden)) // layers,
        "expert_parameters": 3 * hidden * inner * (layers - dense) // layers,
        "experts": experts,
        "active_experts": active,
        "inner": max(active * inner + shared, config["intermediate_size"] if dense else 0),
    }


def read_config(path: Path) -> Mapping[str, Any]:
    """The folder's config.json. Raises ConfigError when it cannot be read."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        why = "it is not JSON: " if isinstance(error, json.JSONDecodeError) else ""
        raise ConfigError(f"cannot read {path / 'config.json'}: {why}{error}") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path / 'config.json'} holds no table of settings")
    return config


def read_kv_shape(name: str, config: Mapping[str, Any]) -> KvShape:
    """Raises ConfigError unless every layer has attention with a KV cache."""
    config = _of_text(config)
    for key, meaning in _OTHER_KV.items():
        if config.get(key):
            raise ConfigError(
                f"model: {name} has {meaning}, which is not planned for; `polder serve` takes its sizes from vLLM"
            )
    if "bert" in str(config.get("model_type")):
        raise ConfigError(f"model: {name} is an encoder, which has no KV cache")
    heads, layers = _count(name, config, "num_attention_heads"), _count(name, config, "num_hidden_layers")
    windowed = _windowed_layers(name, config, layers)
    latent = config.get("kv_lora_rank") or 0
    return KvShape(
        layers=layers,
        kv_heads=_count(name, config, "num_key_value_heads", default=heads),
        head_dim=_head_dim(name, config),
        latent_dim=latent + _count(name, config, "qk_rope_head_dim") if latent else 0,
        windowed_layers=windowed,
        window_tokens=_count(name, config, "sliding_window") if windowed else 0,
        element_bytes=1 if "kv_cache" in json.dumps(config.get("quantization_config")) else None,
    )


def _windowed_layers(name: str, config: Mapping[str, Any], layers: int) -> int:
    if not config.get("sliding_window") or config.get("use_sliding_window") is False:
        kinds = set(config.get("layer_types") or ()) - {"full_attention", "sliding_attention"}
        windowed = 0
    elif config.get("layer_types"):
        kinds = set(config["layer_types"]) - {"full_attention", "sliding_attention"}
        windowed = config["layer_types"].count("sliding_attention")
    else:
        kinds, pattern = set(), config.get("sliding_window_pattern")
        full = layers // pattern if isinstance(pattern, int) and pattern > 1 else 0
        windowed = layers - max(full, config.get("max_window_layers", 0) if config.get("use_sliding_window") else 0)
    if kinds:
        raise ConfigError(
            f"model: {name} has layers of different kinds of attention ({', '.join(sorted(kinds))}), which is not planned for; "
            "`polder serve` takes its sizes from vLLM"
        )
    return max(0, windowed)


def own_limit(config: Mapping[str, Any]) -> int | None:
    """The longest context that the model was made for, as vLLM derives it. None when its config does not say."""
    config = _of_text(config)
    length = config.get("max_position_embeddings")
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        return None
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) in _LENGTH_KEPT or "gemma3" in str(config.get("model_type")):
        return length
    return int(length * (rope.get("factor") or 1))


def element_bytes(config: Mapping[str, Any], asked: str = "auto") -> int | None:
    """Bytes of a weight and of a KV element; None for a type that is not known. `asked`: vLLM's --dtype."""
    config = _of_text(config)
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16") if asked == "auto" else asked
    if asked == "auto" and dtype == "float32":
        return 2  # vLLM's "auto" serves float32 models in half precision
    return {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}.get(dtype)


def _weight_element_bytes(quantisation: Any, element_bytes: int) -> float:
    """Bytes of a weight with its part of the scales."""
    if not isinstance(quantisation, dict):
        return element_bytes
    method = f"{quantisation.get('quant_method')} {quantisation.get('quant_algo')}".lower()
    bits = quantisation.get("bits") or quantisation.get("w_bit") or (4 if quantisation.get("load_in_4bit") else None)
    groups = quantisation.get("config_groups") or {}
    for group in groups.values() if isinstance(groups, dict) else ():
        bits = bits or ((group or {}).get("weights") or {}).get("num_bits")
    if "mxfp4" in method or "nvfp4" in method or bits == 4:
        return 0.53
    return bits / 8 if isinstance(bits, int) else 1


def _of_text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A multimodal model's text part, which has the KV cache."""
    text = config.get("text_config")
    return {**config, **text, "text_config": None} if isinstance(text, dict) else config


def _head_dim(name: str, config: Mapping[str, Any]) -> int:
    heads = _count(name, config, "num_attention_heads")
    return _count(name, config, "head_dim", default=0) or _count(name, config, "hidden_size") // heads


def _count(name: str, config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    if value is None and default is not None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"model: {name}: {key} in config.json is {value!r}, not a number above 0")
    return value


KNOWN = {name: shape_of(name, config) for name, config in CONFIGS.items()}
