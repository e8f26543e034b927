"""Which tensors of a decoder layer may move: those that no kernel remembers by address.

Weights move once, after vLLM has loaded and packed them; from then on their addresses are fixed. So what counts is what
the code that prepares weights for a kernel (`process_weights_after_loading`) keeps:

    the parameter itself          follows: its data are replaced in place
    another tensor or view of it  keeps the old bytes alive; found by the storage's reference count (weights/tensors.py)
    a bare address                cannot be seen from here. vLLM's oneDNN handlers keep one: once the parameter has
                                  moved, they would read the scales that they were given from freed memory

For the third case this module has an allow-list: methods and kernels of vLLM 0.32 whose preparation was read and keeps
no address. Tensors of any other quantised layer stay where they are. Modules without a quantisation method (norms,
state space parameters) hand their parameters to kernels by name in each call, and move.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

__all__ = ["obstacle", "obstacles"]

UNQUANTISED = frozenset({"UnquantizedLinearMethod", "_GateLinearMethod", "UnquantizedEmbeddingMethod"})
"""Methods whose tensors are passed to a stateless function in each call. On the CPU, cpu_linear.py sees to it."""

BY_KERNEL = frozenset(
    {
        *("Fp8LinearMethod", "CompressedTensorsLinearMethod", "AutoGPTQLinearMethod", "AutoAWQMarlinLinearMethod"),
        *("UnquantizedFusedMoEMethod", "Fp8MoEMethod", "CompressedTensorsW8A8Fp8MoEMethod"),
        *("Fp8PerTensorOnlineLinearMethod", "Fp8PerBlockOnlineLinearMethod", "Fp8PtpcOnlineLinearMethod"),
    }
)
"""Methods that leave everything to a kernel object: movable if its class is in KERNELS."""

KERNELS = frozenset(
    {
        # fp8 and int8 with scales
        *("CutlassFP8ScaledMMLinearKernel", "CutlassFp8BlockScaledMMKernel", "CutlassInt8ScaledMMLinearKernel"),
        *("FlashInferFP8ScaledMMLinearKernel", "FlashInferFp8BlockScaledMMKernel"),
        *("FlashInferFp8DeepGEMMDynamicBlockScaledKernel", "DeepGemmFp8BlockScaledMMKernel"),
        *("TritonFp8BlockScaledMMKernel", "TritonInt8ScaledMMLinearKernel", "MarlinFP8ScaledMMLinearKernel"),
        *("PerTensorTorchFP8ScaledMMLinearKernel", "ChannelWiseTorchFP8ScaledMMLinearKernel"),
        # 4 and 8 bits with groups
        *("MarlinLinearKernel", "MacheteLinearKernel", "CutlassW4A8LinearKernel", "CPUWNA16LinearKernel"),
        # experts
        *("CPUUnquantizedExperts", "X86CPUUnquantizedExperts", "ArmCPUUnquantizedExperts", "TritonExperts"),
        *("BatchedTritonExperts", "DeepGemmExperts", "TritonOrDeepGemmExperts"),
    }
)


def obstacles(module: Any) -> dict[int, str]:
    """For a layer, by id(tensor): why tensors that a module in it owns stay where they are."""
    found: dict[int, str] = {}
    for part in module.modules():
        why = obstacle(part)
        if why:
            found |= dict.fromkeys(map(id, (*part.parameters(recurse=False), *part.buffers(recurse=False))), why)
    return found


def obstacle(part: Any) -> str:
    """Why the tensors that this module itself owns stay where they are. Empty: they may move."""
    method = getattr(part, "quant_method", None)
    name = type(method).__name__
    if method is None or name in UNQUANTISED:
        return ""
    if name not in BY_KERNEL:
        return f"{name} may keep their addresses"
    kernels = [type(kernel).__name__ for kernel in _kernels(method, getattr(part, "scheme", None))]
    unknown = sorted(set(kernels) - KERNELS)
    return f"{unknown[0]} may keep their addresses" if unknown else "" if kernels else f"{name} has no known kernel"


def _kernels(method: Any, scheme: Any) -> Iterator[Any]:
    """The objects that multiply: of a linear layer's method or scheme, or a fused experts' implementation."""
    for owner in (method, scheme):
        for value in vars(owner).values() if owner is not None else ():
            if type(value).__module__.startswith("vllm.model_executor.kernels.linear"):
                yield value
    experts = getattr(getattr(method, "moe_kernel", None), "fused_experts", None)
    if experts is not None:
        yield experts
