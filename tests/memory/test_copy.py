"""The copy engine keeps the promises of the essay at the top of polder/memory/copy.py."""

from __future__ import annotations

import contextlib
import os
import threading
import time

import numpy as np
import pytest

from polder.emulation.backends import FaultyBackend
from polder.errors import EnvironmentFault, IntegrityError
from polder.memory import _libc
from polder.memory.copy import CopyEngine
from tests.memory.machines import Machine


def addresses(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.uint64)


def test_copies_follow_one_another_in_order(machine: Machine) -> None:
    """Each of them reads what the one before has written."""
    with machine.pages(12) as handles, machine.span(12) as span:
        span.map(range(12), handles)
        machine.fill(span.address(0), 1, 12 * machine.page)
        machine.fill(span.address(0), 77)
        with contextlib.closing(CopyEngine(machine.backend)) as copies:
            tickets = [
                copies.submit(addresses(span.address(i + 1)), addresses(span.address(i)), machine.page)
                for i in range(11)
            ]
            assert tickets == list(range(1, 12))
            copies.wait(tickets[-1])
            assert all(copies.done(ticket) for ticket in tickets)
        assert machine.bytes(span.address(11)) == {77}


def test_blocks_land_where_their_ids_say(machine: Machine) -> None:
    block = machine.page // 4
    with machine.pages(4) as handles, machine.span(4) as span:
        span.map(range(4), handles)
        for i in range(8):
            machine.fill(span.address(0) + i * block, i, block)
        base = span.address(0)
        with contextlib.closing(CopyEngine(machine.backend)) as copies:
            ids = np.array([3, 4, 5, 0])
            copies.wait(copies.submit_blocks(base, block, ids + 8, base, block, ids, block))
            statistics = copies.statistics()
        assert [machine.bytes(base + (8 + i) * block, block) for i in ids.tolist()] == [{3}, {4}, {5}, {0}]
        assert statistics.runs == 2


def test_pieces_are_merged_only_where_both_sides_go_on(cpu: Machine) -> None:
    with cpu.pages(1) as handles, cpu.span(1) as span:
        span.map([0], handles)
        base = span.address(0)
        with contextlib.closing(CopyEngine(cpu.backend)) as copies:
            src = addresses(0, 10, 20, 30, 45, 55) + np.uint64(base)
            dst = addresses(500, 510, 521, 531, 541, 551) + np.uint64(base)
            copies.wait(copies.submit(dst, src, np.array([10, 10, 10, 10, 10, 0])))
            assert copies.statistics().runs == 3
            empty = np.empty(0, dtype=np.uint64)
            copies.wait(copies.submit(empty, empty, 100))
            copies.wait(0)
            assert copies.statistics().runs == 3


def test_an_error_appears_at_wait_and_spoils_nothing_else(machine: Machine) -> None:
    faulty = FaultyBackend(machine.backend, {"copy": {2}})
    with machine.pages(4) as handles, machine.span(4) as span:
        span.map(range(4), handles)
        machine.fill(span.address(0), 1)
        machine.fill(span.address(1), 0, 3 * machine.page)
        copies = CopyEngine(faulty)
        first, second, third = (
            copies.submit(addresses(span.address(i)), addresses(span.address(0)), machine.page) for i in (1, 2, 3)
        )
        copies.wait(first)
        for _ in range(2):
            with pytest.raises(EnvironmentFault, match="copy 2 failed: injected"):
                copies.wait(second)
        copies.wait(third)
        copies.close()
        assert [machine.bytes(span.address(i)) for i in (1, 2, 3)] == [{1}, {0}, {1}]
        statistics = copies.statistics()
        assert (statistics.failed, statistics.pending) == (1, 0)


def test_an_error_appears_at_a_later_wait_or_at_close(machine: Machine) -> None:
    faulty = FaultyBackend(machine.backend, {"copy": {1, 3}})
    copies = CopyEngine(faulty)
    nothing = np.empty(0, dtype=np.uint64)
    tickets = [copies.submit(nothing, nothing, 1) for _ in range(3)]
    with pytest.raises(EnvironmentFault, match="copy 1 failed"):
        copies.wait(tickets[1])
    copies.wait(tickets[1])
    with pytest.raises(EnvironmentFault, match="copy 3 failed"):
        copies.close()
    copies.close()


def test_a_copy_that_the_driver_refuses_is_an_error_at_wait(fake: Machine) -> None:
    with fake.span(4) as span, contextlib.closing(CopyEngine(fake.backend)) as copies:
        ticket = copies.submit(addresses(span.address(1)), addresses(span.address(0)), fake.page)
        with pytest.raises(EnvironmentFault, match="cuMemcpyAsync: CUDA_ERROR_INVALID_VALUE"):
            copies.wait(ticket)
        apart = addresses(span.address(1), span.address(3))
        ticket = copies.submit(apart, apart - np.uint64(fake.page), fake.page // 2)
        with pytest.raises(EnvironmentFault, match="cuMemcpyBatchAsync"):
            copies.wait(ticket)


def test_many_threads_may_wait_while_copies_run(cpu: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), _libc.copy_bytes
    monkeypatch.setattr(_libc, "copy_bytes", lambda *a: (gate.wait(30), real(*a)))
    with cpu.pages(2) as handles, cpu.span(2) as span:
        span.map([0, 1], handles)
        cpu.fill(span.address(0), 5)
        with contextlib.closing(CopyEngine(cpu.backend)) as copies:
            tickets = [
                copies.submit(addresses(span.address(1)), addresses(span.address(0)), cpu.page) for _ in range(6)
            ]
            assert not any(copies.done(ticket) for ticket in tickets)
            returned: list[int] = []

            def wait(ticket: int) -> None:
                copies.wait(ticket)
                assert copies.done(ticket)
                returned.append(ticket)

            threads = [threading.Thread(target=wait, args=(ticket,)) for ticket in [*tickets, *tickets]]
            for thread in threads:
                thread.start()
            time.sleep(0.05)
            assert returned == []
            gate.set()
            for thread in threads:
                thread.join()
            assert sorted(returned) == sorted([*tickets, *tickets])
            statistics = copies.statistics()
        assert statistics.pending == 0
        assert statistics.busy_seconds > 0
        assert cpu.bytes(span.address(1)) == {5}


def test_done_copies_pile_up_nowhere(cpu: Machine) -> None:
    nothing = np.empty(0, dtype=np.uint64)
    with contextlib.closing(CopyEngine(cpu.backend)) as copies:
        for _ in range(2000):
            ticket = copies.submit(nothing, nothing, 1)
        copies.wait(ticket)
        assert len(copies._pending) == 0


def test_impossible_submissions_are_refused(machine: Machine) -> None:
    copies = CopyEngine(machine.backend)
    with pytest.raises(IntegrityError, match="1 sources, 2 destinations"):
        copies.submit(addresses(1, 2), addresses(1), 10)
    with pytest.raises(IntegrityError, match="never given out"):
        copies.wait(1)
    copies.close()
    with pytest.raises(IntegrityError, match="closed"):
        copies.submit(addresses(1), addresses(1), 10)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core: there is no other to go to")
def test_a_copying_thread_leaves_the_core_that_its_maker_is_bound_to(cpu: Machine) -> None:
    allowed, others = os.sched_getaffinity(0), set(threading.enumerate())
    with cpu.pages(2) as handles, cpu.span(2) as span, contextlib.closing(CopyEngine(cpu.backend)) as copies:
        span.map(range(2), handles)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            copies.wait(copies.submit(addresses(span.address(1)), addresses(span.address(0)), cpu.page))
        finally:
            os.sched_setaffinity(0, allowed)
        started = set(threading.enumerate()) - others
        [thread] = [each for each in started if each.name.startswith("polder-copy")]
        assert thread.native_id is not None
        assert os.sched_getaffinity(thread.native_id) == allowed
