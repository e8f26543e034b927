"""What a tensor occupies, and the same tensor elsewhere."""

from __future__ import annotations

import pytest
import torch

from polder.weights.tensors import extent_of, held_elsewhere, moved


@pytest.mark.parametrize(
    ("tensor", "obstacle"),
    [
        (torch.empty(0, 4), "empty"),
        (torch.empty(4, device="meta"), "meta"),
        (torch.eye(3).to_sparse(), "layout torch.sparse_coo"),
    ],
)
def test_tensors_without_bytes_of_their_own_cannot_move(tensor: torch.Tensor, obstacle: str) -> None:
    extent = extent_of("t", tensor, "cpu:0")
    assert (extent.size_bytes, extent.obstacle) == (0, obstacle)


def test_a_tensor_on_another_device_cannot_move() -> None:
    assert extent_of("t", torch.zeros(3), "cuda:0").obstacle == "on cpu"
    assert extent_of("t", torch.zeros(3), "cpu:1").obstacle == ""


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64])
def test_a_moved_tensor_has_type_shape_strides_and_values(dtype: torch.dtype) -> None:
    whole = torch.randint(0, 2, (6, 10)).to(dtype)
    for tensor in (whole, whole[1:, 2:7], whole.t(), whole[::2, 1], whole[2, 3], whole[:1].expand(4, 10)):
        extent = extent_of("t", tensor, "cpu:0")
        source = torch.empty(0, dtype=torch.int8).set_(tensor.untyped_storage())
        first = tensor.storage_offset() * tensor.element_size()
        flat = torch.zeros(1024, dtype=torch.int8)
        flat[64 : 64 + extent.size_bytes] = source[first : first + extent.size_bytes]
        there = moved(tensor, flat, 64)
        assert (there.dtype, there.shape, there.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert there.data_ptr() == flat.data_ptr() + 64
        assert torch.equal(
            there.float() if dtype is torch.float8_e4m3fn else there,
            tensor.float() if dtype is torch.float8_e4m3fn else tensor,
        )


def test_a_tensor_whose_memory_somebody_else_refers_to_is_found() -> None:
    own, viewed, shared = torch.ones(4), torch.ones(4, 4), torch.nn.Parameter(torch.ones(4), requires_grad=False)
    layers = [{"own": own, "again": own, "shared": shared}, {"viewed": viewed, "part": torch.ones(6).view(2, 3).data}]
    assert held_elsewhere(layers) == set()
    held = viewed[1:], shared.data
    assert held_elsewhere(layers) == {id(viewed), id(shared)}
    del held
    assert held_elsewhere(layers) == set()


def test_tensors_of_one_storage_that_are_all_named_are_nobody_elses() -> None:
    whole = torch.ones(4, 4)
    assert held_elsewhere([{"whole": whole, "row": whole[1]}]) == set()
    assert held_elsewhere([{"whole": whole}, {"empty": torch.empty(0), "meta": torch.empty(3, device="meta")}]) == set()
