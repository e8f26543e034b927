"""CPU only: linear weights in oneDNN's packed form, in memory that we name.

oneDNN multiplies by weights that it has reordered into blocks. vLLM lets it do so in a buffer of its own; torch does
the same, with the same library, and its C interface for compiled models (`aoti_torch_create_tensor_from_blob_v2`, made
for weights in a mapped file) puts a packed tensor over any address, given the description of its blocks. So the packed
bytes are an ordinary tensor, which can be moved, dropped and filled again, and a linear layer gives bit by bit what
stock vLLM's gives, at its speed.

What torch's libraries cannot pack here (float16 on CPUs without it, a torch without these functions) raises
PackingUnsupported, and so does a packed tensor that does not give what the weight gives: each is tried once when it is
made.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch

from polder.engines.vllm.process import here
from polder.errors import EnvironmentFault

__all__ = ["PackedLinear", "PackingUnsupported", "pack"]

_MKLDNN_LAYOUT = 3  # c10::Layout::Mkldnn


class PackingUnsupported(EnvironmentFault):
    """These weights cannot be packed on this machine."""


class PackedLinear:
    """Multiplies by a packed weight, wherever its bytes lie."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, description: bytes) -> None:
        """`shape` (rows, columns), as torch.nn.Linear has it. `description`: oneDNN's, of the blocks."""
        self._shape, self._dtype, self._description = shape, dtype, description
        self._address = 0
        self._view: torch.Tensor | None = None
        self.number = len(here.packed)
        here.packed.append(self)

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x (..., columns) -> (..., rows). `weight`: the packed bytes, as `pack` returned them or a copy elsewhere."""
        if torch.compiler.is_compiling():
            return torch.ops.polder.onednn_linear(x, weight, bias, self.number)
        return self.multiply(x, weight, bias)

    def multiply(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """The same, not to be traced."""
        address = weight.data_ptr()
        if address != self._address:
            self._view = _packed_at(address, self._shape, self._dtype, self._description)
            self._address = address
        return torch.ops.mkldnn._linear_pointwise(x, self._view, bias, "none", [], "")

    @property
    def rows(self) -> int:
        return self._shape[0]


def pack(weight: torch.Tensor) -> tuple[torch.Tensor, PackedLinear]:
    """The packed bytes of `weight` (rows, columns) as a flat tensor of its dtype, and what multiplies by them.

    The bytes may be a few more than the weight's: blocks are whole. Raises PackingUnsupported.
    """
    rows, columns = weight.shape
    try:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous(), None)
        size = torch.ops.mkldnn._nbytes(packed)
        description = bytes(torch.ops.mkldnn._get_mkldnn_serialized_md(packed).numpy().tobytes())
        flat = torch.empty(-(-size // weight.element_size()), dtype=weight.dtype)
        ctypes.memmove(flat.data_ptr(), torch.ops.mkldnn.data_ptr(packed), size)
        linear = PackedLinear((rows, columns), weight.dtype, description)
        _interface()
        probe = torch.linspace(-1, 1, columns).to(weight.dtype)[None]
        expected = torch.ops.mkldnn._linear_pointwise(probe, packed, None, "none", [], "")
        if not torch.equal(linear.multiply(probe, flat, None), expected):
            raise PackingUnsupported("a packed weight at another address gives other results")
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise PackingUnsupported(
            f"oneDNN cannot pack a weight of {rows} x {columns}, {weight.dtype}: {error}"
        ) from error
    return flat, linear


@functools.cache
def _interface() -> tuple[ctypes.CDLL, dict[torch.dtype, int]]:
    """torch's library, and its numbers of dtypes. Raises AttributeError where a function is missing."""
    library = ctypes.CDLL(str(Path(torch.__path__[0]) / "lib" / "libtorch_cpu.so"))
    integer, address = ctypes.c_int64, ctypes.c_void_p
    library.aoti_torch_create_tensor_from_blob_v2.argtypes = [
        *(address, integer, address, address, integer),  # data, dimensions, sizes, strides, offset
        *(ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),  # dtype, kind and index of the device
        *(address, ctypes.c_int32, ctypes.c_char_p, integer),  # result, layout, description and its length
    ]
    ctypes.pythonapi.PyCapsule_New.restype = ctypes.py_object
    ctypes.pythonapi.PyCapsule_New.argtypes = [address, ctypes.c_char_p, address]
    dtypes = {
        torch.bfloat16: library.aoti_torch_dtype_bfloat16(),
        torch.float16: library.aoti_torch_dtype_float16(),
        torch.float32: library.aoti_torch_dtype_float32(),
    }
    return library, dtypes


def _packed_at(address: int, shape: tuple[int, int], dtype: torch.dtype, description: bytes) -> torch.Tensor:
    """A packed tensor over the bytes at `address`, which it neither owns nor copies."""
    library, dtypes = _interface()
    result = ctypes.c_void_p()
    failed = library.aoti_torch_create_tensor_from_blob_v2(
        address,
        2,
        (ctypes.c_int64 * 2)(*shape),
        (ctypes.c_int64 * 2)(shape[1], 1),
        0,
        dtypes[dtype],
        library.aoti_torch_device_type_cpu(),
        0,
        ctypes.byref(result),
        _MKLDNN_LAYOUT,
        description,
        len(description),
    )
    if failed:
        raise PackingUnsupported("torch makes no packed tensor over memory of ours")
    capsule = ctypes.pythonapi.PyCapsule_New(result.value, None, None)
    tensor: torch.Tensor = torch._C._aoti.alloc_tensor_by_stealing_from_void_ptr(capsule)
    return tensor


def _onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, number: int) -> torch.Tensor:
    return here.packed[number].multiply(x, weight, bias)


def _shape_of_result(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, number: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], here.packed[number].rows))


_library = torch.library.Library("polder", "FRAGMENT")
_library.define("onednn_linear(Tensor x, Tensor weight, Tensor? bias, int number) -> Tensor")
_library.impl("onednn_linear", _onednn_linear, "CPU")
_library.impl("onednn_linear", _shape_of_result, "Meta")
