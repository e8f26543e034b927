"""The disk store: what it vouches for is what was written, it keeps its limit, and it is there again after a restart."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from polder.diskstore.aio import AioEngine
from polder.diskstore.engine import ThreadEngine
from polder.diskstore.index import empty_records
from polder.diskstore.io import Arena, IoEngine
from polder.diskstore.keys import KeyTable, distinct, key_array
from polder.diskstore.layout import index_pages, plan_layout, read_meta, usage_bytes
from polder.diskstore.slots import SlotBook
from polder.errors import BudgetError, ConfigError, IntegrityError
from tests.conftest import examples
from tests.diskstore.pages import PAGE, PARTS, Shelf, content, names

SMALL = 4 << 20  # 29 slots


# ---------------------------------------------------------------- keys, slots


def test_a_table_finds_what_was_added_and_not_removed() -> None:
    chance = np.random.default_rng(0)
    keys = chance.integers(0, 40, (3000, 2)).astype(np.uint64)  # many share a half
    keys = keys[distinct(keys)]
    table, held = KeyTable(keys), np.zeros(len(keys), dtype=np.bool_)
    for _ in range(300):
        some = chance.permutation(len(keys))[: chance.integers(0, 60)]
        table.remove(some[held[some]])
        table.add(some[~held[some]])
        held[some] ^= True
        assert np.array_equal(table.find(keys), np.where(held, np.arange(len(keys)), -1))
    with pytest.raises(IntegrityError):
        table.remove(np.flatnonzero(~held)[:1])


def test_a_table_over_no_rows_finds_nothing() -> None:
    table, nothing = KeyTable(np.empty((0, 2), dtype=np.uint64)), np.empty(0, dtype=np.int64)
    table.add(nothing)
    table.remove(nothing)
    assert table.find(names(range(5))).tolist() == [-1] * 5
    assert table.find(names([])).tolist() == []


def test_keys_have_16_bytes() -> None:
    assert len(names([1, 2])) == 2
    with pytest.raises(ConfigError, match="a key has 3 bytes"):
        key_array([b"abc"])


def test_the_least_recently_used_page_goes_first() -> None:
    book, chance, order = SlotBook(empty_records(50, 1)), np.random.default_rng(1), list[int]()
    for number in range(1, 400):
        slots = book.take(1)
        gone = [n for n in order if book.find(names([n]))[0] < 0]
        assert gone == (order[:1] if len(order) == 50 else [])
        order = [n for n in order if n not in gone] + [number]
        book.note(slots, names([number]), np.array([number], np.uint64), np.zeros((1, 1), np.uint64))
        book.publish(slots)
        used = order[chance.integers(len(order))]
        book.touch(book.find(names([used])))
        order = [n for n in order if n != used] + [used]
        book.check_integrity()


def test_of_two_records_of_a_page_the_later_one_stays() -> None:
    records = empty_records(3, 1)
    records["key"] = names([5, 5, 6])
    records["generation"] = [7, 9, 8]
    book = SlotBook(records)
    assert book.find(names([5, 6])).tolist() == [1, 2]
    assert book.take(5).tolist() == [0, 1, 2]


# ---------------------------------------------------------------- against a model


class Model(RuleBasedStateMachine):
    """Two disks of 29 slots, reopened at will. A page may be missing, but never be another one's bytes nor an old version."""

    parts = 1
    numbers = st.lists(st.integers(0, 79), min_size=1, max_size=24)

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="polder-store-"))
        self.versions: dict[int, int] = {}
        self.newest = 0
        self.limit = SMALL
        self.open()

    def open(self) -> None:
        self.shelf = Shelf([self.folder / "a", self.folder / "b"], self.limit, pages=24, parts=self.parts)

    @rule(numbers=numbers)
    def write(self, numbers: list[int]) -> None:
        for number in sorted(set(numbers)):
            version = self.versions.setdefault(number, self.newest)
            assert self.shelf.write([number], version).all()

    @rule(numbers=numbers, disk=st.integers(0, 1))
    def write_batch_to(self, numbers: list[int], disk: int) -> None:
        numbers = [n for n in numbers if self.versions.get(n, 0) == 0]
        if numbers:
            assert self.shelf.write(numbers, 0, [disk] * len(numbers)).all()
            self.versions.update(dict.fromkeys(numbers, 0))

    @rule(numbers=numbers)
    def read(self, numbers: list[int]) -> None:
        places = self.shelf.store.lookup(names(numbers)).present
        ok = self.shelf.read(numbers)
        assert np.array_equal(ok, places.any(axis=1))
        for row, number in enumerate(numbers):
            if ok[row]:
                assert np.array_equal(self.shelf.target.bytes[row], content(number, self.versions[number]))

    @rule(wanted=st.lists(st.tuples(st.integers(0, 79), st.integers(0, 15)), min_size=1, max_size=24))
    def read_parts(self, wanted: list[tuple[int, int]]) -> None:
        """In any order, some of them of one page, some twice."""
        numbers, parts = [number for number, _ in wanted], [part % self.parts for _, part in wanted]
        places = self.shelf.store.lookup(names(numbers)).present
        ok = self.shelf.read_parts(numbers, parts)
        assert np.array_equal(ok, places.any(axis=1))
        size = PAGE // self.parts
        for row in np.flatnonzero(ok).tolist():
            page = content(numbers[row], self.versions[numbers[row]])
            assert np.array_equal(self.shelf.target.bytes[row, :size], page[parts[row] * size :][:size])

    @rule(numbers=numbers)
    def forget(self, numbers: list[int]) -> None:
        self.shelf.store.forget(names(numbers))
        assert not self.shelf.store.lookup(names(numbers)).present.any()
        self.newest += 1
        for number in numbers:
            self.versions[number] = self.newest

    @rule(numbers=numbers)
    def places_grow_old(self, numbers: list[int]) -> None:
        """Looked up, forgotten, replaced, and only then read."""
        places = self.shelf.store.lookup(names(numbers))
        self.forget(numbers)
        self.write(list(range(40)))
        addresses, last = self.shelf.target.addresses[: len(numbers)], np.full(len(numbers), self.parts - 1)
        assert not self.shelf.store.read(places, addresses).any()
        assert not self.shelf.store.read(places, addresses, parts=last).any()

    @rule()
    def reopen(self) -> None:
        before = self.shelf.store.lookup(names(range(80))).present
        self.shelf.store.close()
        self.open()
        assert np.array_equal(self.shelf.store.lookup(names(range(80))).present, before)

    @precondition(lambda self: self.limit == SMALL)
    @rule()
    def grow(self) -> None:
        self.limit = 2 * SMALL
        self.reopen()

    @precondition(lambda self: self.limit > SMALL)
    @rule()
    def shrink(self) -> None:
        self.limit = SMALL
        self.shelf.store.close()
        self.open()

    @invariant()
    def balanced(self) -> None:
        self.shelf.check()

    def teardown(self) -> None:
        self.shelf.store.close()
        shutil.rmtree(self.folder)


class ModelOfParts(Model):
    parts = 16


TestModel, TestModelOfParts = Model.TestCase, ModelOfParts.TestCase
TestModel.settings = TestModelOfParts.settings = examples(12, steps=14)


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize("parts", [1, PARTS])
def test_a_store_uses_its_limit_and_never_a_byte_more(tmp_path: Path, parts: int) -> None:
    limit = 24 << 20
    shelf = Shelf([tmp_path / "a"], limit, parts=parts)
    for batch in range(12):
        numbers = range(batch * 200, batch * 200 + 200)
        assert shelf.write(numbers).all()
        assert usage_bytes(tmp_path / "a") <= limit
        shelf.store.forget(names(numbers[::7]))
        assert usage_bytes(tmp_path / "a") <= limit
    stats = shelf.store.stats()[0]
    assert stats.used > 0.8 * stats.slots
    assert usage_bytes(tmp_path / "a") > 0.85 * limit
    assert stats.evicted_pages > 1500
    shelf.store.close()
    shelf.check()


def test_a_batch_larger_than_the_disk_is_accepted_as_far_as_it_fits(tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / "a"], SMALL)
    accepted = shelf.write(range(100))
    assert accepted.sum() == shelf.store.stats()[0].slots
    assert np.array_equal(shelf.read(range(100)), accepted)
    shelf.store.close()


@pytest.mark.parametrize("limit", [3 << 20, 100 << 20, 64 << 30, 4 << 40])
@pytest.mark.parametrize(("page_bytes", "parts"), [(PAGE, 1), (PAGE, 16), (4 * PAGE, 64)])
def test_the_plan_of_a_directory_adds_up(limit: int, page_bytes: int, parts: int) -> None:
    layout = plan_layout(limit, page_bytes, parts)
    taken = layout.slab_bytes + 4096 * index_pages(layout.slots, parts)
    assert taken + (2 << 20) < limit < taken + (3 << 20) + layout.slab_bytes // 500


def test_a_limit_or_page_size_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"is the least for one page"):
        Shelf([tmp_path / "a"], 1 << 20)
    for size in (4096, 65537):
        with pytest.raises(ConfigError, match="disks need a multiple of 4096"):
            plan_layout(1 << 30, size)


# ---------------------------------------------------------------- restarts


def test_after_a_restart_the_first_look_up_hits_and_eviction_goes_on_in_order(tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / "a"], SMALL)
    slots = shelf.store.stats()[0].slots
    shelf.write(range(slots))
    assert shelf.read([0, 1]).all()
    shelf.store.close()
    again = Shelf([tmp_path / "a"], SMALL)
    assert again.store.lookup(names(range(slots))).present.all()
    again.write([1000, 1001])
    assert np.flatnonzero(~again.store.lookup(names(range(slots))).present[:, 0]).tolist() == [slots - 2, slots - 1]
    again.store.close()


def test_disks_come_and_go_between_runs_in_any_order(tmp_path: Path) -> None:
    a, b, c = (tmp_path / name for name in "abc")
    shelf = Shelf([a, b])
    assert shelf.write(range(100)).all()
    on_a = shelf.store.lookup(names(range(100))).present[:, 0]
    shelf.store.close()
    without = Shelf([c, a])
    there = without.store.lookup(names(range(100))).present
    assert np.array_equal(there[:, 1], on_a)
    assert without.write(range(100)).all()
    moved = without.store.lookup(names(range(100))).present[:, 0]
    assert not (moved & on_a).any(), "what a has is not written again"
    without.store.close()
    whole = Shelf([b, c, a])
    assert (whole.store.lookup(names(range(100))).present.sum(axis=1) == np.where(on_a, 1, 2)).all()
    ok = whole.read(range(100))
    assert ok.all()
    assert whole.wrong(range(100), ok) == 0
    whole.store.close()


def test_pages_spread_in_proportion_and_stay_when_a_disk_is_added(tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / name for name in "abcd"], SMALL)
    keys, allowed = names(range(8000)), np.ones((8000, 4), dtype=np.bool_)
    four = shelf.store.spread(keys, allowed)
    assert np.abs(np.bincount(four) / 2000 - 1).max() < 0.1
    allowed[:, 3] = False
    three = shelf.store.spread(keys, allowed)
    assert (three[four != 3] == four[four != 3]).all()
    assert (shelf.store.spread(keys, allowed & False) == -1).all()
    shelf.store.close()


# ---------------------------------------------------------------- at the same time


@pytest.mark.parametrize("engine", [ThreadEngine, AioEngine])
def test_threads_that_read_write_and_forget_at_once_see_whole_pages(tmp_path: Path, engine: type[IoEngine]) -> None:
    shelf = Shelf([tmp_path / "a", tmp_path / "b"], SMALL, engine=engine())
    errors: list[BaseException] = []
    wrong: list[int] = []
    until = time.monotonic() + 1.5

    def churn(seed: int) -> None:
        chance, arena = np.random.default_rng(seed), Arena(16, PAGE)
        try:
            while time.monotonic() < until or (shelf.store.evicted < 60 and time.monotonic() < until + 60):
                numbers = chance.permutation(90)[:16].tolist()
                for row, number in enumerate(numbers):
                    arena.bytes[row] = pages[number]
                shelf.store.write(names(numbers), arena.addresses)
                numbers = chance.permutation(90)[:16].tolist()
                ok = shelf.store.read(shelf.store.lookup(names(numbers)), arena.addresses)
                wrong.extend(
                    n
                    for n, row in zip(numbers, range(16), strict=True)
                    if ok[row] and (arena.bytes[row] != pages[n]).any()
                )
                shelf.store.forget(names(numbers[:3]))
        except BaseException as error:
            errors.append(error)

    pages = [content(number) for number in range(90)]
    threads = [threading.Thread(target=churn, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert wrong == []
    stats = shelf.store.stats()
    assert sum(s.evicted_pages for s in stats) > 50
    assert sum(s.corrupt_pages for s in stats) == 0, "nothing is overwritten while it is read"
    shelf.check()
    shelf.store.close()


# ---------------------------------------------------------------- refusals


def test_a_directory_of_another_namespace_or_page_size_is_refused(tmp_path: Path) -> None:
    Shelf([tmp_path / "a"]).store.close()
    with pytest.raises(ConfigError, match="made for namespace 'tests', asked for 'other'"):
        Shelf([tmp_path / "a"], namespace="other")
    meta = tmp_path / "a" / "meta.json"
    text = meta.read_text()
    for old, new, words in (
        ('"format": 1', '"format": 9', "format 9, this Polder knows 1"),
        ("65536", "131072", "made for pages of bytes 131072, asked for 65536"),
        ('"slots"', '"slats"', "cannot be understood"),
    ):
        meta.write_text(text.replace(old, new))
        with pytest.raises(ConfigError, match=words):
            Shelf([tmp_path / "a"])
    meta.write_text(text)
    Shelf([tmp_path / "a"]).store.close()


def test_a_directory_with_something_else_or_named_twice_or_copied_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years")
    with pytest.raises(ConfigError, match=r"is not a Polder disk and holds 'thesis\.tex'"):
        Shelf([tmp_path / "a"])
    with pytest.raises(ConfigError, match="named twice"):
        Shelf([tmp_path / "b", tmp_path / "b"])
    Shelf([tmp_path / "b"]).store.close()
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    with pytest.raises(ConfigError, match="is a copy of"):
        Shelf([tmp_path / "b", tmp_path / "c"])


# ---------------------------------------------------------------- copies, alignment


def test_the_copy_that_was_chosen_is_read_and_another_one_where_it_fails(tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / "a", tmp_path / "b"])
    assert shelf.write(range(20), disks=[0] * 20).all()
    assert shelf.write(range(10), disks=[1] * 10).all()
    assert shelf.read(range(20), disks=[1] * 10 + [0] * 10).all()
    assert [s.read_pages for s in shelf.store.stats()] == [10, 10]
    assert shelf.read(range(4), disks=[-1, 0, -1, 1]).tolist() == [False, True, False, True], "-1: not asked for"
    assert shelf.read(range(12), disks=[1] * 12).all(), "two have no copy there"
    assert shelf.store.forget(names(range(20)), np.array([1] * 20)) == 10
    assert shelf.store.forget(names(range(20))) == 20
    shelf.check()
    shelf.store.close()


def test_memory_that_is_not_aligned_is_served_too(tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / "a"])
    shelf.write(range(6))
    wild = np.zeros((6, PAGE + 24), dtype=np.uint8)
    addresses = wild.ctypes.data + 24 + np.arange(6) * (PAGE + 24)
    assert shelf.store.read(shelf.store.lookup(names(range(6))), addresses).all()
    assert shelf.store.write(names(range(10, 16)), addresses).all()
    ok = shelf.read(range(10, 16))
    assert ok.all()
    assert np.array_equal(shelf.target.bytes[:6], wild[:, 24:])
    assert shelf.wrong(range(6), ok) == 0
    shelf.store.close()
    with pytest.raises(ConfigError, match="an arena of 1 pages of 1000 bytes"):
        Arena(1, 1000)


def test_namespace_and_device_are_noted(tmp_path: Path) -> None:
    shelf = Shelf([tmp_path / "a"])
    meta = read_meta(tmp_path / "a")
    assert meta is not None
    assert (meta.namespace, meta.page_bytes, meta.slots) == ("tests", PAGE, shelf.store.stats()[0].slots)
    assert meta.device == shelf.store.stats()[0].device
    shelf.store.close()
