"""vLLM's offloader seam over a store, without an engine: the start, graphs, what stays, and the marks that keep caches apart."""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
import torch
import vllm

from polder.engines.vllm.process import here
from polder.engines.vllm.weights import calls, offloader
from polder.engines.vllm.weights.offloader import WeightOffloader
from polder.errors import ConfigError, IntegrityError
from polder.memory import _libc
from polder.memory.backend import Backend
from polder.memory.page import Handle
from polder.weights.store import WeightStore

PAGE = 4096
LAYERS = 4


class Layer(torch.nn.Module):
    """y = x + W x, with a buffer."""

    def __init__(self, number: int, memory: list[weakref.ref[Any]]) -> None:
        super().__init__()
        array = np.random.default_rng(number).standard_normal((64, 64)).astype(np.float32)
        memory.append(weakref.ref(array))  # torch refers to it as long as a tensor lies there
        self.weight = torch.nn.Parameter(torch.from_numpy(array), requires_grad=False)
        self.register_buffer("scale", torch.ones(16))

    def forward(self, hidden_states: Any) -> Any:
        return hidden_states + hidden_states @ self.weight


class Model:
    """Layers that vLLM would have made, loaded and handed over."""

    def __init__(self, make: Callable[..., WeightOffloader], **options: bool) -> None:
        self.memory: list[weakref.ref[Any]] = []
        self.offloader = make(**{"compiled": False, **options})
        self.layers = self.offloader.wrap_modules(Layer(number, self.memory) for number in range(LAYERS))
        self.input = torch.ones(1, 64)
        self.right = self.forward()

    @property
    def store(self) -> WeightStore:
        assert self.offloader.store is not None
        return self.offloader.store

    def forward(self) -> Any:
        hidden = self.input
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def replay(self) -> Any:
        """What is left of `forward` in a CUDA graph: the kernels."""
        hidden = self.input
        for layer in self.layers:
            hidden = hidden + hidden @ layer.weight
        return hidden


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WeightOffloader]]:
    monkeypatch.setattr(here, "offloader", None)
    made: list[WeightOffloader] = []

    def open_store(backend: Backend, layers: Sequence[Mapping[str, Any]], obstacles: Mapping[int, str]) -> WeightStore:
        return WeightStore(backend, layers, obstacles=obstacles)

    def one(**options: Any) -> WeightOffloader:
        made.append(WeightOffloader("cpu:0", PAGE, open_store, **options))
        return made[-1]

    yield one
    for each in made:
        each.end_private()
        if each.store is not None:
            each.store.close()


@contextlib.contextmanager
def copies_that_stand_still(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Copies wait for the event, which is set at the end."""
    released, real = threading.Event(), _libc.copy_bytes
    with monkeypatch.context() as patch:
        patch.setattr(_libc, "copy_bytes", lambda *a: (released.wait(30), real(*a)))
        try:
            yield released
        finally:
            released.set()


def test_weights_never_lie_on_the_device_twice_at_the_start(
    make: Callable[..., WeightOffloader], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(make)
    alive: list[int] = []
    create = model.offloader.backend.create

    def counted(count: int) -> list[Handle]:
        alive.append(sum(ref() is not None for ref in model.memory))
        return create(count)

    monkeypatch.setattr(model.offloader.backend, "create", counted)
    assert sum(ref() is not None for ref in model.memory) == LAYERS
    model.offloader.post_init()
    assert alive == [0], "new pages were made while old weights were there"
    assert torch.equal(model.forward(), model.right)


def test_buffers_and_what_others_refer_to_stay(make: Callable[..., WeightOffloader]) -> None:
    model = Model(make)
    view = model.layers[1].weight[:2]
    model.offloader.post_init()
    assert [sorted(tensors) for tensors in model.store.tensors] == [["weight"], [], ["weight"], ["weight"]]
    assert model.offloader.resident_bytes == model.layers[1].weight.nbytes
    assert torch.equal(view, model.layers[1].weight[:2])
    model.layers[0].scale.fill_(2)
    private = model.offloader._private
    model.store.rotate(None)
    model.store.give(private)
    assert torch.equal(model.forward(), model.right)
    assert model.layers[0].scale[0] == 2, "what a model writes at run time is not brought back from a copy"


def test_a_model_of_which_hardly_anything_can_move_is_refused(make: Callable[..., WeightOffloader]) -> None:
    model = Model(make)
    for layer in model.layers:
        layer.quant_method = SimpleNamespace()
        layer.norm = torch.nn.LayerNorm(4)
    with pytest.raises(ConfigError, match=r"only 0\.\d% of this model's decoder layers could move.*POLDER_WEIGHTS"):
        model.offloader.post_init()


def test_a_packed_weight_that_is_no_tensor_any_more_counts_as_resident(make: Callable[..., WeightOffloader]) -> None:
    model = Model(make)
    packed = model.layers[0].weight.nbytes
    model.layers[0].quant_method = SimpleNamespace()
    model.layers[0].weight = None
    model.offloader.post_init()
    assert model.offloader.resident_bytes == packed


@pytest.mark.parametrize("waited", [True, False], ids=["as vLLM replays", "control: without the wait"])
def test_a_replay_after_a_wake_finds_all_layers(
    waited: bool, make: Callable[..., WeightOffloader], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(make, graphs=True)
    model.offloader.post_init()
    private = model.offloader._private
    model.store.rotate(None)
    with copies_that_stand_still(monkeypatch) as released:
        model.store.give(private)
        for layer in model.layers:
            layer.weight.zero_()  # what the pages' last owner left
        threading.Timer(0.1, released.set).start()
        if waited:
            model.offloader.sync_prev_onload()
        right = torch.equal(model.replay(), model.right)
    assert right == waited


@pytest.mark.parametrize("broken", ["", "layers are not awaited", "a load is skipped"])
@pytest.mark.parametrize("segments", [LAYERS, LAYERS - 1], ids=["after a wake", "streaming"])
def test_a_pass_gives_the_models_own_numbers_and_others_when_the_mechanism_is_broken(
    broken: str, segments: int, make: Callable[..., WeightOffloader], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(make)
    model.offloader.post_init()
    private = model.offloader._private
    model.store.rotate(None)
    with copies_that_stand_still(monkeypatch) as released:
        if broken == "a load is skipped":
            load = model.store._pieces[1]
            model.store._pieces[1] = type(load)(load.dst[:0], load.src[:0], load.size_bytes[:0])
        model.store.give(private[:segments])
        for layer in model.layers:
            layer.weight.zero_()  # what the pages' last owner left
        if broken == "layers are not awaited":
            monkeypatch.setattr(model.store, "before", lambda layer: None)
        else:
            threading.Timer(0.1, released.set).start()
        right = torch.equal(model.forward(), model.right)
    assert right == (not broken)


def test_a_model_that_streams_or_sleeps_is_never_replayed(make: Callable[..., WeightOffloader]) -> None:
    model = Model(make, graphs=True)
    model.offloader.post_init()
    model.store.take(1)
    with pytest.raises(IntegrityError, match="take turns"):
        model.offloader.sync_prev_onload()
    model.store.rotate(None)
    with pytest.raises(IntegrityError):
        model.offloader.sync_prev_onload()


def test_a_worker_gives_no_single_layers_of_a_model_in_graphs_away(
    make: Callable[..., WeightOffloader], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(make, graphs=True)
    model.offloader.post_init()
    monkeypatch.setattr(here, "memory", SimpleNamespace(rank=0))
    model.offloader.given |= {segment: (1, (at,)) for at, segment in enumerate(model.store.segments)}
    assert "all of its layers or none" in calls.take(None, 1, 1, 1).error
    assert len(model.store.segments) == LAYERS
    assert len(calls.take(None, LAYERS, 0, 1).segments) == LAYERS


@pytest.mark.parametrize("mapped", [True, False])
def test_a_grant_that_some_rank_cannot_map_leaves_each_rank_with_as_many_segments_as_before(
    make: Callable[..., WeightOffloader], monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    model = Model(make, graphs=False)
    model.offloader.post_init()
    segments = model.store.segments
    numbers = {segment: (at,) for at, segment in enumerate(segments)}
    imported = SimpleNamespace(
        handles=lambda _, pages: next(segment for segment, number in numbers.items() if number == pages)
    )
    memory = SimpleNamespace(rank=0, imported=imported, fetch=lambda *_: None)
    monkeypatch.setattr(here, "memory", memory)
    model.offloader.given |= {segment: (1, numbers[segment]) for segment in segments}
    [given_up] = calls.take(None, 1, 1, 1).segments
    if not mapped:
        memory.imported = SimpleNamespace(handles=lambda *_: [()])  # a page is missing
    assert bool(calls.give(None, 1, [[given_up]])) != mapped
    memory.imported = imported
    [free] = calls.undo_give(None, 1, [[given_up]], 1).segments
    assert free == given_up or mapped
    held = {numbers[segment] for segment in model.store.segments}
    assert len(held) == LAYERS - 1
    assert free not in held
    model.store.check_integrity()
    assert torch.equal(model.forward(), model.right)


def test_vllm_asks_before_every_replay_of_a_model() -> None:
    """In its source: a replay without the call would compute over layers that are not there."""
    root = Path(vllm.__file__).parent
    others = {
        "encoder_cudagraph.py",
        "encoder_cudagraph_defs.py",
        "internvl.py",
        "gemma4.py",
    }  # encoders, a drafter's logits
    missing = []
    for path in [*root.glob("v1/**/*.py"), *root.glob("compilation/*.py")]:
        lines = path.read_text().splitlines()
        for at, line in enumerate(lines):
            if re.search(r"(graph|graphs\[\w+\]|entry\.capture)\.replay\(\)", line) and path.name not in others:
                before = "\n".join(lines[max(0, at - 4) : at])
                if "get_offloader().sync_prev_onload()" not in before:
                    missing.append(f"{path.name}:{at + 1}")
    assert not missing


def test_compiled_artifacts_of_stock_and_elastic_engines_never_meet() -> None:
    from vllm.compilation.caching import aot_compile_hash_factors
    from vllm.config import VllmConfig

    stock, elastic = VllmConfig(), VllmConfig()
    assert aot_compile_hash_factors(stock) == aot_compile_hash_factors(elastic)
    offloader.mark(elastic)
    assert aot_compile_hash_factors(stock) != aot_compile_hash_factors(elastic)
    again = VllmConfig()
    offloader.mark(again)
    assert aot_compile_hash_factors(again) == aot_compile_hash_factors(elastic)
    assert stock.additional_config == {}


def split(graphs: str, **options: Any) -> Any:
    """vLLM's configuration of a compiled model, as it is when its own checks are over and the offloader has seen it."""
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode, VllmConfig

    found = VllmConfig()
    found.compilation_config = CompilationConfig(
        **{"mode": CompilationMode.VLLM_COMPILE, "backend": "inductor", **options}
    )
    found.compilation_config.cudagraph_mode = CUDAGraphMode[graphs]
    found.compilation_config.set_splitting_ops_for_v1(all2all_backend="naive")
    assert offloader.split_at_layers(found.compilation_config) == (
        "vllm::wait_prefetch" in found.compilation_config.splitting_ops
    )
    return found


@pytest.mark.parametrize(
    ("graphs", "options", "streams"),
    [
        ("PIECEWISE", {}, True),
        ("FULL_AND_PIECEWISE", {}, False),
        ("FULL_DECODE_ONLY", {}, False),
        ("PIECEWISE", {"use_inductor_graph_partition": True}, False),
        ("PIECEWISE", {"mode": 0}, False),
    ],
)
def test_no_graph_holds_the_waits_for_layers_that_stream(graphs: str, options: dict[str, Any], streams: bool) -> None:
    ops = {"vllm::wait_prefetch", "vllm::start_prefetch"}
    found = split(graphs, **options).compilation_config.splitting_ops
    assert ops.issubset(found) == streams
    assert ops.isdisjoint(found) == (not streams)
    assert len(found) == len(set(found))


def test_what_is_compiled_for_layers_that_stream_is_kept_apart() -> None:
    from vllm.compilation.caching import aot_compile_hash_factors

    assert aot_compile_hash_factors(split("PIECEWISE")) == aot_compile_hash_factors(split("PIECEWISE"))
    assert aot_compile_hash_factors(split("PIECEWISE")) != aot_compile_hash_factors(split("FULL_AND_PIECEWISE"))


def test_a_piece_is_replayed_while_layers_stream(make: Callable[..., WeightOffloader]) -> None:
    """Each layer has its own wait, between the pieces."""
    model = Model(make)
    model.offloader.post_init()
    model.store.take(1)
    model.offloader.sync_prev_onload()


def test_experts_that_move_by_themselves_are_refused() -> None:
    parallel = SimpleNamespace(enable_eplb=True)
    config = SimpleNamespace(
        offload_config=SimpleNamespace(
            prefetch=SimpleNamespace(offload_group_size=0), uva=SimpleNamespace(cpu_offload_gb=0)
        ),
        parallel_config=parallel,
        additional_config={},
    )
    with pytest.raises(ConfigError, match="--enable-eplb"):
        offloader.open_offloader(config, SimpleNamespace())  # type: ignore[arg-type]
