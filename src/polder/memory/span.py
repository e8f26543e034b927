"""A span: reserved addresses, divided into slots of one page. Pages come and go; the addresses never change (law 3).

So tensors, compiled graphs and CUDA graphs over a span stay valid whatever is mapped, as in vAttention and Oneiros
("virtual aliasing"). The backend is called once for each run of adjacent slots, because on CUDA granting access and
unmapping cost mostly per call.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from polder.errors import IntegrityError
from polder.memory.backend import Backend
from polder.memory.page import Handle, Indices, Mask, as_indices, runs
from polder.memory.tensor import tensor_over

if TYPE_CHECKING:
    import torch

__all__ = ["Span"]


class _Addresses:
    """The reservation. It ends after the span and every tensor over it are gone, so no foreign memory appears under
    them.

    The last of them may die inside the garbage collector, which interrupts any code. That code may hold a lock of the
    backend, or be numpy's (a ufunc inside numpy's `errstate` ends the process). So the finalizer only takes a note.
    """

    def __init__(self, backend: Backend, slots: int) -> None:
        self.mapped: Mask = np.zeros(slots, dtype=np.bool_)
        _free_dropped(backend)
        self.first = backend.reserve(slots * backend.page_bytes)
        # Not at interpreter exit: other threads may still use tensors, and the process gives everything back anyway.
        weakref.finalize(self, backend.dropped.append, (backend, self.first, self.mapped)).atexit = False


class Span:
    """`slots` page slots at fixed addresses. One thread changes a span at a time; any thread may read mapped slots.

    The pages belong to the caller: unmapping a slot destroys nothing.
    """

    def __init__(self, backend: Backend, slots: int) -> None:
        """Reserves the addresses, nothing mapped. Raises OutOfPages when there are no such addresses."""
        self._backend = backend
        self._addresses: _Addresses | None = _Addresses(backend, slots)
        self._tensor: torch.Tensor | None = None
        self._slots = slots

    @property
    def slots(self) -> int:
        return self._slots

    @property
    def mapped(self) -> Mask:
        """Which slots hold a page, as a read-only view: it follows later changes."""
        view = self._open().mapped.view()
        view.flags.writeable = False
        return view

    def address(self, slot: int) -> int:
        """Address of the slot's first byte, mapped or not. `address(slots)` is the end of the span."""
        if not 0 <= slot <= self._slots:
            raise IntegrityError(f"slot {slot} of a span of {self._slots}")
        return self._open().first + slot * self._backend.page_bytes

    def map(self, slots: Sequence[int] | Indices, handles: Sequence[Handle]) -> None:
        """Maps page `handles[i]` at slot `slots[i]`. The bytes are stale: `zero` them before use (law 2).

        Raises IntegrityError, with nothing changed, when a slot is taken, named twice or outside the span. When the
        backend fails (OutOfPages, EnvironmentFault), all that this call has mapped is unmapped first.
        """
        mapped = self._open().mapped
        order, ordered = self._sorted(slots)
        if len(ordered) != len(handles):
            raise IntegrityError(f"{len(handles)} pages for {len(ordered)} slots")
        _refuse(ordered[mapped[ordered]], "taken")
        at = 0
        try:
            for first, count in runs(ordered):
                self._backend.map(self.address(first), [handles[i] for i in order[at : at + count].tolist()])
                mapped[first : first + count] = True
                at += count
        except BaseException:
            self._unmap_runs(ordered[:at])
            raise

    def unmap(self, slots: Sequence[int] | Indices) -> None:
        """Takes the pages away. Later accesses to the slots fault.

        The caller makes sure that no work still uses them (Backend.fence). Raises IntegrityError, with nothing changed,
        when a slot is empty, named twice or outside the span. When the backend fails for one run of slots, the runs
        before it are empty and the others unchanged; `mapped` tells which.
        """
        _, ordered = self._sorted(slots)
        _refuse(ordered[~self._open().mapped[ordered]], "empty")
        self._unmap_runs(ordered)

    def zero(self, slots: Sequence[int] | Indices) -> None:
        """Fills mapped slots with zero bytes; returns when they are there. Raises IntegrityError as `unmap` does."""
        _, ordered = self._sorted(slots)
        _refuse(ordered[~self._open().mapped[ordered]], "empty")
        for first, count in runs(ordered):
            self._backend.zero(self.address(first), count * self._backend.page_bytes)

    def tensor(self) -> torch.Tensor:
        """The span as one flat int8 tensor on the backend's device, always the same one. Only mapped slots may be
        touched.

        It may outlive the span: the addresses stay reserved until the last view of it is gone.
        """
        if self._tensor is None:
            addresses, size = self._open(), self._slots * self._backend.page_bytes
            self._tensor = tensor_over(addresses.first, size, self._backend.device, addresses)
        return self._tensor

    def close(self) -> None:
        """Unmaps everything. May be repeated.

        The addresses are free at once when no tensor over them is left, else when a span is made or closed later.
        """
        if self._addresses is None:
            return
        self._unmap_runs(np.flatnonzero(self._addresses.mapped))
        self._tensor = self._addresses = None
        _free_dropped(self._backend)

    # ------------------------------------------------------------------ inside

    def _open(self) -> _Addresses:
        if self._addresses is None:
            raise IntegrityError("the span is closed")
        return self._addresses

    def _sorted(self, slots: Sequence[int] | Indices) -> tuple[Indices, Indices]:
        """The order that sorts the slots, and the sorted slots. Raises IntegrityError for one outside the span or named
        twice.

        Callers name slots unit by unit, and adjacent slots belong to the same layer of successive units; sorting joins
        them.
        """
        wanted = as_indices(slots)
        order = np.argsort(wanted, kind="stable")
        ordered = wanted[order]
        if len(ordered) and (ordered[0] < 0 or ordered[-1] >= self._slots):
            raise IntegrityError(f"slots {ordered[0]} to {ordered[-1]} of a span of {self._slots}")
        _refuse(ordered[1:][np.diff(ordered) == 0], "named twice")
        return order, ordered

    def _unmap_runs(self, ordered: Indices) -> None:
        mapped = self._open().mapped
        for first, count in runs(ordered):
            self._backend.unmap(self.address(first), count)
            mapped[first : first + count] = False


def _refuse(wrong: Indices, state: str) -> None:
    if len(wrong):
        raise IntegrityError(f"slot {wrong[0]} is {state}" + (f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""))


def _free_dropped(backend: Backend) -> None:
    """Frees the reservations that nothing uses any more."""
    while backend.dropped:
        try:
            owner, first, mapped = backend.dropped.popleft()
        except IndexError:  # another thread took the last one
            return
        for start, count in runs(np.flatnonzero(mapped)):
            owner.unmap(first + start * owner.page_bytes, count)
        owner.free(first, len(mapped) * owner.page_bytes)
