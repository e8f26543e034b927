"""CUDA graphs, emulated: capture runs everything and records what a graph would hold, replay runs only that.

vLLM's own manager captures, pads, dispatches and replays, whole decode steps (FULL) and, of compiled models, pieces
(PIECEWISE); `torch.cuda.CUDAGraph` and `torch.cuda.graph` are the ones
below. Calls of PyTorch's dispatcher are recorded with the very tensors, so a replay reads and writes the captured
addresses. As on a GPU, Python, NumPy, ctypes and threads are not recorded. Operations of the namespace `vllm` are
written in Python. Those in ATTENTION run again in a replay, with the metadata of the step: on a GPU their kernels are
in the graph and the metadata lies in buffers of fixed addresses, but the CPU backend makes its metadata anew in each
step. The others, such as `wait_prefetch` and `start_prefetch`, run in the capture only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["EmulatedGraph", "figures", "host_calls", "install"]

ATTENTION = frozenset({"unified_kv_cache_update", "unified_attention_with_output"})
figures = {"captured": 0, "replayed": 0, "ops": 0}
host_calls: set[str] = set()
"""Operations that ran in a capture and are in no graph."""


class EmulatedGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        """Function, arguments, keyword arguments, result."""

    def replay(self) -> None:
        figures["replayed"] += 1
        with torch.no_grad():
            for function, args, kwargs, recorded in self.calls:
                _write(function(*args, **kwargs), recorded)

    def reset(self) -> None:
        self.calls.clear()


def _write(found: Any, recorded: Any) -> None:
    """Puts a result where the captured kernel would have put it."""
    if isinstance(recorded, torch.Tensor):
        if recorded.numel() and found.data_ptr() != recorded.data_ptr():
            recorded.copy_(found)
    elif isinstance(recorded, (list, tuple)):
        for one, other in zip(found, recorded, strict=True):
            _write(one, other)


class _Recorder(TorchDispatchMode):
    def __init__(self, graph: EmulatedGraph) -> None:
        super().__init__()
        self._graph = graph

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = function(*args, **kwargs)
        namespace, _, name = function._schema.name.partition("::")
        if namespace == "vllm" and name not in ATTENTION:
            host_calls.add(name)
        else:
            self._graph.calls.append((function, args, kwargs, output))
            figures["ops"] += 1
        return output


@contextlib.contextmanager
def _capture(graph: EmulatedGraph, *args: Any, **kwargs: Any) -> Iterator[None]:
    """Stands in for torch.cuda.graph."""
    with _Recorder(graph):
        yield
    figures["captured"] += 1


@contextlib.contextmanager
def _graph_capture(device: Any) -> Iterator[None]:
    """Stands in for vLLM's context that captures on a stream of its own."""
    yield


def install(runner: Any) -> None:
    """Replaces CUDA graphs in this process. To be called when the model is loaded and the KV cache is not made yet."""
    import vllm.compilation.cuda_graph as piecewise
    import vllm.v1.worker.gpu.cudagraph_utils as utils
    from vllm.forward_context import set_forward_context
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionMetadataBuilder
    from vllm.v1.worker.gpu.attn_utils import build_slot_mappings_by_layer

    torch.cuda.CUDAGraph, torch.cuda.graph = EmulatedGraph, _capture  # type: ignore[misc, assignment]
    utils.graph_capture = _graph_capture
    piecewise.weak_ref_tensors = lambda tensors: tensors  # an emulated graph keeps the memory that it uses
    utils.capture_pool = piecewise.capture_pool = lambda pool, config: contextlib.nullcontext(pool)
    CPUAttentionMetadataBuilder._cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    latest: dict[str, Any] = {}
    prepare_attn, run = runner.model_state.prepare_attn, utils.ModelCudaGraphManager.run_fullgraph

    def prepare_attn_and_note(*args: Any, **kwargs: Any) -> Any:
        latest["metadata"] = prepare_attn(*args, **kwargs)
        return latest["metadata"]

    def run_fullgraph(self: Any, desc: Any) -> Any:
        slots = runner.block_tables.slot_mappings[:, : desc.num_tokens]
        by_layer = build_slot_mappings_by_layer(slots, runner.kv_cache_config)
        with set_forward_context(
            latest["metadata"], runner.vllm_config, num_tokens=desc.num_tokens, slot_mapping=by_layer
        ):
            return run(self, desc)

    runner.model_state.prepare_attn = prepare_attn_and_note
    utils.ModelCudaGraphManager.run_fullgraph = run_fullgraph
