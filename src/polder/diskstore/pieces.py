"""Pages as the engines see them. A page consists of equal parts, side by side; each part is a piece with a checksum of
its own.

A page is written as a whole. It is read as a whole or in parts. Adjacent parts are read with one request.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

import numpy as np

from polder.arrays import BoolArray, ErrorArray, IntArray, UintArray
from polder.diskstore.io import Outcome, PageFile, Transfer
from polder.diskstore.keys import Keys, page_seeds, part_seeds

__all__ = ["DiskTransfer", "PageFormat", "one_a_page", "verify", "worst"]


@dataclass(frozen=True, kw_only=True)
class DiskTransfer:
    """A transfer for an engine, and the n rows of the caller and slots of the disk that it is about."""

    rows: IntArray
    slots: IntArray
    keys: Keys
    generations: UintArray
    parts: IntArray | None
    """[n] which part of its page each row is; None: whole pages."""
    transfer: Transfer
    """One piece for each row, or one for each part of each row's page."""


@dataclass(frozen=True, kw_only=True)
class PageFormat:
    """The format of the pages in one slab."""

    page_bytes: int
    parts: int
    namespace: int
    """A hash of the namespace, which goes into the checksums."""

    def transfer(
        self,
        disk: int,
        file: PageFile,
        slots: IntArray,
        keys: Keys,
        generations: UintArray,
        addresses: IntArray,
        parts: IntArray | None = None,
    ) -> Transfer:
        """The pieces of n pages: all parts of each page in turn, or the one part of each page that `parts` ([n])
        names."""
        piece_bytes = self.page_bytes // self.parts
        offsets, memory = slots * self.page_bytes, addresses
        seeds = page_seeds(keys, generations, self.namespace)
        if self.parts > 1 and parts is None:
            numbers = np.arange(self.parts)
            seeds = part_seeds(seeds[:, None], numbers).ravel()
            offsets = (offsets[:, None] + numbers * piece_bytes).ravel()
            memory = np.repeat(addresses, self.parts)
            addresses = (addresses[:, None] + numbers * piece_bytes).ravel()
        elif self.parts > 1 and parts is not None:
            seeds, offsets = part_seeds(seeds, parts), offsets + parts * piece_bytes
        return Transfer(
            disk=disk,
            file=file,
            piece_bytes=piece_bytes,
            offsets=offsets,
            addresses=addresses,
            memory=memory,
            seeds=seeds,
        )


def worst(errors: ErrorArray) -> ErrorArray:
    """[n, k] errno of the pieces of n rows -> [n] one errno for each row: EIO wins over others, and others over
    ETIMEDOUT."""
    if errors.shape[1] == 1:
        return errors[:, 0]
    of_rows: ErrorArray = np.take_along_axis(errors, _rank(errors).argmax(axis=1)[:, None], axis=1)[:, 0]
    return of_rows


def verify(outcome: Outcome, digests: UintArray) -> tuple[ErrorArray, BoolArray]:
    """Compares the outcome with the digests ([n, k]) that the pieces of n rows should have.

    Returns [n] errno, and [n] which rows were read but do not verify. A row with one piece that does not verify does
    not verify as a whole, whatever became of its other pieces; its errno is 0.
    """
    errors = outcome.errors.reshape(digests.shape)
    torn = (errors == 0) & (outcome.digests.reshape(digests.shape) != digests)
    if digests.shape[1] == 1:
        return errors[:, 0], torn[:, 0]
    torn = torn.any(axis=1)
    return np.where(torn, np.int32(0), worst(errors)), torn


def one_a_page(slots: IntArray, errors: ErrorArray, torn: BoolArray) -> BoolArray:
    """[n] marks one row of each slot, the worst one, so that several bad parts of a page count as one bad page."""
    order = np.lexsort((-_rank(errors), ~torn, slots))
    chosen = np.zeros(len(slots), dtype=np.bool_)
    chosen[order[np.unique(slots[order], return_index=True)[1]]] = True
    return chosen


def _rank(errors: ErrorArray) -> IntArray:
    rank: IntArray = np.select([errors == 0, errors == errno.ETIMEDOUT, errors == errno.EIO], [0, 1, 3], 2)
    return rank
