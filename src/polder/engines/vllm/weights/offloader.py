"""The weights' side, in every worker process: vLLM's offloader seam over polder.weights.store.

vLLM hands the decoder layers of the model to `wrap_modules` while it builds them, and calls `post_init` when their
weights are loaded and packed. Then their parameters move to addresses that never change, over pages that come and go,
except those that a kernel may remember by address (movable.py). Buffers stay: models write to some of them, and the
host copy would bring back old values. Until the engine core has agreed with the broker on pages, private ones lie
there, so that vLLM can profile and compile as it likes.

Around each layer the store is told, by direct calls in eager mode, and by vLLM's own opaque ops (`wait_prefetch`,
`start_prefetch`) where the model is compiled: they survive torch.compile, and name the tensors whose order they keep.

A CUDA graph holds neither: what Python does around a layer happens when the graph is captured, and not when it is
replayed. vLLM calls `sync_prev_onload` before each replay, and there all layers are waited for. So with graphs an
engine has all of its layers or none. Only where all graphs are piecewise can the two ops be kept out of them: the model
is split there, too, and layers stream.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Literal

import torch
from vllm.model_executor.offloader.base import BaseOffloader

from polder.broker.client import status
from polder.emulation.factory import Emulation
from polder.engines.vllm import hooks
from polder.engines.vllm.process import here
from polder.engines.vllm.settings import EngineSettings
from polder.engines.vllm.weights import cpu_linear, host_copies, movable
from polder.errors import ConfigError
from polder.memory.backend import Backend
from polder.weights.store import Segment, WeightStore
from polder.weights.tensors import held_elsewhere

__all__ = ["WeightOffloader", "open_offloader"]

logger = logging.getLogger("polder.engine")

LEAST_MOVED = 0.1
"""A smaller part of the layers' bytes is not worth an elastic engine."""
MARKER = "polder_weights"
"""In vLLM's additional_config, all of which is part of the keys of its compile caches: a graph that was compiled
without the calls around the layers, or with them, must not be loaded into an engine of the other kind."""
LAYER_OPS = ("vllm::wait_prefetch", "vllm::start_prefetch")
"""As vLLM's `splitting_ops` names them."""
GPU_COPY_SHARE = 0.016
"""B/H of an H100 by PCIe 5.0 (55 GB/s, 3.35 TB/s), and of an H200 about the same."""


class WeightOffloader(BaseOffloader):  # type: ignore[misc]
    """One a process, made where vLLM makes its own."""

    def __init__(
        self,
        device: str,
        page_bytes: int,
        open_store: Callable[[Backend, Sequence[Mapping[str, torch.Tensor]], Mapping[int, str]], WeightStore],
        *,
        compiled: bool,
        graphs: bool = False,
        links: str = "",
    ) -> None:
        """`compiled`: the layers run under torch.compile. `graphs`: CUDA graphs may hold whole layers: none can be
        streamed then. `page_bytes`: the broker's. `links`: POLDER_LINKS."""
        here.offloader = self
        self._open_store, self._compiled, self.streams = open_store, compiled, not graphs
        self._modules: list[torch.nn.Module] = []
        self._parts: dict[int, int] = {}
        """id(module) -> bytes of its own parameters as they were made, before any packing."""
        self.resident_bytes = 0
        """Bytes of the decoder layers' tensors that stay where they are, libraries' packed copies of them included."""
        self.wake: Literal["streamed", "whole"] = "streamed"
        """Whether computing begins before all layers are back."""
        self._private: list[Segment] = []
        self.given: dict[Segment, tuple[int, tuple[int, ...]]] = {}
        """Segments of the broker: its generation and its page numbers."""
        self.store: WeightStore | None = None
        self.backend: Backend = here.backend(device, page_bytes)
        self.copy_share = cpu_linear.copy_share() if device.startswith("cpu") else GPU_COPY_SHARE
        paced = Emulation(links=links, faults="").weights_backend(self.backend)
        if paced is not self.backend:
            self.backend, self.copy_share = paced, GPU_COPY_SHARE

    # ------------------------------------------------------------------ vLLM calls

    def wrap_modules(
        self, modules_generator: Generator[torch.nn.Module, None, None], prefix: str = ""
    ) -> list[torch.nn.Module]:
        modules = list(modules_generator)
        if self._modules or prefix:
            return modules  # a draft model's, or a tower's: they stay where they are
        self._modules = modules
        for index, module in enumerate(modules):
            self._parts |= {id(part): _own_bytes(part) for part in module.modules()}
            self._hook(index, module)
        return modules

    def belongs(self, part: Any) -> bool:
        """Whether a module is part of a layer that moves."""
        return id(part) in self._parts

    def post_init(self) -> None:
        if self.store is not None or not self._modules:
            return
        layers = [dict(module.named_parameters()) for module in self._modules]
        self.store = self._open_store(self.backend, layers, self._obstacles(layers))
        self._count_resident()
        # The host copy has everything. The old memory goes before the new comes, so that weights never lie on the device twice.
        for named, moved in zip(layers, self.store.tensors, strict=True):
            for name, tensor in moved.items():
                named[name].data = tensor
        if self.backend.device.startswith("cuda"):
            torch.cuda.empty_cache()
        size = self.store.layout.layer_pages
        pages = self.backend.create(len(layers) * size)
        self._private = [tuple(pages[i : i + size]) for i in range(0, len(pages), size)]
        self.store.give(self._private)
        self.store.wait_all()

    def sync_prev_onload(self) -> None:
        """vLLM calls this before it captures or replays a CUDA graph. Layers that stream are waited for one by one."""
        if self.store is not None and not self.streams:
            self.store.wait_all_present()

    def _wait_for_layer(self, layer_idx: int) -> None:
        assert self.store is not None
        self.store.before(layer_idx)

    def _start_prefetch(self, layer_idx: int) -> None:
        assert self.store is not None
        self.store.after(layer_idx)

    # ------------------------------------------------------------------ inside

    def _obstacles(self, layers: Sequence[Mapping[str, torch.Tensor]]) -> dict[int, str]:
        """By id(tensor): why a parameter stays where it is."""
        found = dict.fromkeys(held_elsewhere(layers), "another tensor shares its memory")
        for module in self._modules:
            found |= movable.obstacles(module)
        return found

    def _count_resident(self) -> None:
        """Raises ConfigError when hardly anything can move."""
        assert self.store is not None
        parts = [part for module in self._modules for part in module.modules()]
        packed = [max(0, self._parts.get(id(part), 0) - _own_bytes(part)) for part in parts if movable.obstacle(part)]
        self.resident_bytes = self.store.layout.resident_bytes + sum(packed)
        moved = sum(self.store.layout.used_bytes)
        share = moved / (moved + self.resident_bytes)
        reasons = sorted(set(self.store.layout.resident.values()) - {"empty"})
        logger.info(
            "%.1f %% of the decoder layers' weights can move; others: %s", 100 * share, "; ".join(reasons) or "none"
        )
        if share < LEAST_MOVED:
            raise ConfigError(
                f"elastic weights: only {share:.1%} of this model's decoder layers could move ({'; '.join(reasons)}). "
                f'Serve it with resident weights: remove POLDER_WEIGHTS, or weights = "elastic" from the fleet file'
            )

    def end_private(self) -> None:
        """Sleeps, and frees the pages of the start."""
        if self.store is not None and self._private:
            self.store.rotate(None)
            self.backend.destroy([page for segment in self._private for page in segment])
            self._private = []

    def _hook(self, index: int, module: torch.nn.Module) -> None:
        hooks.put(module, "forward", self._around(index, module.forward))

    def _around(self, index: int, original: Callable[..., Any]) -> Callable[..., Any]:
        """A layer's forward, which waits for the layer's weights first."""
        place = list(inspect.signature(original).parameters).index("hidden_states")

        def compiled_forward(*args: Any, **kwargs: Any) -> Any:
            hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[place]
            torch.ops.vllm.wait_prefetch(hidden, index)
            output = original(*args, **kwargs)
            torch.ops.vllm.start_prefetch(output[0] if isinstance(output, tuple) else output, index)
            return output

        def eager_forward(*args: Any, **kwargs: Any) -> Any:
            if self.store is None:
                return original(*args, **kwargs)
            self.store.before(index)
            output = original(*args, **kwargs)
            self.store.after(index)
            return output

        if self._compiled:
            import vllm.model_executor.offloader.prefetch_ops  # noqa: F401  registers the two ops
        return compiled_forward if self._compiled else eager_forward


def _own_bytes(part: torch.nn.Module) -> int:
    """Bytes of the parameters that the module itself owns."""
    return sum(parameter.nbytes for parameter in part.parameters(recurse=False))


def open_offloader(vllm_config: Any, settings: EngineSettings) -> WeightOffloader:
    """The offloader of an engine with elastic weights. Raises ConfigError for what they do not work with.

    Marks the configuration: see MARKER.
    """
    from vllm.config import CompilationMode
    from vllm.config.compilation import CUDAGraphMode
    from vllm.platforms import current_platform

    offload = vllm_config.offload_config
    if offload.prefetch.offload_group_size > 0 or offload.uva.cpu_offload_gb > 0:
        raise ConfigError(
            "elastic weights take the place of vLLM's weight offloading: remove its options, or POLDER_WEIGHTS"
        )
    if vllm_config.parallel_config.enable_eplb:
        raise ConfigError(
            "elastic weights: --enable-eplb moves experts while the engine serves, and the host copy would bring the old "
            "ones back. Remove that option, or POLDER_WEIGHTS"
        )
    mark(vllm_config)
    cuda = current_platform.is_cuda()
    device = f"cuda:{torch.cuda.current_device()}" if cuda else "cpu:0"
    page_bytes = settings.page_bytes if settings.broker is None else status(settings.broker).devices[0].page_bytes
    compilation = vllm_config.compilation_config
    compiled = compilation.mode != CompilationMode.NONE
    graphs = compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE) and not split_at_layers(compilation)
    key = host_copies.copy_key(vllm_config, vllm_config.parallel_config.rank)
    store = functools.partial(host_copies.open_store, broker=settings.broker, key=key)
    offloader = WeightOffloader(device, page_bytes, store, compiled=compiled, graphs=graphs, links=settings.links)
    offloader.wake = settings.wake
    if not cuda:
        cpu_linear.install(offloader.belongs)
    return offloader


def split_at_layers(compilation: Any) -> bool:
    """Whether no CUDA graph of this model holds the ops around a layer. Has vLLM split the model there if all graphs
    are piecewise.

    To be called before the model is compiled.
    """
    from vllm.config.compilation import CUDAGraphMode

    splits = compilation.is_attention_compiled_piecewise() and not compilation.use_inductor_graph_partition
    if compilation.cudagraph_mode != CUDAGraphMode.PIECEWISE or not splits:
        return False
    compilation.splitting_ops = [*dict.fromkeys([*compilation.splitting_ops, *LAYER_OPS])]
    return True


def mark(vllm_config: Any) -> None:
    """Makes the keys of vLLM's compile caches different from those of an engine whose weights stay. Raises
    ConfigError."""
    given = vllm_config.additional_config
    if not isinstance(given, dict):
        raise ConfigError("elastic weights need --additional-config to be a JSON object")
    vllm_config.additional_config = {**given, MARKER: "elastic"}
