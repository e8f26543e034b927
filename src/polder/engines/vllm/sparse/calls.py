"""What the engine core asks of every worker about sparse requests, by `collective_rpc`, ordered with the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from polder.engines.vllm.process import here, present
from polder.engines.vllm.rank import block_tables
from polder.engines.vllm.sparse.decoding import Decoding
from polder.engines.vllm.sparse.limits import layers_of
from polder.engines.vllm.sparse.prefix import store
from polder.engines.vllm.sparse.worker import WorkerSparse
from polder.errors import PolderError
from polder.sparse.budget import Layout
from polder.sparse.methods import Method

__all__ = ["enter", "forget", "install", "leave", "store_prefix"]


def install(worker: Any) -> str:
    """Hooks the model's attention layers. Returns what was wrong; "" if nothing."""
    runner = worker.model_runner
    try:
        here.sparse = WorkerSparse(runner, layers_of(worker), present(here.memory))
    except PolderError as error:
        return str(error)
    return ""


def store_prefix(worker: Any, request: str, key: bytes, blocks: Sequence[int], layout: Layout, method: Method) -> str:
    """Stores the prefix of a request whose prompt is computed, under `key`. Returns what was wrong; "" if nothing."""
    sparse = present(here.sparse)
    queries = sparse.queries.get(request)
    if queries is None:
        return "the prompt's last queries were not seen"
    sparse.drop(key)
    sparse.prefixes[key] = store(sparse.formats, blocks, layout, queries.moments, method, sparse.make_home)
    return ""


def forget(worker: Any, keys: Sequence[bytes]) -> None:
    """Nobody reads these prefixes any more."""
    for key in keys:
        present(here.sparse).drop(key)


def enter(
    worker: Any, request: str, key: bytes, blocks: Sequence[int], slots: Sequence[int], tokens: int, selected: int
) -> str:
    """From the next step on the request reads its stored prefix through `slots`.

    `blocks` are all of its blocks as they were; `tokens` of it are computed. Returns what was wrong; "" if nothing.
    """
    sparse = present(here.sparse)
    queries = sparse.queries.get(request)
    if queries is None:
        return "the prompt's last queries were not seen"
    decoding = Decoding(sparse.formats, sparse.prefixes[key], selected=selected, slots=len(slots))
    decoding.keep_exact(blocks, tokens)
    if not decoding.fill(slots, queries.last):
        return "units could not be read"
    layout = decoding.layout
    unread = [0] * (layout.units - len(slots))
    ids = [*blocks[: layout.sink_blocks], *slots, *unread, *blocks[layout.end_block :]]
    block_tables.replace_row(worker.model_runner, request, ids)
    sparse.decoding[request] = decoding
    return ""


def leave(worker: Any, requests: Sequence[str]) -> None:
    """These requests have ended, or lost their blocks."""
    for request in requests:
        present(here.sparse).forget(request)
