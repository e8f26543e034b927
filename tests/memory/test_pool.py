"""Pages by number, on the broker's side and on the worker's."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from polder.emulation.backends import FaultyBackend, seeded_faults
from polder.errors import IntegrityError, OutOfPages, ProtocolError
from polder.memory.pool import ImportedPages, PagePool
from tests.memory.machines import Machine


@pytest.fixture
def pool(machine: Machine) -> Iterator[PagePool]:
    pool = PagePool(machine.backend, 8)
    yield pool
    pool.check_integrity()
    pool.close()


def handed(pool: PagePool, imported: ImportedPages, generation: int, pages: list[int]) -> None:
    fds, fd_index, offsets = pool.export(pages)
    imported.adopt(generation, pages, fds, fd_index, offsets)
    for fd in fds:
        os.close(fd)


def test_a_page_is_the_same_memory_whenever_it_is_asked_for(machine: Machine, pool: PagePool) -> None:
    assert pool.handles([5, 2, 5]) == [pool.handles([5])[0], pool.handles([2])[0], pool.handles([5])[0]]
    assert len(set(pool.handles(range(8)))) == 8
    pool.check_integrity()


def test_cuda_pages_are_made_when_wanted_and_cpu_pages_at_once(machine: Machine, pool: PagePool) -> None:
    assert len(pool.unmade()) == (0 if machine.kind == "cpu" else 8)
    pool.handles([1, 2])
    assert len(pool.unmade()) == (0 if machine.kind == "cpu" else 6)
    assert pool.total_pages == 8


def test_when_memory_is_short_no_page_is_made(fake: Machine) -> None:
    pool = PagePool(fake.backend, 100)
    pool.handles([0, 1])
    with pytest.raises(OutOfPages):
        pool.handles(range(100))
    assert len(pool.unmade()) == 98
    pool.close()


@pytest.mark.parametrize("pages", [[-1], [8], [0, 100]])
def test_pages_that_are_not_there_are_refused(pool: PagePool, pages: list[int]) -> None:
    for use in (pool.handles, pool.export, pool.make):
        with pytest.raises(IntegrityError, match="pool of 8"):
            use(pages)


def test_closing_a_pool_leaves_its_pages_to_those_who_hold_them(machine: Machine, pool: PagePool) -> None:
    other = machine.another()
    imported = ImportedPages(other)
    handed(pool, imported, 1, [3])
    with machine.span(1, other) as span:
        span.map([0], imported.handles(1, [3]))
        machine.fill(span.address(0), 5)
        pool.close()
        assert machine.bytes(span.address(0)) == {5}
    imported.close()


def test_adopted_pages_are_known_by_generation_and_number(machine: Machine, pool: PagePool) -> None:
    imported = ImportedPages(machine.another())
    assert imported.missing(1, [3, 1, 2]) == [3, 1, 2]
    handed(pool, imported, 1, [3, 1])
    assert imported.missing(1, [3, 1, 2]) == [2]
    assert imported.missing(2, [3, 1, 2]) == [3, 1, 2]
    with pytest.raises(IntegrityError, match="page 2 of generation 1"):
        imported.handles(1, [3, 2])
    handed(pool, imported, 1, [2])
    assert len(set(imported.handles(1, [1, 2, 3]))) == 3
    imported.check_integrity()
    imported.close()


def test_what_does_not_fit_is_adopted_not_even_in_part(machine: Machine, pool: PagePool) -> None:
    imported = ImportedPages(machine.another())
    handed(pool, imported, 1, [0])
    fds, fd_index, offsets = pool.export([0, 1])
    for pages, index in (([0, 1], fd_index), ([1], fd_index), ([1, 1], fd_index), ([1, 2], [0, 99])):
        with pytest.raises(ProtocolError):
            imported.adopt(1, pages, fds, index, offsets)
    for fd in fds:
        os.close(fd)
    assert imported.missing(1, [0, 1, 2]) == [1, 2]
    imported.close()


def test_pages_of_a_former_broker_are_destroyed_by_their_last_owner(machine: Machine, pool: PagePool) -> None:
    other = machine.another()
    imported = ImportedPages(other)
    handed(pool, imported, 1, [0, 1])
    with machine.span(2, other) as span:
        span.map([0, 1], imported.handles(1, [0, 1]))
        machine.fill(span.address(0), 1, 2 * machine.page)
        pool.close()  # the broker is gone
        assert other.resident_bytes() == 2 * machine.page
        span.unmap([0])
        imported.discard(1, [0])
        assert other.resident_bytes() == machine.page
        with pytest.raises(IntegrityError, match="was not adopted"):
            imported.discard(1, [0, 1])
        assert machine.bytes(span.address(1)) == {1}
        span.unmap([1])
        imported.discard(1, [1])
    assert other.resident_bytes() == 0
    assert imported.missing(1, [0, 1]) == [0, 1]


def test_a_failed_adoption_can_be_tried_again(machine: Machine, pool: PagePool) -> None:
    imported = ImportedPages(FaultyBackend(machine.another(), {"adopt_many": {1}}))
    with pytest.raises(OutOfPages):
        imported.adopt(1, [0], [], [0], [0])
    handed(pool, imported, 1, [0])
    imported.close()


def test_seeded_faults_are_the_same_for_a_seed() -> None:
    rates = {"map": 0.1, "zero": 0.5}
    faults = seeded_faults(7, rates)
    assert faults == seeded_faults(7, rates)
    assert faults != seeded_faults(8, rates)
    assert 50 < len(faults["map"]) < 150
