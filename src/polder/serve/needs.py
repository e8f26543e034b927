"""What a fleet takes from its device and from the host, line by line, from config.json and the headers of the weights.

Weights, KV memory and tiers are sizes that are known. Activations are the planner's estimate; what processes, contexts
and CUDA graphs take is an assumption, and is said to be one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from polder.errors import ConfigError
from polder.planner.checkpoint import checkpoint_bytes, hub_folder
from polder.planner.engine_memory import (
    CONTEXT_BYTES,
    GRAPH_BYTES,
    IMAGE_BYTES,
    PROCESS_BYTES,
    activation_bytes,
    default_batch,
)
from polder.planner.model_shape import ModelShape, element_bytes, model_shape, read_config, shape_of
from polder.serve.arguments import is_given, option
from polder.serve.fleet import Fleet, Model
from polder.serve.schema import read_tables, read_toml

__all__ = ["Line", "Needs", "folder_of_model", "needs_of", "shapes_in_file"]

_BATCH = ("--max-num-batched-tokens", "--max-num-seqs")
MORE_MEMORY = {"--speculative-config": "the draft model", "--enable-lora": "adapters"}
"""Arguments that take memory whose size is not known here."""


class Line(NamedTuple):
    what: str
    size_bytes: int | None
    """None: not known."""
    estimated: bool = False
    """The planner's estimate, or an assumption."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    device: tuple[Line, ...]
    host: tuple[Line, ...]
    """Empty where the device is the host's memory: all is in `device`."""


def needs_of(fleet: Fleet, device_bytes: int | None) -> Needs:
    """`device_bytes`: memory of the device, on which vLLM's defaults depend; None: not known."""
    on_cpu = fleet.device.startswith("cpu")
    kind = "KV memory and elastic weights" if _elastic(fleet.models) else "KV memory"
    device = [Line(f"{kind} of all models", fleet.budget_bytes)]
    host = [Line("host tiers and windows", fleet.host_bytes)] if fleet.host_bytes else []
    for model in fleet.models:
        shape, weights = sizes_of(model)
        elastic = model.settings.weights == "elastic"
        if elastic and weights is not None and shape is not None:
            movable = shape.layer_weight_bytes
            device.append(Line(f"{model.name}: weights that stay", weights - movable))
            host.append(Line(f"{model.name}: host copy of its weights", movable))
        else:
            device.append(Line(f"{model.name}: weights", None if elastic else weights))
        device.append(Line(f"{model.name}: activations", _activations(model, shape, on_cpu, device_bytes), True))
        device += [
            Line(f"{model.name}: {what}", None) for name, what in MORE_MEMORY.items() if is_given(model.args, name)
        ]
        if not on_cpu:
            device += _of_cuda(model)
        host.append(Line(f"{model.name}: its processes (assumption)", PROCESS_BYTES, True))
    return Needs(device=(*device, *host), host=()) if on_cpu else Needs(device=tuple(device), host=tuple(host))


def folder_of_model(path: str) -> Path | None:
    """Where its config.json is: the folder, or this machine's cache of a hub. None: nothing of it is here."""
    return Path(path) if (Path(path) / "config.json").is_file() else hub_folder(path)


def sizes_of(model: Model) -> tuple[ModelShape | None, int | None]:
    """The model's shape and the bytes of its weights; None for what is not known."""
    folder = folder_of_model(model.path)
    if folder is None:
        return None, None
    try:
        config = read_config(folder)
    except ConfigError:
        return None, None
    dtype = element_bytes(config, option(model.args, "--dtype") or "auto")
    online = option(model.args, "--quantization") is not None and not config.get("quantization_config")
    weights = None if dtype is None or online else checkpoint_bytes(folder, dtype)
    try:
        return shape_of(model.name, config), weights
    except ConfigError:
        return None, weights


def shapes_in_file(path: Path) -> list[ModelShape]:
    """The shapes of a fleet file's models, whether or not this machine could serve them. Raises ConfigError."""
    shapes = []
    for model, _ in read_tables(read_toml(path)).models:
        folder = path.parent / model.path
        shape = replace(model_shape(str(folder) if folder.is_dir() else model.path), name=model.name)
        if isinstance(model.max_model_len, int):
            shape = replace(shape, trained_tokens=min(model.max_model_len, shape.trained_tokens or model.max_model_len))
        if (option(model.args, "--kv-cache-dtype") or "auto").startswith("fp8"):
            shape = replace(shape, kv=shape.kv._replace(element_bytes=1))
        shapes.append(shape)
    return shapes


def _elastic(models: Sequence[Model]) -> bool:
    return any(model.settings.weights == "elastic" for model in models)


def _activations(model: Model, shape: ModelShape | None, on_cpu: bool, device_bytes: int | None) -> int | None:
    if shape is None:
        return None
    tokens, sequences = (
        int(text) if (text := option(model.args, name)) and text.isdecimal() else default
        for name, default in zip(_BATCH, default_batch(on_cpu, device_bytes), strict=True)
    )
    return activation_bytes(shape, tokens, sequences)


def _of_cuda(model: Model) -> Iterator[Line]:
    yield Line(f"{model.name}: CUDA context and workspaces (assumption)", CONTEXT_BYTES, True)
    if not is_given(model.args, "--enforce-eager"):
        yield Line(f"{model.name}: CUDA graphs (assumption)", GRAPH_BYTES, True)
    folder = folder_of_model(model.path)
    if folder is not None and "vision_config" in read_config(folder):
        yield Line(f"{model.name}: encoder at work (assumption)", IMAGE_BYTES, True)
