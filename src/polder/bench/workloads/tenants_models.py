"""The three models of `polder bench tenants`: deep, and heavy beside their KV.

Three shapes, so that no layer of one fits another's place by chance, and 12 KiB of KV per token for each, so that the same bytes
hold as many tokens of each. A layer fills its pages to a part in a hundred. The vocabulary is small: embeddings and head stay
where they are in all arms, and are to be few beside the layers.
"""

from __future__ import annotations

from polder.bench.workloads.models import ModelRecipe
from polder.memory.page import PAGE_BYTES

__all__ = ["TENANTS", "VOCAB", "layer_bytes", "weights_bytes"]

VOCAB = 8192
_DTYPE_BYTES = {"bfloat16": 2, "float32": 4}

_SHAPE = {"layers": 12, "hidden": 768, "intermediate": 2016, "heads": 12, "vocab": VOCAB}
_WIDE = {"hidden": 1024, "intermediate": 1504, "heads": 16}
TENANTS = {
    "T1": ModelRecipe(name="tenant-llama", family="llama", seed=11, **_SHAPE),  # type: ignore[arg-type]
    "T2": ModelRecipe(name="tenant-qwen", family="qwen3", seed=12, **_SHAPE),  # type: ignore[arg-type]
    "T3": ModelRecipe(name="tenant-wide", family="llama", seed=13, **(_SHAPE | _WIDE)),  # type: ignore[arg-type]
}
"""Layers of 12, 12 and 14 MiB in bf16: 144, 144 and 168 MiB that move, and 24 to 32 MiB beside them that do not."""


def layer_bytes(recipe: ModelRecipe) -> int:
    """Bytes of the parameters of one decoder layer of a Llama or Qwen3."""
    queries, keys = recipe.heads * recipe.head_dim, recipe.kv_heads * recipe.head_dim
    attention = recipe.hidden * (2 * queries + 2 * keys)
    norms = 2 * recipe.hidden + (2 * recipe.head_dim if recipe.family == "qwen3" else 0)
    return (attention + 3 * recipe.hidden * recipe.intermediate + norms) * _DTYPE_BYTES[recipe.dtype]


def weights_bytes(recipe: ModelRecipe) -> int:
    """Bytes of the pages under all decoder layers, each layer in whole pages."""
    return recipe.layers * -(-layer_bytes(recipe) // PAGE_BYTES) * PAGE_BYTES
