"""The half that moves bytes: what is loaded is what was stored, or the row is reported, and nothing raises across."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from polder.emulation.links import EmulatedLink
from polder.emulation.memories import FaultyMemory, PacedMemory
from polder.emulation.options import Faults
from polder.errors import EnvironmentFault
from polder.memory.backend import Mark
from polder.tiers import worker as transfer
from polder.tiers.host import HostMemory
from polder.tiers.jobs import Direction, Job, Mover, Part, PartResult, Pieces, TierMemory, TierState
from polder.tiers.movers import CpuMover, CudaMover, pair
from polder.tiers.worker import TierWorker
from tests.tiers.fakes import ids_of

LAYERS, BYTES, BLOCKS, SLOTS = 4, 512, 16, 32
SLOT_BYTES = LAYERS * BYTES


class Machine:
    """An engine's KV cache, [layers, blocks, bytes], and a host region."""

    def __init__(self, wrap: object = None) -> None:
        self.kv = np.random.default_rng(1).integers(0, 256, (LAYERS, BLOCKS, BYTES), dtype=np.uint8)
        self.region = np.zeros(SLOTS * SLOT_BYTES, dtype=np.uint8)
        memory: TierMemory = HostMemory(self.region.ctypes.data, SLOT_BYTES)
        lanes: dict[tuple[int, Direction], TierMemory] = {(0, "store"): memory, (0, "load"): memory}
        if wrap is not None:
            lanes[0, "load"] = wrap(memory)  # type: ignore[operator]
        self.worker = TierWorker(lanes, CpuMover(), seed=7, capacities={0: SLOTS})
        self._number = 0

    def pieces(self, block: int) -> Pieces:
        return [(self.kv[layer, block].ctypes.data, BYTES) for layer in range(LAYERS)]

    def run(self, direction: Direction, slots: list[int], blocks: list[int], seeds: list[int]) -> dict[int, str]:
        return self.end(self.begin(direction, slots, blocks, seeds))

    def begin(
        self,
        direction: Direction,
        slots: list[int],
        blocks: list[int],
        seeds: list[int],
        after: Mark | None = None,
    ) -> int:
        self._number += 1
        rows = np.arange(len(slots))
        numbers = np.array(slots, dtype=np.int64)
        part = Part(tier=0, rows=rows, blocks=rows, slots=numbers, ids=ids_of(seeds))
        job = Job(number=self._number, direction=direction, parts=(part,))
        self.worker.submit(job, [self.pieces(b) for b in blocks], after)
        return self._number

    def end(self, number: int) -> dict[int, str]:
        self.worker.wait([number])
        (finished,) = self.worker.poll()
        assert finished.number == number
        return dict(finished.failed)


class LateCompute:
    """Compute that was launched and is not done: a mark of it."""

    def __init__(self, error: Exception | None = None) -> None:
        self._over, self._asked, self._error = threading.Event(), threading.Event(), error

    def until_asked(self) -> None:
        assert self._asked.wait(30.0), "nobody waits for this compute"

    def finish(self) -> None:
        self._over.set()

    def done(self) -> bool:
        return self._over.is_set()

    def wait(self) -> None:
        self._asked.set()
        assert self._over.wait(60.0)
        if self._error is not None:
            raise self._error


@pytest.fixture
def machine() -> Iterator[Machine]:
    machine = Machine()
    yield machine
    machine.worker.close()


def test_loads_bring_back_what_was_stored(machine: Machine) -> None:
    before = machine.kv.copy()
    assert machine.run("store", [3, 9, 4], [0, 5, 15], [10, 11, 12]) == {}
    machine.kv[:] = 0
    assert machine.run("load", [4, 3, 9], [15, 0, 5], [12, 10, 11]) == {}
    for block in (0, 5, 15):
        assert np.array_equal(machine.kv[:, block], before[:, block])


def test_what_compute_writes_late_is_what_is_stored(machine: Machine) -> None:
    """The store is submitted while the step that fills the block is under way."""
    compute = LateCompute()
    number = machine.begin("store", [3], [0], [10], after=compute)
    compute.until_asked()
    machine.kv[:, 0] = 77
    compute.finish()
    assert machine.end(number) == {}
    machine.kv[:, 0] = 0
    assert machine.run("load", [3], [0], [10]) == {}
    assert (machine.kv[:, 0] == 77).all()


def test_a_load_overwrites_what_compute_still_writes(machine: Machine) -> None:
    """The block's former owner has ended, and its last step is under way."""
    before = machine.kv[:, 0].copy()
    assert machine.run("store", [3], [0], [10]) == {}
    compute = LateCompute()
    number = machine.begin("load", [3], [5], [10], after=compute)
    compute.until_asked()
    machine.kv[:, 5] = 77
    compute.finish()
    assert machine.end(number) == {}
    assert np.array_equal(machine.kv[:, 5], before)


def test_a_device_that_failed_makes_misses(machine: Machine) -> None:
    compute = LateCompute(EnvironmentFault("illegal address"))
    compute.finish()
    assert machine.end(machine.begin("store", [3, 4], [0, 1], [10, 11], after=compute)) == {0: "error", 1: "error"}


def test_a_load_waits_for_its_own_compute_only(machine: Machine) -> None:
    """A store that waits for a step holds no load up."""
    machine.run("store", [3], [0], [10])
    compute = LateCompute()
    store = machine.begin("store", [4], [1], [11], after=compute)
    assert machine.run("load", [3], [5], [10]) == {}
    compute.finish()
    assert machine.end(store) == {}


def test_a_changed_byte_a_foreign_block_and_an_empty_slot_are_corrupt(machine: Machine) -> None:
    machine.run("store", [1, 2], [0, 1], [10, 11])
    machine.region[2 * SLOT_BYTES + 700] ^= 1
    assert machine.run("load", [1, 2, 5], [2, 3, 4], [10, 11, 12]) == {1: "corrupt", 2: "corrupt"}
    assert machine.run("load", [1], [2], [11]) == {0: "corrupt"}, "right bytes, another block's key"


def test_faults_are_reported_and_what_does_not_fail_is_right() -> None:
    machine = Machine(lambda inner: FaultyMemory(inner, Faults(fail=0.3, corrupt=0.3, seed=3)))
    before = machine.kv.copy()
    machine.run("store", list(range(BLOCKS)), list(range(BLOCKS)), list(range(BLOCKS)))
    machine.kv[:] = 0
    failed = machine.run("load", list(range(BLOCKS)), list(range(BLOCKS)), list(range(BLOCKS)))
    assert {"error", "corrupt"} == set(failed.values())
    for block in set(range(BLOCKS)) - set(failed):
        assert np.array_equal(machine.kv[:, block], before[:, block])
    machine.worker.close()


def test_a_load_does_not_wait_for_stores() -> None:
    gate = threading.Event()

    class Slow(HostMemory):
        def store(self, part: Part, row: int, block: Pieces, mover: Mover) -> bool:
            gate.wait(60.0)
            return super().store(part, row, block, mover)

    machine = Machine()
    machine.run("store", [0], [0], [1])
    machine.worker._memories = dict(machine.worker._memories) | {
        (0, "store"): Slow(machine.region.ctypes.data, SLOT_BYTES)
    }  # type: ignore[dict-item]
    slot = np.array([1], dtype=np.int64)
    part = Part(
        tier=0,
        rows=np.arange(1),
        blocks=np.arange(1),
        slots=slot,
        ids=ids_of([5]),
    )
    machine.worker.submit(Job(number=99, direction="store", parts=(part,)), [machine.pieces(1)])
    assert machine.run("load", [0], [0], [1]) == {}
    gate.set()
    machine.worker.wait([99])
    machine.worker.close()


def test_a_disk_that_keeps_its_lane_keeps_nobody_from_closing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers, begun = threading.Event(), threading.Event()

    class Hanging:
        stopped = closed = False

        def replicate(self, copies: int) -> PartResult:
            begun.set()
            answers.wait(120.0)
            return PartResult(failed={}, size_bytes=0)

        def state(self) -> TierState:
            return TierState(lost=np.empty(0, dtype=np.int64), room=0, gauges={})

        def stop(self) -> None:
            self.stopped = True

        def close(self) -> None:
            self.closed = True

    memory = Hanging()
    monkeypatch.setattr(transfer, "_CLOSE_S", 0.1)
    worker = TierWorker({}, CpuMover(), seed=7, capacities={0: 1}, batches={0: memory})  # type: ignore[dict-item]
    none = np.empty(0, dtype=np.int64)
    part = Part(tier=0, rows=none, slots=none, ids=ids_of([]))
    worker.submit(Job(number=1, direction="replicate", parts=(part,)), [])
    assert begun.wait(60.0)
    started = time.monotonic()
    worker.close()
    assert time.monotonic() - started < 60.0
    assert memory.stopped
    assert memory.closed
    assert "polder-tier0-spill: a disk does not answer" in caplog.text
    answers.set()
    worker.wait([1])


def test_a_job_without_parts_ends_at_once(machine: Machine) -> None:
    machine.worker.submit(Job(number=5, direction="load", parts=()), [])
    machine.worker.wait_all()
    assert [finished.number for finished in machine.worker.poll()] == [5]


def test_an_emulated_link_is_charged_once_a_part() -> None:
    links: list[EmulatedLink] = []

    def wrap(inner: TierMemory) -> TierMemory:
        links.append(EmulatedLink(1e6))
        return PacedMemory(inner, links[0])

    machine = Machine(wrap)
    machine.run("store", [0, 1], [0, 1], [1, 2])
    started = time.perf_counter()
    machine.run("load", [0, 1], [0, 1], [1, 2])
    assert time.perf_counter() - started >= 2 * SLOT_BYTES / 1e6 - 0.001
    machine.worker.close()


def test_a_device_sums_what_the_host_sums_of_the_same_bytes() -> None:
    pytest.importorskip("torch")
    mover = object.__new__(CudaMover)
    mover._backend = type("Cpu", (), {"device": "cpu:0"})()  # type: ignore[assignment]
    memory = np.random.default_rng(3).integers(0, 256, 4096, dtype=np.uint8)
    at = memory.ctypes.data
    pieces = [(at, 512), (at + 512, 1024), (at + 2048, 8)]
    assert mover.checksum(pieces, 2**63 + 5) == mover.checksum_in_host(pieces, 2**63 + 5)
    memory[700] ^= 1
    assert mover.checksum(pieces, 1) == mover.checksum_in_host(pieces, 1) != mover.checksum_in_host(pieces, 2)


def test_pieces_are_cut_where_either_side_has_a_border() -> None:
    assert pair([(100, 6), (200, 10)], [(10, 4), (20, 8)]) == ([100, 104, 200], [10, 20, 22], [4, 2, 6])
