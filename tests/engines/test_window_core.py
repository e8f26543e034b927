"""What the core does when a window loses blocks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.v1.request import RequestStatus

from polder.engines.vllm.core.blocks import BlockUnits, BusyBlocks
from polder.engines.vllm.core.transfers import Transfers
from polder.engines.vllm.window import calls as window_calls
from polder.engines.vllm.window import runner as window_runner
from polder.engines.vllm.window.agreement import WindowAgreement
from polder.engines.vllm.window.core import HOME_EVERY_S, RETRY_S, CoreWindow
from polder.window.regions import WindowShape
from tests.engines.test_blocks import UNIT_BLOCKS, UNITS, Scheduler

WINDOWED = 3
REGULAR = UNITS - WINDOWED
FIRST = REGULAR * UNIT_BLOCKS
AGREEMENT = WindowAgreement(
    shape=WindowShape(layers=4, window_layers=2, store_units=WINDOWED),
    unit_blocks=UNIT_BLOCKS,
    block_tokens=16,
    unit_pages=4,
    regular_units=REGULAR,
    layers=tuple((f"model.layers.{n}.attn", n) for n in range(4)),
    block_bytes=1024,
)


class Engine:
    """A core whose workers do as they are told, with one donor and requests that hold some blocks."""

    def __init__(self) -> None:
        self.scheduler = scheduler = Scheduler()
        scheduler.waiting, scheduler.kv_holding_waiting = [], []
        manager = scheduler.kv_cache_manager
        manager.get_block_ids = lambda name: ([block.block_id for block in scheduler.requests.get(name, ())],)
        manager.evict_blocks = scheduler.pool.evict_blocks
        self.units = BlockUnits(scheduler, UNIT_BLOCKS, list(range(REGULAR)), BusyBlocks.MOVE, windowed_units=WINDOWED)
        self.window = CoreWindow(scheduler, self.units, AGREEMENT, self.rpc, Transfers())

    def rpc(self, function: Any, *arguments: Any) -> list[Any]:
        return [""]

    def ask(self, name: str, blocks: int) -> None:
        self.scheduler.requests[name] = self.scheduler.pool.get_new_blocks(blocks)
        request = SimpleNamespace(
            request_id=name,
            num_tokens=blocks * 16 - 1,
            is_prefill_chunk=False,
            num_output_placeholders=0,
            status=RequestStatus.RUNNING,
        )
        self.scheduler.running.append(request)

    def end(self, name: str) -> None:
        self.scheduler.running = [r for r in self.scheduler.running if r.request_id != name]
        self.scheduler.pool.free_blocks(reversed(self.scheduler.requests.pop(name)))

    def step(self, doubtful: list[int]) -> None:
        output = SimpleNamespace(**{window_runner.DOUBTFUL: doubtful} if doubtful else {})
        self.window.before_update(None, output)
        self.window.after_update(None, {})

    def running(self) -> list[str]:
        return [request.request_id for request in self.scheduler.running]


@pytest.fixture
def engine() -> Engine:
    """`short` has regular blocks only, `long` the other regular ones and two that a donor has made room for."""
    engine = Engine()
    engine.scheduler.waiting = [SimpleNamespace(num_tokens=13 * 16 - 1, num_output_placeholders=0)]
    engine.window.tick(0.0)
    assert (len(engine.units.mapped), engine.units.windowed) == (2, [REGULAR, REGULAR + 1])
    engine.scheduler.waiting = []
    engine.ask("short", 4)
    engine.ask("long", 5)
    assert len(engine.units.windowed_of("long")) == 2
    return engine


def test_holders_of_a_lost_block_start_over_and_others_go_on(engine: Engine) -> None:
    lost = engine.units.windowed_of("long")[:1]
    engine.step([])
    assert engine.running() == ["short", "long"]
    engine.step(lost)
    assert engine.running() == ["short"]
    engine.units.check_integrity()


def test_a_block_that_came_home_after_the_step_was_launched_is_lost_under_its_new_number(engine: Engine) -> None:
    lost = engine.units.windowed_of("long")
    engine.end("short")
    engine.window.tick(2 * HOME_EVERY_S)
    assert not engine.units.windowed_of("long")
    engine.step(lost[:1])
    assert engine.running() == []
    engine.units.check_integrity()


def test_a_window_whose_pages_cannot_be_mapped_stays_closed_and_is_tried_again_later() -> None:
    engine = Engine()
    calls: list[Any] = []
    failing = [True]

    def rpc(function: Any, *arguments: Any) -> list[Any]:
        calls.append(function)
        return ["no map" if failing[0] and function is window_calls.open_units else ""]

    engine.window._rpc = rpc
    engine.scheduler.waiting = [SimpleNamespace(num_tokens=13 * 16 - 1, num_output_placeholders=0)]
    for now in (0.0, RETRY_S / 2):
        engine.window.tick(now)
        engine.units.check_integrity()
    assert calls == [window_calls.open_units, window_calls.close_units]
    assert (len(engine.units.mapped), engine.units.windowed) == (REGULAR, [])
    failing[0] = False
    engine.window.tick(RETRY_S)
    assert engine.units.windowed == [REGULAR, REGULAR + 1]
    engine.units.check_integrity()


@pytest.mark.parametrize("queue", ["waiting", "kv_holding_waiting"])
def test_a_request_opens_the_window_whichever_way_it_waits(queue: str) -> None:
    """One that waits with blocks has a part of its KV from a tier, and needs blocks for the rest."""
    engine = Engine()
    setattr(engine.scheduler, queue, [SimpleNamespace(num_tokens=13 * 16 - 1, num_output_placeholders=0)])
    engine.window.tick(0.0)
    assert engine.units.donors
