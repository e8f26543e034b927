"""Random lives of a pool and two spans over it, against a model: what is mapped where, and what every page holds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from polder.emulation.backends import FaultyBackend
from polder.errors import IntegrityError, OutOfPages
from polder.memory.copy import CopyEngine
from polder.memory.pool import PagePool
from polder.memory.span import Span
from tests.conftest import examples
from tests.memory.machines import Machine
from tests.memory.test_span import mapped_ranges

PAGES, SLOTS = 8, 10
UNKNOWN = -1

Place = tuple[int, int]  # span, slot


class Lives(RuleBasedStateMachine):
    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.machine = machine
        self.backend = FaultyBackend(machine.backend)
        self.pool = PagePool(self.backend, PAGES)
        self.spans = [Span(self.backend, SLOTS), Span(self.backend, SLOTS)]
        self.copies = CopyEngine(self.backend)
        self.page_at: dict[Place, int] = {}
        self.holds = [0 if self.backend.sparse else UNKNOWN] * PAGES

    # ------------------------------------------------------------------ what may happen

    @rule(data=st.data(), which=st.integers(0, 1))
    def map(self, data: st.DataObject, which: int) -> None:
        slots, pages = self.some_free(data, which)
        self.spans[which].map(slots, self.pool.handles(pages))
        self.page_at.update({(which, slot): page for slot, page in zip(slots, pages, strict=True)})

    @rule(data=st.data(), which=st.integers(0, 1), nth=st.integers(1, 4))
    def map_fails(self, data: st.DataObject, which: int, nth: int) -> None:
        slots, pages = self.some_free(data, which)
        handles = self.pool.handles(pages)
        stretches = sum(1 for slot in slots if slot - 1 not in slots)
        self.backend.fail_next("map", nth)
        if nth <= stretches:
            with pytest.raises(OutOfPages):
                self.spans[which].map(slots, handles)
        self.backend.forgive()

    @precondition(lambda self: self.page_at)
    @rule(data=st.data())
    def map_at_a_taken_slot(self, data: st.DataObject) -> None:
        which, slot = data.draw(st.sampled_from(sorted(self.page_at)))
        free = [s for s in range(SLOTS) if (which, s) not in self.page_at][:1]
        with pytest.raises(IntegrityError):
            self.spans[which].map([*free, slot], self.pool.handles([0, 1][: len(free) + 1]))

    @precondition(lambda self: self.page_at)
    @rule(data=st.data())
    def unmap(self, data: st.DataObject) -> None:
        which, slots = self.some_mapped(data)
        self.spans[which].unmap(slots)
        for slot in slots:
            del self.page_at[which, slot]

    @precondition(lambda self: self.page_at)
    @rule(data=st.data())
    def unmap_an_empty_slot(self, data: st.DataObject) -> None:
        which, slots = self.some_mapped(data)
        empty = [s for s in range(SLOTS) if (which, s) not in self.page_at]
        if empty:
            with pytest.raises(IntegrityError):
                self.spans[which].unmap([*slots, empty[0]])

    @precondition(lambda self: self.page_at)
    @rule(data=st.data())
    def zero(self, data: st.DataObject) -> None:
        which, slots = self.some_mapped(data)
        self.spans[which].zero(slots)
        for slot in slots:
            self.holds[self.page_at[which, slot]] = 0

    @precondition(lambda self: self.page_at)
    @rule(data=st.data(), stamp=st.integers(1, 127))
    def write(self, data: st.DataObject, stamp: int) -> None:
        which, slots = self.some_mapped(data)
        self.machine.fill(self.spans[which].address(slots[0]), stamp)
        self.holds[self.page_at[which, slots[0]]] = stamp

    @precondition(lambda self: self.page_at)
    @rule(data=st.data())
    def copy(self, data: st.DataObject) -> None:
        src = data.draw(st.sampled_from(sorted(self.page_at)))
        dst = data.draw(st.sampled_from(sorted(self.page_at)))
        if self.page_at[src] != self.page_at[dst]:
            there, here = (np.array([self.spans[w].address(s)], dtype=np.uint64) for w, s in (dst, src))
            self.copies.wait(self.copies.submit(there, here, self.machine.page))
            self.holds[self.page_at[dst]] = self.holds[self.page_at[src]]

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def books_add_up(self) -> None:
        self.pool.check_integrity()
        for which, span in enumerate(self.spans):
            slots = sorted(slot for w, slot in self.page_at if w == which)
            assert np.flatnonzero(span.mapped).tolist() == slots
            if self.machine.kind != "cuda":
                assert [first + i for first, count in mapped_ranges(span) for i in range(count)] == slots

    @invariant()
    def every_mapped_page_holds_what_was_written(self) -> None:
        for (which, slot), page in self.page_at.items():
            if self.holds[page] != UNKNOWN:
                assert self.machine.bytes(self.spans[which].address(slot)) == {self.holds[page]}

    def teardown(self) -> None:
        self.copies.close()
        for span in self.spans:
            span.close()
        self.pool.close()
        assert self.backend.resident_bytes() == 0

    # ------------------------------------------------------------------ choices

    def some_free(self, data: st.DataObject, which: int) -> tuple[list[int], list[int]]:
        free = [slot for slot in range(SLOTS) if (which, slot) not in self.page_at]
        slots = data.draw(st.lists(st.sampled_from(free), unique=True, max_size=5)) if free else []
        return slots, data.draw(st.lists(st.integers(0, PAGES - 1), min_size=len(slots), max_size=len(slots)))

    def some_mapped(self, data: st.DataObject) -> tuple[int, list[int]]:
        which = data.draw(st.sampled_from(sorted({which for which, _ in self.page_at})))
        mapped = sorted(slot for w, slot in self.page_at if w == which)
        return which, data.draw(st.lists(st.sampled_from(mapped), min_size=1, unique=True))


def test_the_laws_hold_after_every_step(machine: Machine) -> None:
    count, steps = (50, 40) if machine.kind == "cpu" else (15, 20)
    run_state_machine_as_test(
        lambda: Lives(machine),
        settings=examples(count, steps=steps, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]),
    )
