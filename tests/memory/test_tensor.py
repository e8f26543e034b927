"""Tensors over addresses: nothing is asked of the driver, and the owner lives as long as the last view."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
import weakref

import pytest

from polder.errors import ConfigError, EnvironmentFault
from polder.memory.tensor import live_tensors, tensor_over
from tests.memory.machines import Machine


class Owner:
    pass


def test_a_tensor_needs_no_mapped_page(cpu: Machine) -> None:
    with cpu.span(1 << 20) as span:  # 16 GiB of addresses
        tensor = tensor_over(span.address(0), span.slots * cpu.page, "cpu:0", None)
        assert tensor.data_ptr() == span.address(0)
        assert tensor.view(2, -1)[1].data_ptr() == span.address(span.slots // 2)
        import torch

        assert tensor.view(torch.bfloat16).numel() == tensor.numel() // 2
        del tensor


def test_the_owner_is_freed_with_the_last_view(cpu: Machine) -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    alive = live_tensors()
    with cpu.span(1) as span:
        tensor = tensor_over(span.address(0), cpu.page, "cpu:0", owner)
        view = tensor[4096:8192].view(2, -1)
        del owner, tensor
        gc.collect()
        assert gone() is not None
        del view
        gc.collect()
        assert gone() is None
    assert live_tensors() == alive


def test_the_last_view_may_die_in_another_thread(cpu: Machine) -> None:
    owner = Owner()
    gone = weakref.ref(owner)
    with cpu.span(1) as span:
        views = [tensor_over(span.address(0), cpu.page, "cpu:0", owner)]
        del owner
        thread = threading.Thread(target=views.clear)
        thread.start()
        thread.join()
        assert gone() is None


def test_a_process_may_end_with_tensors_alive() -> None:
    script = """
import ctypes
from polder.memory.cpu import CpuBackend
from polder.memory.span import Span
backend = CpuBackend(page_bytes=4096)
span = Span(backend, 8)
span.map([0], backend.create(1))
tensor = span.tensor()
tensor[:4096] = 3
# References that the interpreter never gives back: the tensors die with the C++ library, or not at all.
ctypes.pythonapi.Py_IncRef(ctypes.py_object(tensor[:10]))
import builtins
builtins.keep = tensor
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")


def test_unknown_devices_are_refused() -> None:
    with pytest.raises(ConfigError, match="write cpu:0 or cuda:INDEX"):
        tensor_over(0, 1, "tpu:0", None)


def test_a_torch_without_cuda_is_told_apart_from_a_bad_device() -> None:
    import torch

    if torch.backends.cuda.is_built():
        pytest.skip("this torch takes CUDA addresses")
    alive = live_tensors()
    with pytest.raises(EnvironmentFault, match="has no CUDA"):
        tensor_over(4096, 4096, "cuda:0", None)
    assert live_tensors() == alive
