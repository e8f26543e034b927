"""How much KV memory a model needs at least, from its config.json, before anything heavy is started.

The arithmetic is the engine's own (engines/vllm/rank/geometry.py): the blocks of one request of max_model_len, in units
of whole pages. It knows plain full attention on one rank only (planner/model_shape.py). For any other model the answer
is None, and the broker's exact check at the engine's start decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polder.engines.vllm.rank.geometry import TensorPlace, least_bytes
from polder.errors import ConfigError
from polder.planner.model_shape import element_bytes, read_config, read_kv_shape
from polder.serve.arguments import option

__all__ = ["least_kv_bytes"]

_BLOCK_TOKENS = {"cpu": 128, "cuda": 16}  # vLLM's defaults
_SEVERAL_RANKS = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--decode-context-parallel-size", "-dcp"),
    *("--data-parallel-size", "-dp"),
)


def least_kv_bytes(
    path: Path, *, max_model_len: int | Literal["auto"] | None, args: Sequence[str], device: str, page_bytes: int
) -> int | None:
    """Bytes without which the model cannot serve one request of its longest kind; None when its config is not
    understood."""
    try:
        config = read_config(path)
        shape = read_kv_shape(path, config)
    except ConfigError:
        return None
    if any(option(args, name) is not None for name in _SEVERAL_RANKS):
        return None
    size = element_bytes(config, option(args, "--dtype") or "auto")
    length = _length(config, max_model_len, args)
    block_tokens = option(args, "--block-size") or str(_BLOCK_TOKENS[device.partition(":")[0]])
    if size is None or length is None or not block_tokens.isdecimal() or not int(block_tokens):
        return None
    if (option(args, "--kv-cache-dtype") or "auto") != "auto":
        return None
    block_bytes = shape.bytes_of_layer(size) * int(block_tokens)
    place = TensorPlace(offset=0, layers=shape.layers, layer_stride=block_bytes, block_stride=block_bytes)
    return least_bytes(length, [int(block_tokens)], [place], page_bytes)


def _length(config: Mapping[str, Any], max_model_len: int | Literal["auto"] | None, args: Sequence[str]) -> int | None:
    given = option(args, "--max-model-len")
    if max_model_len == "auto":
        return None  # as long as fits, so any size is enough
    if max_model_len is not None:
        return max_model_len
    if given is not None:
        return int(given) if given.isdecimal() else None
    length = config.get("max_position_embeddings")
    if (config.get("rope_scaling") or {}).get("rope_type", "llama3") != "llama3":
        return None  # other types multiply the length by rules of their own
    return length if isinstance(length, int) and length > 0 else None
