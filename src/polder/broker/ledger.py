"""The ledger: who owns each page of each device. Law 1, conservation: free + owned = total, after every call.

Pages are numbers 0 .. total - 1 on their device. The ledger knows nothing of bytes or handles. For each device an int32
array holds the owner's index of every page (0: free), so giving or taking a thousand pages is two numpy operations.
Counts are kept beside the array and compared with it by `check_integrity`.

A page that the device has no memory for is missing. Missing pages that nobody owns are withheld: nobody gets them, and
the total is without them. A missing page that somebody owns is withheld when it is given back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from polder.errors import IntegrityError, OutOfPages, ProtocolError

__all__ = ["PURPOSES", "Ledger", "LedgerStatistics", "Owner", "PageArray", "Purpose"]

Purpose = Literal["kv", "weights", "lent"]
"""What an owner has pages for. "lent": for the host tier."""
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)
PageArray = npt.NDArray[np.int64]


class Owner(NamedTuple):
    engine: str
    use: Purpose

    def __str__(self) -> str:
        return f"{self.engine}/{self.use}"


@dataclass(frozen=True, kw_only=True)
class LedgerStatistics:
    total: int
    free: int
    by_owner: dict[Owner, int]


_WITHHELD = -2
"""In place of an owner's index. -1 stands for an owner that never had a page."""


class _Device:
    def __init__(self, total: int) -> None:
        self.owner_of = np.zeros(total, dtype=np.int32)
        self.missing = np.zeros(total, dtype=np.bool_)
        self.free = total
        self.withheld = 0
        self.count: dict[int, int] = {}


class Ledger:
    """Pages of several devices and their owners. Not thread-safe: the broker's loop is its only caller."""

    def __init__(self, total_pages: dict[str, int]) -> None:
        self._devices = {name: _Device(total) for name, total in total_pages.items()}
        self._index: dict[Owner, int] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        return tuple(self._devices)

    def total(self, device: str) -> int:
        """Pages that have an owner or could have one."""
        state = self._device(device)
        return len(state.owner_of) - state.withheld

    def missing(self, device: str) -> PageArray:
        """Pages that the device has no memory for, in rising order."""
        return np.flatnonzero(self._device(device).missing)

    def mark_missing(self, device: str, pages: Sequence[int] | PageArray) -> None:
        """The device has no memory for these pages. Nobody gets them until `restore`; owners keep theirs."""
        state, index = self._device(device), self._checked(device, pages)
        state.missing[index] = True
        free = index[state.owner_of[index] == 0]
        state.owner_of[free] = _WITHHELD
        state.free -= len(free)
        state.withheld += len(free)

    def restore(self, device: str, pages: Sequence[int] | PageArray) -> None:
        """There is memory for these pages again."""
        state, index = self._device(device), self._checked(device, pages)
        state.missing[index] = False
        withheld = index[state.owner_of[index] == _WITHHELD]
        state.owner_of[withheld] = 0
        state.free += len(withheld)
        state.withheld -= len(withheld)

    def free(self, device: str) -> int:
        return self._device(device).free

    def held(self, device: str, owner: Owner) -> int:
        return self._device(device).count.get(self._index.get(owner, -1), 0)

    def pages_of(self, device: str, owner: Owner) -> PageArray:
        """The owner's pages in rising order."""
        return np.flatnonzero(self._device(device).owner_of == self._index.get(owner, -1))

    def take(self, device: str, owner: Owner, count: int) -> PageArray:
        """Gives `count` free pages to `owner`: the lowest numbers, so that runs of pages stay together and map in one
        call.

        Raises OutOfPages, having taken nothing, when fewer are free.
        """
        state = self._device(device)
        if count > state.free:
            raise OutOfPages(f"{device}: {count} pages asked for, {state.free} free")
        pages = np.flatnonzero(state.owner_of == 0)[:count]
        self._assign(state, pages, owner)
        return pages

    def claim(self, device: str, owner: Owner, pages: Sequence[int] | PageArray) -> None:
        """Books pages that `owner` already holds: a broker that restarted learns them from the engines.

        Raises ProtocolError, having changed nothing, when one of them is out of range, named twice or not free.
        """
        state, index = self._device(device), self._checked(device, pages)
        if np.any(state.owner_of[index] != 0):
            taken = index[state.owner_of[index] != 0]
            raise ProtocolError(f"{device}: {owner} reports pages that are not free: {taken[:8].tolist()}")
        self._assign(state, index, owner)

    def give_back(self, device: str, owner: Owner, pages: Sequence[int] | PageArray) -> None:
        """Returns pages to the free ones. Raises ProtocolError, having changed nothing, unless all of them are the
        owner's."""
        self.give_all_back(owner, {device: pages})

    def give_all_back(self, owner: Owner, pages: Mapping[str, Sequence[int] | PageArray]) -> None:
        """The same on several devices: {device: pages}, all of them or none."""
        checked = {device: self._checked(device, numbers) for device, numbers in pages.items()}
        number = self._index.get(owner, -1)
        for device, index in checked.items():
            foreign = index[self._device(device).owner_of[index] != number]
            if len(foreign):
                raise ProtocolError(f"{device}: {owner} gives back pages that it does not hold: {foreign[:8].tolist()}")
        for device, index in checked.items():
            if len(index):
                state = self._device(device)
                missing = state.missing[index]
                state.owner_of[index] = np.where(missing, _WITHHELD, 0)
                state.withheld += int(missing.sum())
                state.free += len(index) - int(missing.sum())
                state.count[number] -= len(index)

    def forget(self, owner: Owner) -> dict[str, int]:
        """Frees everything that `owner` holds: {device: pages}. Only when no process of it is left (law 4)."""
        freed: dict[str, int] = {}
        for name in self._devices:
            pages = self.pages_of(name, owner)
            if len(pages):
                self.give_back(name, owner, pages)
                freed[name] = len(pages)
        return freed

    def statistics(self, device: str) -> LedgerStatistics:
        state = self._device(device)
        names = {index: owner for owner, index in self._index.items()}
        by_owner = {names[index]: n for index, n in state.count.items() if n}
        return LedgerStatistics(total=self.total(device), free=state.free, by_owner=by_owner)

    def check_integrity(self) -> None:
        """Raises IntegrityError unless, on every device, the counts match the pages and free + owned = total."""
        for name, state in self._devices.items():
            numbers, counts = np.unique(state.owner_of, return_counts=True)
            seen = dict(zip(numbers.tolist(), counts.tolist(), strict=True))
            free = seen.pop(0, 0)
            withheld = seen.pop(_WITHHELD, 0)
            absent = int(np.count_nonzero(state.missing & (state.owner_of <= 0)))
            booked = {index: n for index, n in state.count.items() if n}
            if (free, withheld, absent, seen) != (state.free, state.withheld, state.withheld, booked):
                raise IntegrityError(
                    f"{name}: total {len(state.owner_of)}, free {state.free} (counted {free}), owned {booked} (counted {seen})"
                )

    def _device(self, name: str) -> _Device:
        try:
            return self._devices[name]
        except KeyError:
            raise ProtocolError(f"no device {name!r} here; this broker has {', '.join(self._devices)}") from None

    def _checked(self, device: str, pages: Sequence[int] | PageArray) -> PageArray:
        index = np.asarray(pages, dtype=np.int64)
        total = len(self._device(device).owner_of)
        if index.ndim != 1 or np.any((index < 0) | (index >= total)) or len(np.unique(index)) != len(index):
            raise ProtocolError(f"{device}: not a set of pages of 0..{total - 1}: {index.ravel()[:8].tolist()}")
        return index

    def _assign(self, state: _Device, pages: PageArray, owner: Owner) -> None:
        number = self._index.setdefault(owner, len(self._index) + 1)
        state.owner_of[pages] = number
        state.free -= len(pages)
        state.count[number] = state.count.get(number, 0) + len(pages)
