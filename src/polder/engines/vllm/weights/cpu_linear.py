"""CPU only: linear weights of decoder layers as ordinary tensors, which can move.

vLLM 0.32 packs a linear layer's weight for oneDNN into a buffer of the library's own, empties the parameter and keeps a
handle (layers/utils.py:470, no switch). What lies in a buffer that nobody can name cannot be given away or streamed. So
for decoder layers of an engine with elastic weights the packed form is a tensor again and stays the layer's parameter:

    small, on CPUs with AMX                 sgl-kernel's packed layout, which stock takes there too
    all other                               oneDNN's packed layout (onednn.py): bit for bit and as fast as stock
    16 bits, where that cannot be packed    sgl-kernel's layout: decoding 7 % faster, prefill 10 to 15 % slower here
    float32, where that cannot be packed    the weight as it is: 2 to 3 times slower here

The last two add up in another order than stock, so logits differ in their last bits, as they do between two batch
shapes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from polder.engines.vllm import hooks
from polder.engines.vllm.weights import onednn
from polder.memory.cores import usable_cores

__all__ = ["copy_share", "install"]

logger = logging.getLogger("polder.engine")

_ROWS, _COLUMNS = 16, 32  # what sgl-kernel's tiles need of a weight's shape


def install(belongs: Callable[[Any], bool]) -> None:
    """Replaces vLLM's dispatch for layers that `belongs` says yes to. Once a process."""
    import vllm.model_executor.layers.utils as utils

    def dispatch(stock: Callable[[Any, bool], None], layer: Any, remove_weight: bool) -> None:
        if belongs(layer) and layer.weight.ndim == 2 and not layer.weight.is_meta:
            _keep_as_tensor(layer, utils.check_cpu_sgl_kernel)
        else:
            stock(layer, remove_weight)

    hooks.replace(utils, "dispatch_cpu_unquantized_gemm", dispatch)


def copy_share() -> float:
    """What a copying thread takes from computing, as a share of its time: one of the cores.

    Also where a core does not compute: engine core and front end are on it, which a step waits for as well. With one of
    two cores left for them, streaming that the formula had called hidden made steps 25 % longer (docs/log.md).
    """
    return 1.0 / len(usable_cores())


def _keep_as_tensor(layer: Any, stock_takes_sgl: Callable[[int, int, Any], bool]) -> None:
    import torch

    rows, columns = layer.weight.shape
    sgl_fits = (
        layer.weight.dtype in (torch.bfloat16, torch.float16)
        and hasattr(torch.ops._C, "convert_weight_packed")
        and not (rows % _ROWS or columns % _COLUMNS)
    )
    if sgl_fits and stock_takes_sgl(rows, columns, layer.weight.dtype):
        _pack_sgl(layer)
        return
    try:
        packed, linear = onednn.pack(layer.weight)
    except onednn.PackingUnsupported as error:
        logger.info("%s: slower kernels for layers of this kind", error)
        if sgl_fits:
            _pack_sgl(layer)
        else:
            layer.cpu_linear = torch.nn.functional.linear
    else:
        layer.weight = torch.nn.Parameter(packed, requires_grad=False)
        layer.cpu_linear = linear


def _pack_sgl(layer: Any) -> None:
    import torch
    from vllm import _custom_ops as ops

    rows = layer.weight.shape[0]
    layer.weight = torch.nn.Parameter(torch.ops._C.convert_weight_packed(layer.weight), requires_grad=False)
    if getattr(layer, "bias", None) is not None:
        layer.bias.data = layer.bias.to(torch.float32)
    layer.cpu_linear = lambda x, weight, bias: ops.weight_packed_linear_cpu(x, weight, rows, bias)
