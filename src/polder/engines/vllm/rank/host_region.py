"""Host memory of the broker in a worker: for the host tier, and for the window's store."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence

from polder.broker.core import HOST
from polder.engines.vllm.rank.memory import WorkerMemory
from polder.errors import EnvironmentFault
from polder.memory.devices import open_backend
from polder.memory.pool import ImportedPages
from polder.memory.span import Span
from polder.units import format_bytes

__all__ = ["HostRegion"]

logger = logging.getLogger("polder.engine")


class HostRegion:
    """This rank's pages of host memory, mapped one after another, and registered with the driver where there is a
    GPU."""

    def __init__(self, memory: WorkerMemory, pages: Sequence[int]) -> None:
        """`pages`: numbers of the broker. Raises PolderError, OSError."""
        self._backend = open_backend(HOST, memory.plan.page_bytes)
        self._imported = ImportedPages(self._backend)
        memory.adopt(self._imported, HOST, pages, generation=memory.plan.generation)
        self._span = Span(self._backend, len(pages))
        self._span.map(range(len(pages)), self._imported.handles(memory.plan.generation, list(pages)))
        self.address = self._span.address(0)
        self._unpin: Callable[[], None] = lambda: None
        size = len(pages) * memory.plan.page_bytes
        try:
            memory.backend.pin(self.address, size)
            self._unpin = functools.partial(memory.backend.unpin, self.address)
        except EnvironmentFault as error:
            logger.warning(
                "%s of host memory cannot be pinned (%s): copies take about twice as long, and keep their thread waiting; "
                "raise the limit of locked memory (ulimit -l), if that is what it is",
                format_bytes(size),
                error,
            )

    def close(self) -> None:
        self._unpin()
        self._span.close()
        self._imported.close()
        self._backend.close()
