"""How much KV memory a model needs at least, from its config.json, before anything heavy is started.

The arithmetic is the engine's own (engines/vllm/rank/geometry.py): the blocks of one request of max_model_len, in units
of whole pages. It is exact for plain full attention on one rank (planner/model_shape.py), and a bound for latent
attention, windows and other types. Where the answer is None, the broker's check at the engine's start decides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from polder.engines.vllm.rank.geometry import TensorPlace, least_bytes
from polder.errors import ConfigError
from polder.planner.model_shape import element_bytes, own_limit, read_config, read_kv_shape
from polder.serve.arguments import option

__all__ = ["context_tokens", "least_kv_bytes", "most_kv_bytes"]

_BLOCK_TOKENS = {"cpu": 128, "cuda": 16}  # vLLM's defaults
_SEVERAL_RANKS = (
    *("--tensor-parallel-size", "-tp", "--pipeline-parallel-size", "-pp", "--decode-context-parallel-size", "-dcp"),
    *("--data-parallel-size", "-dp"),
)


def least_kv_bytes(
    path: Path, *, max_model_len: int | Literal["auto"] | None, args: Sequence[str], device: str, page_bytes: int
) -> int | None:
    """Bytes without which the model cannot serve one request of its longest kind; None when only the engine can
    tell."""
    try:
        shape = read_kv_shape(path.name, read_config(path))
    except ConfigError:
        return None
    if not shape.plain or (option(args, "--kv-cache-dtype") or "auto") != "auto":
        return None
    return most_kv_bytes(path, max_model_len=max_model_len, args=args, device=device, page_bytes=page_bytes)


def most_kv_bytes(
    path: Path, *, max_model_len: int | Literal["auto"] | None, args: Sequence[str], device: str, page_bytes: int
) -> int | None:
    """Bytes that are enough for one such request: with windows as if every layer kept all tokens. None when its config
    is not understood."""
    try:
        config = read_config(path)
        shape = read_kv_shape(path.name, config)
    except ConfigError:
        return None
    if any(option(args, name) is not None for name in _SEVERAL_RANKS):
        return None
    size = element_bytes(config, option(args, "--dtype") or "auto")
    length = context_tokens(config, max_model_len, args)
    block_tokens = option(args, "--block-size") or str(_BLOCK_TOKENS[device.partition(":")[0]])
    if size is None or length is None or not block_tokens.isdecimal() or not int(block_tokens):
        return None
    block_bytes = shape.bytes_of_layer(size) * int(block_tokens)
    place = TensorPlace(offset=0, layers=shape.layers, layer_stride=block_bytes, block_stride=block_bytes)
    return least_bytes(length, [int(block_tokens)], [place], page_bytes)


def context_tokens(
    config: Mapping[str, Any], max_model_len: int | Literal["auto"] | None, args: Sequence[str]
) -> int | None:
    """The longest context that is served, prompt and reply; None when only the engine can tell."""
    given = option(args, "--max-model-len")
    if max_model_len == "auto":
        return None  # as long as fits, so any size is enough
    if max_model_len is not None:
        return max_model_len
    if given is not None:
        return int(given) if given.isdecimal() else None
    if "longrope" in str(config.get("rope_scaling")) + str(config.get("rope_parameters")):
        return None  # vLLM serves the length that it had before it was scaled
    return own_limit(config)
