"""Between torch's tensors and addresses: what a tensor occupies, and the same tensor at another place."""

from __future__ import annotations

import torch

from polder.weights.layout import Extent

__all__ = ["extent_of", "moved"]


def extent_of(name: str, tensor: torch.Tensor, device: str) -> Extent:
    """The bytes of a parameter or buffer, with the obstacle that keeps it from moving within `device` ("cpu:0", "cuda:1")."""
    obstacle = ""
    if tensor.layout is not torch.strided:
        obstacle = f"layout {tensor.layout}"
    elif tensor.is_meta:
        obstacle = "meta"
    elif tensor.numel() == 0:
        obstacle = "empty"
    if obstacle:
        return Extent(name=name, address=0, size_bytes=0, obstacle=obstacle)
    kind, _, index = device.partition(":")
    # To torch all host memory is one device, whatever number the broker gives it.
    if tensor.device.type != kind or (kind != "cpu" and tensor.device.index != int(index)):
        obstacle = f"on {tensor.device}"
    return Extent(name=name, address=tensor.data_ptr(), size_bytes=_size_bytes(tensor), obstacle=obstacle)


def moved(tensor: torch.Tensor, flat: torch.Tensor, offset: int) -> torch.Tensor:
    """The tensor's type, shape and strides over the bytes of `flat` (int8) that begin at `offset`. Touches no byte."""
    here = flat[offset : offset + _size_bytes(tensor)]
    return here.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _size_bytes(tensor: torch.Tensor) -> int:
    """From the first element to the end of the last, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())
