"""What a borrower's worker reads and writes is memory of the table that its core has borrowed by."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from polder.errors import EnvironmentFault
from polder.memory.cpu import CpuBackend
from polder.memory.pool import ImportedPages, PagePool
from polder.tiers.jobs import Part, Pieces
from polder.tiers.movers import CpuMover
from polder.tiers.peer.borrowing import ChunkGeometry, PeerSlots
from polder.tiers.peer.lending import LendingTable, LentGeometry
from polder.tiers.peer.memory import Lent, PeerMemory
from tests.tiers.fakes import ids_of

PAGE, BLOCKS = 4096, 4
GEOMETRY = LentGeometry(
    blocks=BLOCKS, ranks=1, unit_blocks=1, unit_pages=1, page_bytes=PAGE, granules=1, granule_bytes=PAGE
)


class Rig:
    """A borrower's core and worker, and a lender that may be replaced by one of the same name."""

    def __init__(self) -> None:
        self.backend = CpuBackend(page_bytes=PAGE)
        self.pool = PagePool(self.backend, 2 * BLOCKS)
        self.slots = PeerSlots(name="peer", number=41, shard_bytes=PAGE, ranks=1, capacity=BLOCKS)
        self.memory = PeerMemory(number=41, rank=0, backend=self.backend, open_lender=self.open)
        self.asked = 0
        self.tables: list[LendingTable] = []
        self.source = np.full(PAGE, 7, dtype=np.uint8)
        self.lend(range(BLOCKS))

    def lend(self, pages: Sequence[int]) -> None:
        fd = os.memfd_create("table")
        table = LendingTable.create(fd, GEOMETRY)
        os.close(fd)
        table.pages[0, :, 0] = pages
        table.offer(np.arange(BLOCKS))
        self.tables.append(table)

    def attach(self) -> None:
        self.slots.attach("b", LendingTable(self.tables[-1]._fd))

    def open(self, name: str) -> Lent:
        self.asked += 1
        table = LendingTable(self.tables[-1]._fd)
        return Lent(table=table, cut=ChunkGeometry.of(GEOMETRY, PAGE), generation=1, fetch=self.fetch)

    def fetch(self, imported: ImportedPages, rank: int, pages: Sequence[int]) -> None:
        fds, index, offsets = self.pool.export(pages)
        imported.adopt(1, pages, fds, index, offsets)

    def store(self) -> bool:
        block: Pieces = [(self.source.ctypes.data, PAGE)]
        return self.memory.store(self.part, 0, block, CpuMover())

    def take(self) -> None:
        numbers = np.array([0])
        self.slots.lost()
        taken = self.slots.take(1)
        ((_, lent),) = self.slots.locate(taken)
        self.part = Part(tier=0, rows=numbers, blocks=numbers, slots=taken, ids=ids_of([0]), lent=lent)

    def close(self) -> None:
        self.memory.close()
        self.slots.close()
        for table in self.tables:
            table.close()
        self.pool.close()
        self.backend.close()


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    rig.attach()
    rig.take()
    yield rig
    rig.close()


def test_a_lender_that_was_killed_together_with_the_broker_is_stored_at_again_when_it_is_back(rig: Rig) -> None:
    """Nobody has closed its former table."""
    assert rig.store()
    rig.lend(range(BLOCKS, 2 * BLOCKS))
    rig.attach()
    rig.take()
    assert rig.store()
    assert rig.tables[1].foreign.any()


def test_what_was_borrowed_by_a_former_table_is_no_block_of_the_present_one(rig: Rig) -> None:
    """Its epochs may be the same."""
    assert rig.store()
    rig.lend(range(BLOCKS, 2 * BLOCKS))
    rig.memory.close()
    for _ in range(3):
        with pytest.raises(EnvironmentFault):
            rig.store()
    assert rig.asked == 2, "it is not asked for again at once"
    assert not rig.tables[1].foreign.any()
