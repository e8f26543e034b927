"""Pages by number: the pool that the broker owns, and the pages of it that an engine's worker has adopted.

    broker                            worker
    PagePool.export([7, 8])  ──fds──► ImportedPages.adopt(generation, [7, 8], ...)
                                      ImportedPages.handles(generation, [7, 8]) ──► Span.map

The ledger says who owns which number (broker/ledger.py); these two classes map numbers to handles. A broker that is
restarted makes new physical pages under the same numbers, so a worker stores a generation with each number.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from polder.errors import IntegrityError, OutOfPages, ProtocolError
from polder.memory.backend import Backend
from polder.memory.page import Handle, Indices, as_indices

__all__ = ["ImportedPages", "PagePool"]


class PagePool:
    """The pages 0 .. total_pages - 1 of one device. One thread at a time: the broker's loop is its only caller."""

    def __init__(self, backend: Backend, total_pages: int) -> None:
        """On sparse backends (the CPU) makes all pages at once, in one segment and without memory; on CUDA none yet.

        Raises OutOfPages when the segment cannot be that large.
        """
        self._backend = backend
        self._handles: list[Handle | None] = [None] * total_pages
        if backend.sparse:
            self._handles[:] = backend.create(total_pages)

    @property
    def total_pages(self) -> int:
        return len(self._handles)

    def handles(self, pages: Sequence[int] | Indices) -> list[Handle]:
        """Handles of the pages. Makes missing pages; raises OutOfPages, with none made, when there is no memory for
        them."""
        numbers = self._check(pages)
        missing = [page for page in dict.fromkeys(numbers) if self._handles[page] is None]
        if missing:
            for page, handle in zip(missing, self._backend.create(len(missing)), strict=True):
                self._handles[page] = handle
        return self._held(numbers)

    def unmade(self) -> list[int]:
        """Pages that have no memory yet: none on sparse backends."""
        return [page for page, handle in enumerate(self._handles) if handle is None]

    def make(self, pages: Sequence[int] | Indices) -> list[int]:
        """Makes those of `pages`, from the first on, that there is memory for. Returns them."""
        made: list[int] = []
        for page in self._check(pages):
            try:
                self.handles([page])
            except OutOfPages:
                break
            made.append(page)
        return made

    def export(self, pages: Sequence[int] | Indices) -> tuple[list[int], list[int], list[int]]:
        """(fds, fd_index, offsets) of Backend.export_many; the caller closes the fds. Makes missing pages."""
        return self._backend.export_many(self.handles(pages))

    def check_integrity(self) -> None:
        """Raises IntegrityError when two pages share their physical memory, or a sparse pool lacks a page."""
        made = [handle for handle in self._handles if handle is not None]
        if len(set(made)) != len(made):
            raise IntegrityError(f"{len(made)} pages have {len(set(made))} handles")
        if self._backend.sparse and len(made) != len(self._handles):
            raise IntegrityError(f"{len(made)} of {len(self._handles)} pages have a handle")

    def close(self) -> None:
        """Forgets all pages. Processes that hold some keep them: an engine outlives its broker. May be repeated."""
        self._backend.drop([handle for handle in self._handles if handle is not None])
        self._handles.clear()

    def _check(self, pages: Sequence[int] | Indices) -> list[int]:
        numbers = as_indices(pages)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= len(self._handles)):
            raise IntegrityError(f"page {numbers.min()} or {numbers.max()} of a pool of {len(self._handles)}")
        return list(map(int, numbers))

    def _held(self, numbers: list[int]) -> list[Handle]:
        return [handle for handle in map(self._handles.__getitem__, numbers) if handle is not None]


class ImportedPages:
    """Pages of a broker that this process has adopted, kept for its life: a page that comes back needs no new fd.

    One thread at a time. Holding a handle is not owning the page: map it only while the broker says that it is yours.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._handles: dict[int, dict[int, Handle]] = {}  # generation -> page -> handle

    def missing(self, generation: int, pages: Sequence[int] | Indices) -> list[int]:
        """Those of `pages` that must be adopted before they can be mapped, in the order given."""
        known = self._handles.get(generation, {})
        return [page for page in as_indices(pages).tolist() if page not in known]

    def adopt(
        self,
        generation: int,
        pages: Sequence[int] | Indices,
        fds: Sequence[int],
        fd_index: Sequence[int],
        offsets: Sequence[int],
    ) -> None:
        """Adopts pages from the result of PagePool.export. The caller closes the fds, also after an error.

        Raises ProtocolError, with nothing adopted, when the lengths do not fit or a page is adopted already.
        """
        numbers = as_indices(pages).tolist()
        known = self._handles.get(generation, {})
        if len(numbers) != len(fd_index) or len(set(numbers)) != len(numbers) or not known.keys().isdisjoint(numbers):
            raise ProtocolError(f"{len(fd_index)} handles came for {len(numbers)} pages, or some twice")
        adopted = dict(zip(numbers, self._backend.adopt_many(fds, fd_index, offsets), strict=True))
        self._handles[generation] = known | adopted

    def handles(self, generation: int, pages: Sequence[int] | Indices) -> list[Handle]:
        """Raises IntegrityError for a page that was never adopted."""
        known = self._handles.get(generation, {})
        try:
            return [known[page] for page in as_indices(pages).tolist()]
        except KeyError as error:
            raise IntegrityError(f"page {error} of generation {generation} was not adopted") from None

    def discard(self, generation: int, pages: Sequence[int] | Indices) -> None:
        """Destroys pages that this process owned, has unmapped, and that no broker will ever hand out again.

        These are pages of a broker that is gone: nobody else would return their memory. Raises IntegrityError, with
        nothing destroyed, for a page that was never adopted.
        """
        numbers = np.unique(as_indices(pages)).tolist()
        self._backend.destroy(self.handles(generation, numbers))
        known = self._handles.get(generation, {})
        for page in numbers:
            del known[page]
        if not known:
            self._handles.pop(generation, None)

    def check_integrity(self) -> None:
        """Raises IntegrityError when two pages share their physical memory."""
        handles = [handle for known in self._handles.values() for handle in known.values()]
        if len(set(handles)) != len(handles):
            raise IntegrityError(f"{len(handles)} adopted pages have {len(set(handles))} handles")

    def close(self) -> None:
        """Forgets all pages and destroys none: they are the broker's. May be repeated."""
        self._backend.drop([handle for known in self._handles.values() for handle in known.values()])
        self._handles.clear()
