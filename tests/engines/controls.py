"""Ways to break Polder on purpose, in the processes of a running engine: equality of tokens has to notice them.

vLLM loads `install` there as a plugin, if the test has put `PLUGIN` on the path. It patches the functions named below. A patch does
nothing until the test turns its control on: a byte in a file that the test and the engines share.

A control with "given" in its first line breaks nothing. It is a misfortune that Polder has to survive, and makes what is broken
beside it visible: memory that nobody may read any more has other bytes, for example, instead of those that happened to stay there.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import functools
import mmap
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["CONTROLS", "LATE_COPIES", "LATE_LAYERS", "PLUGIN", "Switches", "install"]

PLUGIN = Path(__file__).parent / "controls_plugin"
"""Has the entry point by which vLLM finds `install`."""
_VARIABLE = "POLDER_TEST_SWITCHES"

NAN, GARBAGE = 0xFF, 0x3F
"""As each byte of a float32 or bfloat16: not a number, and 0.75."""

Breaker = Callable[[Any, str, Callable[..., Any]], None]
"""(class or module, name of its function, what is called in its place: the stock function, then its arguments)"""
CONTROLS: dict[str, Callable[[Breaker], None]] = {}
LATE_COPIES = "given: copies over an emulated link begin late"
LATE_LAYERS = "given: copies of single layers over an emulated link begin late"


class Switches:
    """The test's side."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "switches"
        self._path.write_bytes(bytes(len(CONTROLS)))

    @contextlib.contextmanager
    def reaching_engines(self) -> Iterator[dict[str, str]]:
        """Engines that start in this context can be broken if these variables are among their settings."""
        sys.path.insert(0, str(PLUGIN))
        try:
            yield {_VARIABLE: str(self._path)}
        finally:
            sys.path.remove(str(PLUGIN))

    @contextlib.contextmanager
    def on(self, *names: str) -> Iterator[None]:
        """Turns these controls on, in all engines. To be called while no engine has requests."""
        with self._path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as switches:
            numbers = [list(CONTROLS).index(name) for name in names]
            try:
                for number in numbers:
                    switches[number] = 1
                yield
            finally:
                for number in numbers:
                    switches[number] = 0


def install() -> None:
    """vLLM's entry point. Patches nothing in a process of the test itself."""
    path = os.environ.get(_VARIABLE)
    if path is None or multiprocessing.parent_process() is None:
        return
    with open(path, "r+b") as file:
        switches = mmap.mmap(file.fileno(), 0)
    for number, control in enumerate(CONTROLS.values()):
        control(functools.partial(_break, functools.partial(_is_on, switches, number)))


def _is_on(switches: mmap.mmap, number: int) -> bool:
    return switches[number] == 1


def _break(is_on: Callable[[], bool], owner: Any, name: str, broken: Callable[..., Any]) -> None:
    stock = getattr(owner, name)

    @functools.wraps(stock)
    def either(*args: Any, **kwargs: Any) -> Any:
        return broken(stock, *args, **kwargs) if is_on() else stock(*args, **kwargs)

    setattr(owner, name, either)


def _control(name: str) -> Callable[[Callable[[Breaker], None]], None]:
    def add(install: Callable[[Breaker], None]) -> None:
        CONTROLS[name] = install

    return add


def _fill(pieces: Sequence[tuple[int, int]], byte: int) -> None:
    for address, size in pieces:
        ctypes.memset(address, byte, size)


# ---------------------------------------------------------------- tiers


@_control("a load copies nothing")
def _(broken: Breaker) -> None:
    from polder.tiers.host import HostMemory
    from polder.tiers.peer.memory import PeerMemory

    for memory in (HostMemory, PeerMemory):
        broken(memory, "load", lambda stock, *args: True)


@_control("checksums are not compared")
def _(broken: Breaker) -> None:
    from polder.tiers.movers import CpuMover

    broken(CpuMover, "checksum", lambda stock, *args: 0)


@_control("given: loads bring other bytes")
def _(broken: Breaker) -> None:
    from polder.tiers.host import HostMemory

    def load(stock: Any, self: Any, recipe: Any, row: int, block: Any, mover: Any) -> bool:
        done: bool = stock(self, recipe, row, block, mover)
        _fill(block, GARBAGE)
        return done

    broken(HostMemory, "load", load)


@_control("a load fills other blocks")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.tiers.worker import PolderWorker

    def submit_load(
        stock: Any, self: Any, job_id: int, src_spec: Any, dst_spec: Any, *more: Any, **options: Any
    ) -> bool:
        other = copy.copy(dst_spec)
        # Blocks in another order would be as good: attention adds them up, and keys know their positions.
        other.block_ids = np.full_like(dst_spec.block_ids, dst_spec.block_ids[0])
        return bool(stock(self, job_id, src_spec, other, *more, **options))

    broken(PolderWorker, "submit_load", submit_load)


@_control("blocks are stored before they are written")
def _(broken: Breaker) -> None:
    from vllm.distributed.kv_transfer.kv_connector.v1.offloading.worker import OffloadingConnectorWorker

    def before_the_step(stock: Any, self: Any, metadata: Any) -> None:
        stock(self, metadata)
        for job_id, entry in metadata.store_jobs.items():
            self.worker.submit_store(job_id, entry.src_spec, entry.dst_spec)
        self.worker.wait(set(metadata.store_jobs))

    broken(OffloadingConnectorWorker, "handle_preemptions", before_the_step)
    broken(OffloadingConnectorWorker, "prepare_store_kv", lambda stock, *args: None)


# ---------------------------------------------------------------- blocks that move


@_control("given: units that were given up stay mapped, and blocks that moved have other bytes")
def _(broken: Breaker) -> None:
    """Else who uses an old id ends by SIGSEGV, or finds what was there before."""
    from polder.engines.vllm.rank.memory import WorkerMemory

    left: dict[int, int] = {}

    def move(stock: Any, self: Any, sources: Any, targets: Any) -> None:
        stock(self, sources, targets)
        base = self.span.address(0)
        for offset, size in self.geometry.runs():
            _fill([(base + offset + number * size, size) for number in np.asarray(sources).tolist()], GARBAGE)

    def unmap(stock: Any, self: Any, units: Sequence[int], generation: int) -> None:
        left.update(dict.fromkeys(units, generation))

    stock_map, stock_unmap = WorkerMemory.map, WorkerMemory.unmap

    def map_after_all(self: Any, generation: int, units: Sequence[int], pages: Sequence[int]) -> None:
        for unit in set(units) & set(left):
            stock_unmap(self, [unit], left.pop(unit))
        stock_map(self, generation, units, pages)

    broken(WorkerMemory, "move", move)
    broken(WorkerMemory, "unmap", unmap)
    WorkerMemory.map = map_after_all  # type: ignore[method-assign]


@_control("the workers' block tables keep old ids")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.rank import calls

    broken(calls, "rewrite_block_tables", lambda stock, *args: None)


@_control("the requests' lists keep old blocks")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.core.holders import BlockHolders

    broken(BlockHolders, "_renumber_requests", lambda stock, *args: None)


@_control("the connector's lists keep old blocks")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.tiers.connector import PolderConnector

    broken(PolderConnector, "renumber_blocks", lambda stock, *args: None)


@_control("blocks that move leave their bytes behind")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.rank.memory import WorkerMemory

    broken(WorkerMemory, "move", lambda stock, *args: None)


# ---------------------------------------------------------------- pages that change hands


@_control("given: pages come with what is not a number")
def _(broken: Breaker) -> None:
    from polder.memory.span import Span

    def zero(stock: Any, self: Any, slots: Any) -> None:
        _fill_slots(self, slots, NAN)
        stock(self, slots)

    broken(Span, "zero", zero)


@_control("pages come with what is not a number, and are not zeroed")
def _(broken: Breaker) -> None:
    from polder.memory.span import Span

    broken(Span, "zero", lambda stock, self, slots: _fill_slots(self, slots, NAN))


def _fill_slots(span: Any, slots: Any, byte: int) -> None:
    _fill(
        [(span.address(slot), span.address(slot + 1) - span.address(slot)) for slot in np.asarray(slots).tolist()], byte
    )


@_control("given: a borrower writes what is not a number")
def _(broken: Breaker) -> None:
    from polder.tiers.movers import CpuMover
    from polder.tiers.peer.memory import PeerMemory

    class NanMover(CpuMover):
        def copy(self, dst: Any, src: Any) -> None:
            _fill(dst, NAN)

    def store(stock: Any, self: Any, recipe: Any, row: int, block: Any, mover: Any) -> bool:
        return bool(stock(self, recipe, row, block, NanMover()))

    broken(PeerMemory, "store", store)


@_control("a block that was lent is not zeroed")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.core.lender import Lender

    broken(Lender, "take_dirty", lambda stock, self: stock(self) and [])


@_control("blocks that the lender took back are read")
def _(broken: Breaker) -> None:
    from polder.tiers.peer import borrowing
    from polder.tiers.peer.lending import LendingTable

    broken(borrowing._Lender, "lose", lambda stock, self: np.empty(0, dtype=np.int64))
    broken(LendingTable, "valid", lambda stock, self, lots, epochs: True)


# ---------------------------------------------------------------- weights


@_control("given: weights that sleep leave other bytes behind")
def _(broken: Breaker) -> None:
    from polder.weights.store import WeightStore

    def rotate(stock: Any, self: Any, rotation: Any, incoming: Any = ()) -> Any:
        if rotation is None:
            self.wait_all()
            _fill_slots(self._span, np.flatnonzero(self._span.mapped), GARBAGE)
        return stock(self, rotation, incoming)

    broken(WeightStore, "rotate", rotate)


def _late_by(late_s: float) -> Callable[[Breaker], None]:
    """Copies begin so much later, in their order."""

    def install(broken: Breaker) -> None:
        from polder.emulation.backends import PacedQueue

        stock = PacedQueue.put
        threads: dict[int, ThreadPoolExecutor] = {}

        def put_at_once(self: Any, *args: Any) -> Any:
            if id(self) in threads:
                threads.pop(id(self)).shutdown()  # copies that were late stay before those that are not
            return stock(self, *args)

        def put_late(_: Any, self: Any, *args: Any) -> Any:
            due = time.perf_counter() + late_s

            def begin() -> Any:
                time.sleep(max(0.0, due - time.perf_counter()))
                return stock(self, *args)

            return _Late(threads.setdefault(id(self), ThreadPoolExecutor(1)).submit(begin))

        PacedQueue.put = put_at_once  # type: ignore[method-assign]
        broken(PacedQueue, "put", put_late)

    return install


_control(LATE_COPIES)(_late_by(0.5))  # when all layers could have been computed
_control(LATE_LAYERS)(_late_by(0.1))  # when the layers that share slots could have been


class _Late:
    """A copy job that has not begun yet."""

    def __init__(self, job: Future[Any]) -> None:
        self._job = job

    def done(self) -> bool:
        return self._job.done() and bool(self._job.result().done())

    def wait(self) -> float:
        return float(self._job.result().wait())

    def hold(self) -> None:
        self.wait()


@_control("a layer's weights are not awaited")
def _(broken: Breaker) -> None:
    from polder.weights.store import WeightStore

    broken(WeightStore, "before", lambda stock, self, layer: None)


@_control("graphs are replayed before all layers are there")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.weights.offloader import WeightOffloader

    broken(WeightOffloader, "sync_prev_onload", lambda stock, self: None)


@_control("a layer's weights are not copied")
def _(broken: Breaker) -> None:
    from polder.stream.pipeline import Pieces
    from polder.weights.store import WeightStore

    broken(WeightStore, "_load", lambda stock, self, layer: Pieces.of([]) if layer == 2 else stock(self, layer))


# ---------------------------------------------------------------- window


@_control("a window's layer is not awaited")
def _(broken: Breaker) -> None:
    from polder.window.stream import WindowStream

    broken(WindowStream, "before", lambda stock, self, layer: None)


@_control("a window's layer is not stored")
def _(broken: Breaker) -> None:
    from polder.stream.pipeline import Pieces
    from polder.window.stream import WindowStream

    broken(WindowStream, "_save", lambda stock, self, layer: Pieces.of([]) if layer == 3 else stock(self, layer))


@_control("windowed blocks come home without their bytes")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.window.worker import WorkerWindow

    broken(WorkerWindow, "move", lambda stock, *args: None)


# ---------------------------------------------------------------- sparse reading


@_control("one unit is read in place of all")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.sparse import homes

    broken(homes._Memory, "read", lambda stock, self, units, *args: stock(self, np.zeros_like(units), *args))


@_control("the worst units are selected")
def _(broken: Breaker) -> None:
    from polder.engines.vllm.sparse import decoding

    broken(decoding, "best", lambda stock, shares, count: stock(-shares, count))
