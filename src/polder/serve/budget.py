"""How much KV memory a model needs at least, from its config.json, before anything heavy is started.

The same arithmetic as the engine's own (engines/vllm/negotiate.py): the blocks of one request of max_model_len and the null block,
rounded up to units of one page in every layer. Only plain full attention is understood; for anything else (MLA, sliding windows,
hybrids, several ranks) the answer is None, and the broker's exact check at the engine's start decides.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polder.engines.vllm.geometry import TensorPlace, unit_blocks
from polder.errors import ConfigError

__all__ = ["least_kv_bytes", "option"]

_DTYPE_BYTES = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}
_BLOCK_TOKENS = {"cpu": 128, "cuda": 16}  # vLLM 0.32's defaults
_SEVERAL_RANKS = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--decode-context-parallel-size", "-dcp"),
    *("--data-parallel-size", "-dp"),
)
_NOT_PLAIN = (  # keys of config.json that mean another KV cache than one of full attention in every layer
    *("kv_lora_rank", "text_config", "num_kv_shared_layers", "attn_layer_period", "attn_layer_indices", "ssm_cfg"),
    *("hybrid_override_pattern", "layers_block_type", "full_attention_interval", "linear_attn_config", "mamba_d_state"),
    *("mamba_expand", "block_configs", "cross_attention_layers"),
)


def least_kv_bytes(
    path: Path, *, max_model_len: int | Literal["auto"] | None, args: Sequence[str], device: str, page_bytes: int
) -> int | None:
    """Bytes without which the model cannot serve one request of its longest kind; None when its config is not understood."""
    config = _read_config(path)
    if config is None or any(option(args, name) is not None for name in _SEVERAL_RANKS):
        return None
    token_bytes = _token_bytes_of_layer(config, args)
    length = _length(config, max_model_len, args)
    block_tokens = option(args, "--block-size") or str(_BLOCK_TOKENS[device.partition(":")[0]])
    if token_bytes is None or length is None or not block_tokens.isdecimal() or not int(block_tokens):
        return None
    block_bytes = token_bytes * int(block_tokens)
    place = TensorPlace(offset=0, layers=config["num_hidden_layers"], layer_stride=0, block_stride=block_bytes)
    blocks_of_unit = unit_blocks([place], page_bytes)
    units = -(-(-(-length // int(block_tokens)) + 1) // blocks_of_unit)
    return units * blocks_of_unit * block_bytes * place.layers


def option(args: Sequence[str], name: str) -> str | None:
    """The value of a `vllm serve` argument written as two words or with "="; None when it is not given.

    As vLLM takes it: with "_" for "-" too. Of an object given field by field ("--name.field") the value of the first.
    """
    for at, text in enumerate(args):
        given, equals, value = text.partition("=")
        # The fields' own names, and the names after a single dash, are as they stand.
        if given.startswith("--"):
            given = given.partition(".")[0].replace("_", "-")
        if given == name:
            if equals:
                return value
            if at + 1 == len(args):
                raise ConfigError(f"args: {name} needs a value")
            return args[at + 1]
    return None


def _read_config(path: Path) -> Mapping[str, Any] | None:
    try:
        config = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict) or any(config.get(key) for key in _NOT_PLAIN) or config.get("is_encoder_decoder"):
        return None
    if config.get("sliding_window") and config.get("use_sliding_window") is not False:
        return None
    if "kv_cache" in json.dumps(config.get("quantization_config")):  # a checkpoint that chooses the KV cache's type
        return None
    if "bert" in str(config.get("model_type")):  # encoders have no KV cache
        return None
    if set(config.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        return None
    return config


def _token_bytes_of_layer(config: Mapping[str, Any], args: Sequence[str]) -> int | None:
    heads = _count(config, "num_attention_heads")
    kv_heads = _count(config, "num_key_value_heads") if config.get("num_key_value_heads") is not None else heads
    head_dim = _count(config, "head_dim") or _count(config, "hidden_size") // max(1, heads)
    if not (_count(config, "num_hidden_layers") and kv_heads and head_dim):
        return None
    if (option(args, "--kv-cache-dtype") or "auto") != "auto":
        return None
    given = option(args, "--dtype") or "auto"
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16") if given == "auto" else given
    if given == "auto" and dtype == "float32":
        dtype = "bfloat16"  # vLLM's "auto" serves float32 models in half precision
    size = _DTYPE_BYTES.get(dtype)
    return None if size is None else 2 * kv_heads * head_dim * size


def _length(config: Mapping[str, Any], max_model_len: int | Literal["auto"] | None, args: Sequence[str]) -> int | None:
    given = option(args, "--max-model-len")
    if max_model_len == "auto":
        return None  # as long as fits, so anything does
    if max_model_len is not None:
        return max_model_len
    if given is not None:
        return int(given) if given.isdecimal() else None
    length = config.get("max_position_embeddings")
    if (config.get("rope_scaling") or {}).get("rope_type", "llama3") != "llama3":
        return None  # others multiply the length by rules of their own
    return length if isinstance(length, int) and length > 0 else None


def _count(config: Mapping[str, Any], key: str) -> int:
    """A positive number, or 0 when there is none (missing, or a list with a number for each layer)."""
    value = config.get(key)
    return value if isinstance(value, int) and value > 0 else 0
