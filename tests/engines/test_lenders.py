"""A borrower is attached to the table by which a lender lends now, whoever was replaced meanwhile."""

from __future__ import annotations

import os
from collections.abc import Iterator

import numpy as np
import pytest

from polder.broker.wire import Neighbours
from polder.engines.vllm.tiers.lenders import Lenders
from polder.errors import UsageError
from polder.tiers.peer.borrowing import PeerSlots
from polder.tiers.peer.lending import LendingTable, LentGeometry

GEOMETRY = LentGeometry(blocks=8, ranks=1, unit_blocks=2, unit_pages=2, page_bytes=512, granules=2, granule_bytes=256)
BOTH = Neighbours(lenders=["b"], pids=[7], cores=[7, 8])
ALONE = Neighbours(lenders=[], pids=[], cores=[8])


class Rig:
    """A borrower, and one lender whose table the broker has."""

    def __init__(self) -> None:
        self.slots = PeerSlots(name="peer", number=8, shard_bytes=512, ranks=1, capacity=8)
        self.lenders = Lenders(self.slots, "a", self.fetch)
        self.table: LendingTable | None = None
        self.now = 0.0

    def fetch(self, lender: str) -> LendingTable:
        if self.table is None:
            raise UsageError("no table yet")
        return LendingTable(self.table._fd)

    def lend(self) -> None:
        fd = os.memfd_create("table")
        self.table = LendingTable.create(fd, GEOMETRY)
        os.close(fd)
        self.table.offer(np.arange(GEOMETRY.blocks))

    def lend_no_more(self) -> None:
        assert self.table is not None
        self.table.retire()
        self.table.close()
        self.table = None

    def look(self) -> None:
        """As often as it takes to fetch a table."""
        for _ in range(3):
            self.now += 2.0
            self.lenders.look(self.now)
            if self.lenders._fetcher is not None:
                self.lenders._fetcher.join()

    def borrowed(self) -> int:
        slots = self.slots.take(1)
        self.slots.give(slots)
        return len(slots)


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.lenders.close()
    rig.slots.close()
    if rig.table is not None:
        rig.table.close()


def test_a_lender_is_borrowed_from_once_it_has_a_table(rig: Rig) -> None:
    rig.lenders.on_neighbours(BOTH)
    rig.look()
    assert not rig.borrowed()
    rig.lend()
    rig.look()
    assert rig.borrowed()
    rig.lenders.on_neighbours(ALONE)
    assert not rig.borrowed()


def test_a_lender_that_stays_while_its_broker_is_replaced_is_borrowed_from_by_its_new_table(rig: Rig) -> None:
    """The borrower comes to the new broker last: the first neighbours that it hears of are those of before."""
    rig.lend()
    rig.lenders.on_neighbours(BOTH)
    rig.look()
    assert rig.borrowed()
    rig.lend_no_more()
    rig.lenders.on_neighbours(BOTH)
    rig.look()
    assert not rig.borrowed()
    rig.lend()
    rig.look()
    assert rig.borrowed()
