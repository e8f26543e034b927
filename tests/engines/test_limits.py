"""KV caches of which vLLM would touch blocks without pages are refused before anything is allocated."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

from polder.engines.vllm.start.limits import check_kv_cache
from polder.errors import ConfigError


class Packed(FullAttentionSpec):  # type: ignore[misc]
    """Of a layout in which layers share a block's bytes in a way of their own."""

    @property
    def has_layer_views(self) -> bool:
        return False


def config(**changes: Any) -> Any:
    plain = {"attention_config": SimpleNamespace(hisparse_config=None), "speculative_config": None}
    return SimpleNamespace(**(plain | changes))


def cache(kind: type[FullAttentionSpec] = FullAttentionSpec) -> Any:
    spec = kind(block_size=16, num_kv_heads=1, head_size=8, dtype=torch.float32)
    return SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)])


def test_a_plain_cache_is_taken() -> None:
    check_kv_cache(config(), cache())
    check_kv_cache(config(speculative_config=SimpleNamespace(enable_adaptive_verification=False)), cache())


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({}, Packed, "no view for each layer"),
        ({"attention_config": SimpleNamespace(hisparse_config=object())}, FullAttentionSpec, "HiSparse"),
        (
            {"speculative_config": SimpleNamespace(enable_adaptive_verification=True)},
            FullAttentionSpec,
            "enable_adaptive_verification",
        ),
    ],
)
def test_what_would_touch_unmapped_blocks_is_refused_with_what_to_change(
    changes: dict[str, Any], kind: type[FullAttentionSpec], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_kv_cache(config(**changes), cache(kind))
