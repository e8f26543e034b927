"""The tables of `polder plan` for several models on one device."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from polder.planner.devices import Device
from polder.planner.engine_memory import engine_bytes
from polder.planner.model_shape import ModelShape
from polder.planner.pooling import Pooling
from polder.units import format_bytes

__all__ = ["show_pooling"]

_LEGEND = (
    "Sequences of that length that fit at once. slice: an equal part of the KV memory, as stock engines have it side by side; "
    "pool: all of it but the others' floors, while the others have no requests; alone: also the floors and the weights of the "
    "others, which sleep "
    '(weights = "elastic"). What is idle of the pool keeps prefixes. Activations are estimated; a context with workspaces and '
    "CUDA graphs are assumed to take 1 GiB each an engine."
)


def show_pooling(shapes: Sequence[ModelShape], device: Device, json_file: Path | None, html_file: Path | None) -> None:
    pooling = Pooling(shapes=shapes, device=device)
    console = Console(record=html_file is not None)
    console.print(_models(pooling))
    console.print(_contexts(pooling))
    for line in _notes(pooling):
        console.print(line, highlight=False, soft_wrap=True)
    if html_file is not None:
        console.save_html(str(html_file), inline_styles=True)
    if json_file is not None:
        json_file.write_text(json.dumps(_figures(pooling), indent=1) + "\n")


def _figures(pooling: Pooling) -> dict[str, Any]:
    models = [
        {
            "model": shape.name,
            "weight_bytes": shape.weight_bytes,
            "kv_bytes_per_token": shape.kv_bytes_per_token,
            "engine_bytes": engine_bytes(shape, pooling.device.memory_bytes),
            "floor_bytes": pooling.floor_bytes(shape),
            "pool_kv_bytes": pooling.pool_bytes(shape),
            "alone_kv_bytes": pooling.alone_bytes(shape),
            "wake_s": pooling.wake_s(shape),
            "trained_tokens": shape.trained_tokens,
        }
        for shape in pooling.shapes
    ]
    outlooks = [asdict(outlook) for outlook in pooling.outlooks()]
    return {"device": asdict(pooling.device), "kv_bytes": pooling.kv_bytes, "models": models, "outlooks": outlooks}


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    return table


def _models(pooling: Pooling) -> Table:
    title = f"{len(pooling.shapes)} models on {pooling.device.name}, {format_bytes(pooling.device.memory_bytes)}"
    table = _table(title, "", "weights", "engine", "KV a token", "wakes in")
    for shape in pooling.shapes:
        wake_s = pooling.wake_s(shape)
        table.add_row(
            shape.name,
            format_bytes(shape.weight_bytes),
            format_bytes(engine_bytes(shape, pooling.device.memory_bytes)),
            format_bytes(shape.kv_bytes_per_token),
            "" if wake_s is None else f"{wake_s:.2g} s",
        )
    return table


def _contexts(pooling: Pooling) -> Table:
    table = _table("sequences at once", "", "context", "slice", "pool", "pool / slice", "alone")
    last = ""
    for outlook in pooling.outlooks():
        sliced, pooled = outlook.sliced, outlook.pooled
        table.add_row(
            "" if outlook.model == last else outlook.model,
            f"{outlook.context_tokens:,}",
            "-" if sliced is None else f"{sliced:,}",
            "-" if pooled is None else f"{pooled:,}",
            f"{pooled / sliced:.1f}" if sliced and pooled else "",
            f"{outlook.alone:,}",
        )
        last = outlook.model
    return table


def _floors(pooling: Pooling) -> Iterator[str]:
    """What the pool cannot take from models that are awake: at least one request of each."""
    if pooling.kv_bytes <= 0:
        return
    floors = [(shape.name, pooling.floor_bytes(shape)) for shape in pooling.shapes]
    total = sum(size for _, size in floors)
    each = ", ".join(f"{name} {format_bytes(size)}" for name, size in floors)
    yield (
        f"The column pool leaves out the others' floors, which are one request of max_model_len each: {each}. "
        "In a fleet file, a smaller max_model_len makes them smaller."
    )
    if total > pooling.kv_bytes:
        yield (
            f"Together that is {format_bytes(total)}, more than there is: with resident weights `polder serve` refuses it. Choose "
            "a smaller max_model_len, quantised weights or a larger device, or let the models take turns "
            '(weights = "elastic", column alone).'
        )


def _notes(pooling: Pooling) -> Iterator[str]:
    kv = pooling.kv_bytes
    if kv > 0:
        yield f"{format_bytes(kv)} for the KV of all models, {format_bytes(kv // len(pooling.shapes))} in a slice."
    else:
        yield (
            f"The models do not fit together: {format_bytes(-kv)} are missing. With elastic weights they take turns; without, "
            "choose fewer or smaller ones."
        )
    for shape in pooling.shapes:
        if pooling.alone_bytes(shape) <= 0:
            yield f"{shape.name} does not even fit while the others sleep: it needs a larger device."
    yield from _floors(pooling)
    yield f"{pooling.device.name}: {pooling.device.source}."
    yield _LEGEND
