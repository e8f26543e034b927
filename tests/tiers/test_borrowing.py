"""PeerSlots on real lending tables, in random lives of lenders and borrowers."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from polder.tiers.peer.borrowing import ChunkGeometry, PeerSlots
from polder.tiers.peer.lending import LendingTable, LentGeometry
from polder.tiers.slots import LentChunks
from tests.conftest import examples

CAPACITY = 200


def geometry(
    *, blocks: int, ranks: int, unit_blocks: int, granules: int, granule_bytes: int, page_bytes: int
) -> LentGeometry:
    unit_pages = -(-unit_blocks * granules * granule_bytes // page_bytes)
    return LentGeometry(
        blocks=blocks,
        ranks=ranks,
        unit_blocks=unit_blocks,
        unit_pages=unit_pages,
        page_bytes=page_bytes,
        granules=granules,
        granule_bytes=granule_bytes,
    )


GEOMETRIES = {
    "small": geometry(blocks=8, ranks=1, unit_blocks=2, granules=2, granule_bytes=256, page_bytes=512),
    "two ranks": geometry(blocks=5, ranks=2, unit_blocks=5, granules=3, granule_bytes=128, page_bytes=512),
    "large": geometry(blocks=3, ranks=1, unit_blocks=1, granules=1, granule_bytes=4096, page_bytes=4096),
}


@dataclass
class Lender:
    table: LendingTable
    fd: int
    lent: set[int] = field(default_factory=set)


def make_table(name: str) -> Lender:
    shape = GEOMETRIES[name]
    fd = os.memfd_create(name)
    table = LendingTable.create(fd, shape)
    at = np.arange(shape.unit_blocks * shape.granules).reshape(shape.unit_blocks, shape.granules) * shape.granule_bytes
    table.granule_page[:], table.granule_offset[:] = at // shape.page_bytes, at % shape.page_bytes
    return Lender(table, fd)


@dataclass
class Borrower:
    slots: PeerSlots
    held: set[int] = field(default_factory=set)
    """Taken, not given back, not reported as lost."""
    lots: dict[int, set[tuple[str, int]]] = field(default_factory=dict)
    dead: set[int] = field(default_factory=set)
    """Of those: a lot was taken back."""
    tables: dict[str, LendingTable] = field(default_factory=dict)


class Lives(RuleBasedStateMachine):
    def __init__(self, borrowers: int, shard_bytes: int, ranks: int) -> None:
        super().__init__()
        self.shard_bytes, self.ranks = shard_bytes, ranks
        self.borrowers = [
            Borrower(PeerSlots(name="peer", number=1 + i, shard_bytes=shard_bytes, ranks=ranks, capacity=CAPACITY))
            for i in range(borrowers)
        ]
        self.lenders: dict[str, Lender] = {}

    @initialize(names=st.sets(st.sampled_from(sorted(GEOMETRIES)), min_size=1))
    def lenders_come(self, names: set[str]) -> None:
        for name in sorted(names):
            self.a_lender_comes(name)

    # ------------------------------------------------------------------ the lenders

    @rule(name=st.sampled_from(sorted(GEOMETRIES)))
    def a_lender_comes(self, name: str) -> None:
        """Or starts again."""
        self.a_lender_goes(name)
        self.lenders[name] = make_table(name)
        for borrower in self.borrowers:
            self.attach(borrower, name)

    def attach(self, borrower: Borrower, name: str) -> None:
        view = LendingTable(self.lenders[name].fd)
        self.lose(borrower, lambda lot: lot[0] == name)
        borrower.slots.attach(name, view)
        borrower.tables[name] = view

    def lose(self, borrower: Borrower, hit: Callable[[tuple[str, int]], bool]) -> None:
        borrower.dead |= {slot for slot in borrower.held if any(map(hit, borrower.lots[slot]))}

    @rule(name=st.sampled_from(sorted(GEOMETRIES)))
    def a_lender_goes(self, name: str) -> None:
        lender = self.lenders.pop(name, None)
        if lender is not None:
            lender.table.retire()
            lender.table.close()
            os.close(lender.fd)
            for borrower in self.borrowers:
                self.lose(borrower, lambda lot: lot[0] == name)

    @precondition(lambda self: self.lenders)
    @rule(data=st.data())
    def offer(self, data: st.DataObject) -> None:
        _, lender = self.pick(data)
        lots = data.draw(st.lists(st.integers(0, lender.table.geometry.blocks - 1), unique=True, min_size=1))
        lender.table.offer(np.array(lots))
        lender.lent |= set(lots)

    @precondition(lambda self: self.lenders)
    @rule(data=st.data(), again=st.booleans())
    def take_back(self, data: st.DataObject, again: bool) -> None:
        name, lender = self.pick(data)
        lot = data.draw(st.integers(0, lender.table.geometry.blocks - 1))
        lender.table.take_back(lot)
        lender.lent.discard(lot)
        for borrower in self.borrowers:
            self.lose(borrower, lambda place: place == (name, lot))
        if again:  # before anybody has looked
            lender.table.offer(np.array([lot]))
            lender.lent.add(lot)

    # ------------------------------------------------------------------ the borrowers

    @rule(data=st.data(), count=st.integers(1, 12))
    def take(self, data: st.DataObject, count: int) -> None:
        borrower = data.draw(st.sampled_from(self.borrowers))
        found = borrower.slots.take(count).tolist()
        assert len(set(found)) == len(found) <= count
        assert not borrower.held & set(found), "a slot is taken twice, or before it was told as lost"
        for slot, (name, recipe, row) in self.located(borrower, found).items():
            per_block = self.cut(borrower, name).per_block
            borrower.held.add(slot)
            borrower.lots[slot] = {(name, lot) for lot in np.unique(recipe.chunks[row] // per_block).tolist()}
            if not self.valid(borrower, name, recipe, row):
                borrower.dead.add(slot)  # lost before it was taken

    @rule(data=st.data())
    def take_all(self, data: st.DataObject) -> None:
        """Nothing that is on offer stays unused."""
        borrower = data.draw(st.sampled_from(self.borrowers))
        self.look(borrower)
        for slot, (name, recipe, row) in self.located(borrower, borrower.slots.take(CAPACITY).tolist()).items():
            borrower.held.add(slot)
            lots = np.unique(recipe.chunks[row] // self.cut(borrower, name).per_block)
            borrower.lots[slot] = {(name, lot) for lot in lots.tolist()}
        for lender in borrower.slots._lenders:
            if not lender.table.closed:
                assert len(lender.loose) < lender.slot_chunks
                assert not ((lender.table.epoch % 2 == 1) & (lender.table.holder == 0)).any()

    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        borrower = data.draw(st.sampled_from(self.borrowers))
        if borrower.held:
            slots = data.draw(st.lists(st.sampled_from(sorted(borrower.held)), unique=True))
            borrower.slots.give(np.array(slots, dtype=np.int64))
            borrower.held -= set(slots)
            borrower.dead -= set(slots)

    @rule(data=st.data())
    def a_borrower_looks(self, data: st.DataObject) -> None:
        self.look(data.draw(st.sampled_from(self.borrowers)))

    def look(self, borrower: Borrower) -> None:
        lost = borrower.slots.lost().tolist()
        assert sorted(lost) == sorted(borrower.dead), "each lost slot is told once"
        borrower.held -= borrower.dead
        borrower.dead = set()
        assert not len(borrower.slots.lost())

    @precondition(lambda self: self.lenders)
    @rule(data=st.data())
    def reattach(self, data: st.DataObject) -> None:
        """The same table again: what was borrowed through the old view is lost, until the lender reaps it."""
        name, lender = self.pick(data)
        borrower = data.draw(st.sampled_from(self.borrowers))
        self.attach(borrower, name)
        number = borrower.slots._number
        others = [other.slots._number for other in self.borrowers if other is not borrower]
        lender.table.reap(others)
        assert number not in lender.table.holder.tolist()

    @rule(data=st.data(), borrowers=st.integers(1, 3))
    def share(self, data: st.DataObject, borrowers: int) -> None:
        borrower = data.draw(st.sampled_from(self.borrowers))
        borrower.slots.share_with(borrowers)
        if borrowers > 1:
            self.take(data, 5)
            borrower.slots.share_with(1)

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def books_add_up(self) -> None:
        for borrower in self.borrowers:
            borrower.slots.check_integrity()
            assert borrower.slots.stats().used == len(borrower.held)
        for lender in self.lenders.values():
            lender.table.check_integrity()

    @invariant()
    def valid_slots_are_apart_and_inside_what_is_lent(self) -> None:
        used: dict[tuple[str, int, int, int], set[int]] = {}
        for borrower in self.borrowers:
            for slot, (name, recipe, row) in self.located(borrower, sorted(borrower.held)).items():
                valid = self.valid(borrower, name, recipe, row)
                assert valid == (slot not in borrower.dead), (
                    "a slot is lost if and only if one of its lots was taken back"
                )
                if not valid:
                    continue
                cut, table = self.cut(borrower, name), borrower.tables[name]
                chunks = recipe.chunks[row]
                assert chunks.shape == (self.ranks, cut.per_rank)
                assert cut.per_rank * cut.chunk_bytes >= self.shard_bytes
                assert set(np.unique(chunks // cut.per_block).tolist()) <= self.lenders[name].lent
                ranks, units, pages, offsets = cut.places(chunks.ravel(), table)
                assert (offsets + cut.chunk_bytes <= cut.lender.page_bytes).all()
                assert (pages < cut.lender.unit_pages).all()
                for rank, unit, page, offset in zip(*(x.tolist() for x in (ranks, units, pages, offsets)), strict=True):
                    pieces = range(offset, offset + cut.chunk_bytes, 64 if cut.chunk_bytes % 64 == 0 else 1)
                    others = used.setdefault((name, rank, unit, page), set())
                    assert others.isdisjoint(pieces), "two slots have bytes in common"
                    others.update(pieces)

    def teardown(self) -> None:
        for borrower in self.borrowers:
            number = borrower.slots._number
            borrower.slots.close()
            for lender in self.lenders.values():
                assert number not in lender.table.holder.tolist() or number in lender.table.holder
        for lender in self.lenders.values():
            lender.table.close()
            os.close(lender.fd)

    # ------------------------------------------------------------------

    def pick(self, data: st.DataObject) -> tuple[str, Lender]:
        name = data.draw(st.sampled_from(sorted(self.lenders)))
        return name, self.lenders[name]

    def cut(self, borrower: Borrower, name: str) -> ChunkGeometry:
        return next(lender.cut for lender in borrower.slots._lenders if lender.name == name)

    def located(self, borrower: Borrower, slots: list[int]) -> dict[int, tuple[str, LentChunks, int]]:
        found: dict[int, tuple[str, LentChunks, int]] = {}
        for positions, recipe in borrower.slots.locate(np.array(slots, dtype=np.int64)):
            assert recipe is not None
            for row, position in enumerate(positions.tolist()):
                assert slots[position] not in found
                found[slots[position]] = (recipe.lender, recipe, row)
        assert sorted(found) == sorted(slots), "not all slots are located"
        return found

    def valid(self, borrower: Borrower, name: str, recipe: LentChunks, row: int) -> bool:
        """As a worker finds out."""
        if not name:
            return False
        lots = recipe.chunks[row].ravel() // self.cut(borrower, name).per_block
        return borrower.tables[name].valid(lots, recipe.epochs[row].ravel())


@pytest.mark.parametrize(("shard_bytes", "ranks"), [(100, 1), (700, 1), (300, 2)])
@pytest.mark.parametrize("borrowers", [1, 2])
def test_slots_are_apart_and_every_loss_is_told_once(borrowers: int, shard_bytes: int, ranks: int) -> None:
    run_state_machine_as_test(
        lambda: Lives(borrowers, shard_bytes, ranks),
        settings=examples(40, steps=40, derandomize=True),
    )


@pytest.mark.parametrize("shard_bytes", [1, 64, 100, 256, 257, 700, 5000])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_chunks_cover_a_lot_without_overlap_and_waste_less_than_one_a_rank(name: str, shard_bytes: int) -> None:
    lender = make_table(name)
    cut = ChunkGeometry.of(GEOMETRIES[name], shard_bytes)
    shape = cut.lender
    assert 0 <= cut.per_rank * cut.chunk_bytes - shard_bytes < cut.chunk_bytes
    ranks, units, pages, offsets = cut.places(np.arange(shape.blocks * cut.per_block), lender.table)
    begin = ((ranks * shape.units + units) * shape.unit_pages + pages) * shape.page_bytes + offsets
    begin.sort()
    assert (np.diff(begin) >= cut.chunk_bytes).all()
    assert cut.parts * cut.chunk_bytes <= shape.granule_bytes
    lender.table.close()
    os.close(lender.fd)


def test_lenders_beyond_the_capacity_are_passed_over_and_closed() -> None:
    slots = PeerSlots(name="peer", number=1, shard_bytes=512, ranks=1, capacity=8)
    small, large = make_table("small"), make_table("large")
    slots.attach("small", LendingTable(small.fd))
    view = LendingTable(large.fd)
    slots.attach("large", view)
    assert slots.lenders == ["small"]
    assert view._fd == -1
    slots.close()
    for lender in (small, large):
        lender.table.close()
        os.close(lender.fd)
