"""What a lender's engine zeroes, offers and stores, on vLLM's own BlockPool and a real table."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")
from polder.broker.wire import Neighbours
from polder.engines.vllm.core.blocks import BlockUnits, BusyBlocks
from polder.engines.vllm.core.lender import Lender, lent_geometry
from polder.engines.vllm.core.lending import Lending as RunningLender
from polder.engines.vllm.rank.geometry import KvGeometry, TensorPlace
from polder.tiers.peer.lending import LendingTable, open_table, table_bytes
from tests.engines.test_blocks import UNIT_BLOCKS, UNITS, Scheduler

PAGE, BLOCK = 4096, 1024
BORROWER = 41
GEOMETRY = KvGeometry(
    page_bytes=PAGE,
    size_bytes=2 * UNITS * PAGE,
    num_blocks=UNITS * UNIT_BLOCKS,
    unit_blocks=UNIT_BLOCKS,
    places=(TensorPlace(offset=0, layers=2, layer_stride=UNITS * PAGE, block_stride=BLOCK),),
)


class Lending:
    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self.pool = self.scheduler.pool
        self.units = BlockUnits(self.scheduler, UNIT_BLOCKS, list(range(UNITS)), BusyBlocks.MOVE)
        self.lender = Lender(self.pool, self.units, GEOMETRY, 1, UNITS * UNIT_BLOCKS * BLOCK * 2)
        self.open()

    def open(self) -> None:
        """A table, and a borrower's view of it."""
        fd = os.memfd_create("table")
        os.ftruncate(fd, table_bytes(lent_geometry(GEOMETRY, 1)))
        borrowers = os.dup(fd)
        self.lender.open(fd, {unit: [[2 * unit, 2 * unit + 1]] for unit in range(UNITS)})
        self.table = open_table(borrowers)

    def lend(self, count: int) -> list[int]:
        """Offers blocks, and a borrower writes into all of them."""
        self.lender._offer(count)
        blocks, epochs = self.table.claim(BORROWER, count)
        with self.table.writing(BORROWER, blocks.tolist(), epochs.tolist()) as ours:
            assert ours
        return sorted(blocks.tolist())

    def use_all(self) -> list[int]:
        """Hands all free blocks out. Returns those that are zeroed."""
        self.pool.get_new_blocks(self.pool.get_num_free_blocks())
        return sorted(self.lender.take_dirty())


@pytest.fixture
def lending() -> Iterator[Lending]:
    lending = Lending()
    yield lending
    lending.lender.close()
    lending.table.close()


def test_a_block_that_was_borrowed_is_zeroed_before_it_is_used(lending: Lending) -> None:
    lent = lending.lend(4)
    assert lending.use_all() == lent


def retire(lending: Lending) -> None:
    broker = LendingTable(lending.table._fd)
    broker.retire()
    broker.close()


@pytest.mark.parametrize(
    "let_go",
    [
        lambda lending: lending.lender.on_neighbours(Neighbours(lenders=[], pids=[], cores=[])),
        lambda lending: lending.table.release(BORROWER, np.flatnonzero(lending.table.holder)),
        retire,
    ],
    ids=["the borrower is gone", "the borrower has released them", "the broker ends"],
)
def test_a_block_that_was_written_is_zeroed_whoever_has_let_go_of_it(
    lending: Lending, let_go: Callable[[Lending], None]
) -> None:
    lent = lending.lend(4)
    let_go(lending)
    assert lending.use_all() == lent
    assert not lending.lender.take_dirty()


def test_a_block_that_nobody_wrote_is_not_zeroed(lending: Lending) -> None:
    lending.lender._offer(4)
    lending.table.claim(BORROWER, 2)
    assert not lending.use_all()


def test_what_has_moved_to_a_block_that_was_lent_is_not_zeroed(lending: Lending) -> None:
    """Lent blocks are free and empty, so those of a running request move there when units are given up."""
    held = lending.pool.get_new_blocks(UNIT_BLOCKS)  # of the lowest units
    others = lending.pool.get_new_blocks(lending.pool.get_num_free_blocks())
    lending.scheduler.requests["r"] = others[-2:]
    lending.pool.free_blocks([*held, *others[:-2]])
    lent = set(lending.lend(lending.pool.get_num_free_blocks()))
    plan = lending.units.shrink(UNITS - 1, 1).plan
    targets = set(plan.targets.tolist())
    assert targets, "nothing has moved: the test shows nothing"
    assert targets <= lent
    assert not targets & set(lending.lender.take_dirty())
    lending.units.check_integrity()


def test_blocks_of_units_that_are_gone_are_not_zeroed(lending: Lending) -> None:
    lending.lend(lending.pool.get_num_free_blocks())
    gone = lending.units.shrink(2, 1).plan.units.tolist()
    assert not {block // UNIT_BLOCKS for block in lending.lender.take_dirty()} & set(gone)


def test_a_block_that_a_store_reads_is_not_lent(lending: Lending) -> None:
    reading = {block.block_id for block in lending.pool.free_block_queue.get_all_free_blocks()[:3]}
    lending.units.holders._connector = SimpleNamespace(blocks_in_transfer=lambda: reading)
    assert not reading & set(lending.lend(lending.pool.get_num_free_blocks()))


def test_who_would_store_a_block_that_is_lent_is_told(lending: Lending) -> None:
    told: list[int] = []
    lending.units.holders.register(lambda new: told.extend(i for i, now in enumerate(new.tolist()) if i and not now))
    lent = lending.lend(5)
    assert sorted(told) == lent


def test_blocks_that_were_lent_when_the_broker_was_replaced_are_zeroed(lending: Lending) -> None:
    lent = lending.lend(4)
    lending.lender.close()  # a new broker knows nothing of the table
    assert sorted(lending.lender.take_dirty()) == lent
    assert not lending.lender._offered
    lending.lender.check_integrity()


def test_after_a_broker_only_units_of_its_successor_are_lent(lending: Lending, short_dir: Path) -> None:
    """It would make new pages, beyond its budget, for the numbers that it was told of the old ones."""
    pages = {unit: [[2 * unit, 2 * unit + 1]] for unit in range(UNITS)}
    agreement: Any = SimpleNamespace(
        hello=SimpleNamespace(engine="b", devices=["cpu:0"]),
        geometry=GEOMETRY,
        settings=SimpleNamespace(lend_bytes=UNITS * UNIT_BLOCKS * BLOCK * 2),
        socket=short_dir / "nobody",
    )
    lender = RunningLender(
        lending.scheduler,
        lending.units,
        agreement,
        wake=lambda: None,
        workers=None,
        pages=lambda: pages,
        useful_units=lambda now: 0,
    )
    lender._before_offer = lambda free: None
    lender.on_welcome(None, new_broker=True)  # type: ignore[arg-type]
    lender.before_unmap([1, 2])
    fd = os.memfd_create("table")
    os.ftruncate(fd, table_bytes(lent_geometry(GEOMETRY, 1)))
    lender._own_table._fd = fd
    lender.on_wake()
    lender._offer(lending.pool.get_num_free_blocks())
    assert {block // UNIT_BLOCKS for block in lender._offered} == {1, 2}
    lender.close()


def test_a_block_that_is_lent_again_before_it_was_zeroed_is_zeroed_in_the_end(lending: Lending) -> None:
    """Nothing is zeroed while the engine makes no step."""
    lent = lending.lend(4)
    lending.lender.close()
    lending.table.close()
    lending.open()
    lending.lender._offer(lending.pool.get_num_free_blocks())
    assert set(lent) <= lending.lender._offered
    assert lending.use_all() == lent
