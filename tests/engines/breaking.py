"""What a test breaks on purpose in the workers of a running engine, to see that its answers change.

The workers import this module, too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.engines.harness import Engine

__all__ = ["allowing_functions", "broken", "store_nothing_back"]


def allowing_functions() -> contextlib.AbstractContextManager[None]:
    """Around the whole life of an engine that is to be broken: functions may be sent to its workers."""
    from tests.engines.harness import environment

    return environment({"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"})


@contextlib.contextmanager
def broken(engine: Engine, breaking: Callable[[Any], None]) -> Iterator[None]:
    """Calls `breaking(worker)` in all workers, and at the end `mend`."""
    engine.llm.collective_rpc(breaking)
    try:
        yield
    finally:
        engine.llm.collective_rpc(mend)


def store_nothing_back(worker: Any) -> None:
    """What a window's layers write stays where it will be overwritten."""
    from polder.stream.pipeline import Pieces

    stream = _window().stream._stream
    stream._store = lambda layer: Pieces.of([])


def mend(worker: Any) -> None:
    """Undoes all of the above."""
    stream = _window().stream
    stream._stream._store = stream._save


def _window() -> Any:
    from polder.engines.vllm.window import worker as window_worker

    return window_worker.current()
