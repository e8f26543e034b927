"""A Triton backend named "cpu" that compiles nothing: all kernels run in Triton's interpreter, on the tensors themselves."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import BaseBackend, GPUTarget
from triton.backends.driver import DriverBase

__all__ = ["InterpretedBackend", "InterpretedDriver", "mend_interpreter"]


class InterpretedBackend(BaseBackend):
    @staticmethod
    def supports_target(target: Any) -> bool:
        return bool(target.backend == "cpu")

    def hash(self) -> str:
        return "gpulike"

    def parse_options(self, options: dict[str, Any]) -> object:
        raise NotImplementedError("kernels are interpreted only: set TRITON_INTERPRET=1")

    def add_stages(self, stages: dict[str, Any], options: object, language: Any) -> None:
        raise NotImplementedError

    def load_dialects(self, context: Any) -> None:
        raise NotImplementedError

    def get_module_map(self) -> dict[str, Any]:
        return {}


class InterpretedDriver(DriverBase):
    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError

    def get_current_target(self) -> Any:
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise NotImplementedError


def mend_interpreter() -> None:
    """Makes masks booleans before the interpreter loads and stores with them.

    A mask that is shifted out of packed bits keeps the integer type of the bits. Compiled kernels accept that, the
    interpreter does not.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def as_bools(mask: Any) -> Any:
        if mask.data.dtype != np.bool_:
            mask.data = mask.data.astype(np.bool_)
        return mask

    def create_masked_load(self: Any, ptrs: Any, mask: Any, *args: Any) -> Any:
        return load(self, ptrs, as_bools(mask), *args)

    def create_masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *args: Any) -> Any:
        return store(self, ptrs, value, as_bools(mask), *args)

    InterpreterBuilder.create_masked_load = create_masked_load
    InterpreterBuilder.create_masked_store = create_masked_store
