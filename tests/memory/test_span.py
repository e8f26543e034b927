"""Spans: addresses stay, pages come and go, nothing is left half done."""

from __future__ import annotations

import gc
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from polder.emulation.backends import FaultyBackend
from polder.errors import EnvironmentFault, IntegrityError, OutOfPages
from polder.memory.span import Span
from polder.memory.tensor import live_tensors
from tests.memory.machines import Machine


def mapped_ranges(span: Span) -> list[tuple[int, int]]:
    """What the kernel says is mapped inside the span, as (first slot, number of slots) of joined ranges."""
    first, end = span.address(0), span.address(span.slots)
    page = span.address(1) - first
    joined: list[tuple[int, int]] = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= low and high <= end and "memfd:" in line:
            slot, count = (low - first) // page, (high - low) // page
            if joined and sum(joined[-1]) == slot:
                slot, count = joined[-1][0], joined.pop()[1] + count
            joined.append((slot, count))
    return joined


def test_slots_hold_the_pages_they_were_given_in_any_order(machine: Machine) -> None:
    with machine.pages(4) as handles, machine.span(8) as span:
        span.map(range(4), handles)
        for i in range(4):
            machine.fill(span.address(i), i + 1)
        span.unmap(range(4))
        span.map(np.array([7, 1, 2, 0]), handles)
        assert [machine.bytes(span.address(slot)) for slot in (7, 1, 2, 0)] == [{1}, {2}, {3}, {4}]
        assert span.mapped.tolist() == [True, True, True, False, False, False, False, True]


def test_adjacent_slots_are_one_call_however_they_are_ordered(machine: Machine) -> None:
    backend = FaultyBackend(machine.backend)
    with machine.pages(9) as handles, machine.span(32, backend) as span:
        # Three units of three layers: unit by unit as the geometry names them, ten slots from layer to layer.
        span.map([0, 10, 20, 1, 11, 21, 2, 12, 22], handles)
        span.unmap([0, 10, 20, 1, 11, 21, 2, 12, 22])
        assert (backend.calls["map"], backend.calls["unmap"]) == (3, 3)


def test_the_kernel_agrees_with_the_span(cpu: Machine) -> None:
    with cpu.pages(6) as handles, cpu.span(16) as span:
        span.map([3, 4, 5, 9, 15, 0], handles)
        assert mapped_ranges(span) == [(0, 1), (3, 3), (9, 1), (15, 1)]
        span.unmap([4, 15])
        assert mapped_ranges(span) == [(0, 1), (3, 1), (5, 1), (9, 1)]


@pytest.mark.parametrize(
    ("slots", "problem"), [([3, 1], "taken"), ([5, 5], "named twice"), ([8], "span of 8"), ([-1], "span of 8")]
)
def test_a_map_that_cannot_be_changes_nothing(machine: Machine, slots: list[int], problem: str) -> None:
    with machine.pages(4) as handles, machine.span(8) as span:
        span.map([0, 1], handles[:2])
        machine.fill(span.address(0), 1, 2 * machine.page)
        with pytest.raises(IntegrityError, match=problem):
            span.map(slots, handles[2 : 2 + len(slots)])
        with pytest.raises(IntegrityError, match="pages for"):
            span.map([4], handles[2:])
        assert np.flatnonzero(span.mapped).tolist() == [0, 1]
        assert machine.bytes(span.address(0), 2 * machine.page) == {1}


def test_an_empty_slot_is_neither_unmapped_nor_zeroed(machine: Machine) -> None:
    with machine.pages(2) as handles, machine.span(4) as span:
        span.map([0, 1], handles)
        machine.fill(span.address(0), 1, 2 * machine.page)
        for change in (span.unmap, span.zero):
            with pytest.raises(IntegrityError, match="slot 2 is empty"):
                change([0, 1, 2])
        assert machine.bytes(span.address(0), 2 * machine.page) == {1}


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_map_that_fails_leaves_the_span_as_it_was(machine: Machine, nth: int) -> None:
    faulty = FaultyBackend(machine.backend, {"map": {1 + nth}})
    with machine.pages(6) as handles, machine.span(12, faulty) as span:
        span.map([5], handles[:1])
        machine.fill(span.address(5), 9)
        with pytest.raises(OutOfPages, match="injected"):
            span.map([0, 1, 3, 8, 9], handles[1:])
        assert np.flatnonzero(span.mapped).tolist() == [5]
        assert machine.bytes(span.address(5)) == {9}
        span.map([0, 1, 3, 8, 9], handles[1:])
        assert faulty.calls["unmap"] == nth - 1


def test_an_unmap_that_fails_half_way_says_what_is_left(machine: Machine) -> None:
    faulty = FaultyBackend(machine.backend, {"unmap": {2}}, EnvironmentFault)
    with machine.pages(3) as handles, machine.span(6, faulty) as span:
        span.map([0, 2, 4], handles)
        with pytest.raises(EnvironmentFault, match="injected"):
            span.unmap([0, 2, 4])
        assert np.flatnonzero(span.mapped).tolist() == [2, 4]


def test_the_mask_cannot_be_written(cpu: Machine) -> None:
    with cpu.span(2) as span, pytest.raises(ValueError, match="read-only"):
        span.mapped[0] = True


def test_a_closed_span_refuses_everything_and_gives_its_addresses_back(machine: Machine) -> None:
    with machine.pages(1) as handles:
        faulty = FaultyBackend(machine.backend)
        span = Span(faulty, 4)
        span.map([2], handles)
        span.close()
        span.close()
        assert (faulty.calls["unmap"], faulty.calls["free"]) == (1, 1)
        for use in (lambda: span.map([0], handles), lambda: span.address(0), span.tensor):
            with pytest.raises(IntegrityError, match="closed"):
                use()


def test_a_forgotten_span_gives_everything_back(machine: Machine) -> None:
    with machine.pages(1) as handles:
        faulty = FaultyBackend(machine.backend)
        span = Span(faulty, 4)
        span.map([2], handles)
        del span
        gc.collect()
        assert (faulty.calls["unmap"], faulty.calls["free"]) == (0, 0), "nothing happens inside the collector"
        Span(faulty, 4).close()
        assert (faulty.calls["unmap"], faulty.calls["free"]) == (1, 2)


_COLLECTED_ANYWHERE = """
import contextvars, gc, numpy as np
from polder.memory.cpu import CpuBackend
from polder.memory.span import Span

others = [contextvars.ContextVar(str(n)) for n in range(40)]
for variable in others:
    variable.set(0)
backend = CpuBackend(page_bytes=4096)
handles = backend.create(1)
gc.set_threshold(1)
for _ in range(3000):
    span = Span(backend, 1)
    span.map([0], handles)
    span.itself = span
    del span
    with np.errstate(over="ignore"):  # CPython 3.11 frees what a numpy ufunc, run by the collector in here, still uses
        pass
    backend.create(1)  # with the backend's lock held
gc.collect()
Span(backend, 1).close()
assert not backend.dropped
print("ended well")
"""


def test_spans_may_be_collected_at_any_moment() -> None:
    command = [sys.executable, "-X", "faulthandler", "-c", _COLLECTED_ANYWHERE]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "ended well\n", done.stderr


def test_tensors_follow_remapping_and_are_made_once(machine: Machine) -> None:
    with machine.pages(2) as handles, machine.span(4) as span:
        tensor = span.tensor()
        assert span.tensor() is tensor
        assert (tensor.numel(), str(tensor.dtype)) == (4 * machine.page, "torch.int8")
        rows = tensor.view(4, -1)
        span.map([1, 2], handles)
        rows[1] = 1
        rows[2] = 2
        span.unmap([1, 2])
        span.map([3, 0], handles)
        assert (int(rows[3].min()), int(rows[0].max())) == (1, 2)
        del tensor, rows


def test_addresses_stay_reserved_until_the_last_tensor_is_gone(machine: Machine) -> None:
    faulty = FaultyBackend(machine.backend)
    alive = live_tensors()
    span = Span(faulty, 4)
    view = span.tensor()[machine.page :].view(-1)
    span.close()
    gc.collect()
    assert (live_tensors(), faulty.calls["free"]) == (alive + 1, 0)
    del view
    gc.collect()
    Span(faulty, 1).close()
    assert (live_tensors(), faulty.calls["free"]) == (alive, 2)
