"""Keys and values come out of vLLM's own blocks as they were written, whatever the kernel's layout and type."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from polder.engines.vllm.sparse.blocks import BlockFormat
from polder.errors import ConfigError

HEADS, D, BLOCKS = 3, 64, 12


class Impl:
    attn_type, kv_cache_dtype, scale = AttentionType.DECODER, "auto", 0.125
    do_kv_cache_update = CPUAttentionBackendImpl.do_kv_cache_update


class Rounding(Impl):
    def do_kv_cache_update(self, layer: Any, key: Any, value: Any, cache: Any, slots: Any) -> None:
        super().do_kv_cache_update(layer, key.round(decimals=-1), value, cache, slots)


def layer(dtype: torch.dtype, isa: str, block: int, impl: Any) -> Any:
    cache = torch.zeros((BLOCKS, HEADS, block, 2 * D), dtype=dtype)
    return SimpleNamespace(impl=impl, kv_cache=cache, isa=isa, _k_scale_float=1.0, _v_scale_float=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("isa", "block"), [("vec16", 16), ("vec", 32)])
def test_what_was_packed_is_read_as_it_was(dtype: torch.dtype, isa: str, block: int) -> None:
    of = BlockFormat("layer", layer(dtype, isa, block, Impl()))
    keys, values = torch.randn((2, HEADS, 4 * block, D), generator=torch.Generator().manual_seed(1)).to(dtype)
    packed = of.pack(keys, values)
    at = [7, 2, 11, 5]
    of.cache[torch.tensor(at)] = packed
    found_keys, found_values = of.plain(at)
    assert torch.equal(found_keys, keys)
    assert torch.equal(found_values, values)
    assert of.block_bytes == packed[0].numel() * packed.element_size()


def test_a_backend_that_does_not_keep_what_it_is_given_is_refused() -> None:
    with pytest.raises(ConfigError, match="how this backend writes"):
        BlockFormat("layer", layer(torch.float32, "vec16", 16, Rounding()))
