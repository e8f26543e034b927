"""A packed weight gives stock vLLM's results, bit by bit, wherever its bytes lie."""

from __future__ import annotations

import pytest
import torch

from polder.engines.vllm.weights import onednn
from polder.engines.vllm.weights.onednn import PackedLinear, PackingUnsupported, pack

SHAPES = [(48, 64), (96, 40), (30, 33), (16, 7)]
BFLOAT16 = pytest.param(
    torch.bfloat16,
    marks=pytest.mark.skipif(
        not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        reason="this CPU has no AVX-512, which oneDNN needs for bfloat16",
    ),
)
DTYPES = [BFLOAT16, torch.float32]


def packed(
    shape: tuple[int, int], dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, PackedLinear]:
    torch.manual_seed(seed)
    weight = (torch.randn(shape) / 8).to(dtype)
    return weight, *pack(weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 3, 70])
def test_results_are_those_of_vllms_own_packed_linear(shape: tuple[int, int], dtype: torch.dtype, tokens: int) -> None:
    ops = pytest.importorskip("vllm._custom_ops")
    weight, flat, linear = packed(shape, dtype)
    stock = ops.create_onednn_mm(weight.t(), 32)
    x, bias = torch.randn(tokens, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype)
    for b in (None, bias):
        assert torch.equal(linear(x, flat, b), ops.onednn_mm(stock, x, b))
    strided = torch.randn(tokens, 2 * shape[1]).to(dtype)[:, : shape[1]]
    assert torch.equal(linear(strided, flat, None), linear(strided.contiguous(), flat, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_may_move_be_dropped_and_come_back(dtype: torch.dtype) -> None:
    _, flat, linear = packed((48, 64), dtype)
    x = torch.randn(5, 64).to(dtype)
    expected = linear(x, flat, None)
    elsewhere = flat.clone()
    flat.zero_()
    assert torch.equal(linear(x, elsewhere, None), expected)
    assert not linear(x, flat, None).any()
    flat.copy_(elsewhere)
    assert torch.equal(linear(x, flat, None), expected)


def test_two_layers_of_a_shape_are_not_confused() -> None:
    (_, first, one), (_, second, two) = (packed((48, 64), torch.float32, seed) for seed in (1, 2))
    x = torch.randn(2, 64)
    assert not torch.equal(one(x, first, None), two(x, second, None))


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_code_gives_the_same_and_follows_the_bytes(dtype: torch.dtype) -> None:
    _, flat, linear = packed((48, 64), dtype)
    x = torch.randn(3, 64).to(dtype)

    @torch.compile(backend="eager", fullgraph=True)
    def forward(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight, None) * 2

    assert torch.equal(forward(x, flat), linear(x, flat, None) * 2)
    flat.zero_()
    assert not forward(x, flat).any()


def test_what_cannot_be_packed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PackingUnsupported, match=r"4 x 8.*float64"):
        pack(torch.ones(4, 8, dtype=torch.float64))

    def wrong(*_: object) -> torch.Tensor:
        return torch.zeros(16, 32).to_mkldnn()

    monkeypatch.setattr(onednn, "_packed_at", wrong)
    with pytest.raises(PackingUnsupported, match="other results"):
        pack(torch.ones(16, 32))
