"""Between torch's tensors and addresses: what a tensor occupies, and the same tensor at another place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import torch

from polder.weights.layout import Extent

__all__ = ["extent_of", "held_elsewhere", "moved"]


def extent_of(name: str, tensor: torch.Tensor, device: str, obstacle: str = "") -> Extent:
    """The bytes of a parameter or buffer, with the obstacle that keeps it from moving within `device` ("cpu:0",
    "cuda:1").

    `obstacle`: one that the caller knows of. It matters only for a tensor that has bytes.
    """
    absent = ""
    if tensor.layout is not torch.strided:
        absent = f"layout {tensor.layout}"
    elif tensor.is_meta:
        absent = "meta"
    elif tensor.numel() == 0:
        absent = "empty"
    if absent:
        return Extent(name=name, address=0, size_bytes=0, obstacle=absent)
    kind, _, index = device.partition(":")
    # To torch all host memory is one device, whatever number the broker gives it.
    if tensor.device.type != kind or (kind != "cpu" and tensor.device.index != int(index)):
        obstacle = f"on {tensor.device}"
    return Extent(name=name, address=tensor.data_ptr(), size_bytes=_size_bytes(tensor), obstacle=obstacle)


def held_elsewhere(layers: Sequence[Mapping[str, torch.Tensor]]) -> set[int]:
    """id() of each tensor whose storage one that `layers` does not name refers to, too: a view, an alias, a library's
    handle.

    Such a holder would keep the old bytes, and their memory, when the tensor moves.
    """
    named = {id(tensor): tensor for layer in layers for tensor in layer.values() if tensor.layout is torch.strided}
    storages = {key: tensor.untyped_storage()._cdata for key, tensor in named.items() if not tensor.is_meta}
    known = Counter(storages.values())
    wrapper = 1  # the Python object that `untyped_storage` has made holds its storage, too
    return {key for key, storage in storages.items() if torch._C._storage_Use_Count(storage) > known[storage] + wrapper}


def moved(tensor: torch.Tensor, flat: torch.Tensor, offset: int) -> torch.Tensor:
    """The tensor's type, shape and strides over the bytes of `flat` (int8) that begin at `offset`. Touches no byte."""
    here = flat[offset : offset + _size_bytes(tensor)]
    return here.view(tensor.dtype).as_strided(tensor.shape, tensor.stride())


def _size_bytes(tensor: torch.Tensor) -> int:
    """From the first element to the end of the last, gaps included."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return int((last + 1) * tensor.element_size())
