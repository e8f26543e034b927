"""Which tensors may move: nothing that a kernel may remember by address."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")
import torch
import vllm

from polder.engines.vllm.weights import movable


def named(name: str, module: str = "vllm.model_executor.kernels.linear.x", **attributes: Any) -> Any:
    """An instance of a class of this name."""
    made = type(name, (), {"__module__": module})()
    vars(made).update(attributes)
    return made


def layer(method: Any = None, scheme: Any = None) -> Any:
    part = torch.nn.Linear(4, 4)
    part.quant_method, part.scheme = method, scheme
    return part


def test_norms_and_unquantised_layers_move() -> None:
    assert not movable.obstacle(torch.nn.LayerNorm(4))
    assert not movable.obstacle(layer(named("UnquantizedLinearMethod")))


def test_a_quantised_layer_moves_only_with_a_kernel_that_was_read() -> None:
    method = named("CompressedTensorsLinearMethod")
    assert not movable.obstacle(layer(method, named("S", kernel=named("MarlinLinearKernel"))))
    assert not movable.obstacle(layer(named("Fp8LinearMethod", fp8_linear=named("CutlassFP8ScaledMMLinearKernel"))))
    cpu = named("S", kernel=named("CPUInt8ScaledMMLinearKernel", dnnl_handler=object()))
    assert "CPUInt8ScaledMMLinearKernel" in movable.obstacle(layer(method, cpu))
    assert "no known kernel" in movable.obstacle(layer(method, named("S")))
    assert "TorchAOLinearMethod" in movable.obstacle(layer(named("TorchAOLinearMethod")))


def test_experts_move_by_the_class_that_computes_them() -> None:
    def method(experts: str) -> Any:
        return named("Fp8MoEMethod", moe_kernel=SimpleNamespace(fused_experts=named(experts)))

    assert not movable.obstacle(layer(method("TritonExperts")))
    assert "SomeExperts" in movable.obstacle(layer(method("SomeExperts")))


def test_obstacles_are_those_of_the_module_that_owns_the_tensor() -> None:
    block = torch.nn.Sequential(torch.nn.LayerNorm(4), layer(named("TorchAOLinearMethod")))
    assert set(movable.obstacles(block)) == {id(block[1].weight), id(block[1].bias)}


def test_every_name_in_the_allow_list_is_a_class_of_this_vllm() -> None:
    """One that was renamed would keep its layers on the device without a word."""
    root = Path(vllm.__file__).parent / "model_executor"
    text = "\n".join(path.read_text() for path in root.rglob("*.py"))
    classes = set(re.findall(r"^class (\w+)", text, re.MULTILINE))
    assert classes >= movable.UNQUANTISED | movable.BY_KERNEL | movable.KERNELS


def test_only_known_code_of_vllm_makes_handles_that_keep_addresses() -> None:
    """A new call of a library that packs weights behind a handle has to be looked at: see the essay of movable.py."""
    root = Path(vllm.__file__).parent / "model_executor"
    makers = re.compile(r"ops\.create_onednn_\w+|_C\.create_\w+_handler")
    found = {path.name for path in root.rglob("*.py") if makers.search(path.read_text())}
    assert found == {"cpu.py", "utils.py"}
