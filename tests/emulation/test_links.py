"""Emulated links: what they model, on a clock of the test's own."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from polder.emulation import links, memories
from polder.emulation.links import EmulatedLink
from polder.emulation.memories import PacedBatch
from polder.emulation.options import parse_links
from polder.errors import ConfigError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (links, memories):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=clock.perf_counter, sleep=clock.sleep))
    return clock


def test_a_transfer_ends_when_the_link_would_have_carried_it(clock: Clock) -> None:
    link = EmulatedLink(1000.0)
    link.charge(500, clock.now)
    assert clock.now == pytest.approx(100.5)


def test_what_the_copy_itself_took_counts(clock: Clock) -> None:
    link = EmulatedLink(1000.0)
    started = clock.now
    clock.now += 0.2
    link.charge(500, started)
    assert clock.now == pytest.approx(100.5)
    started = clock.now
    clock.now += 2.0
    link.charge(500, started)
    assert clock.now == pytest.approx(102.5), "a copy slower than the link waits for nothing"


def test_transfers_that_began_together_share_the_link(clock: Clock) -> None:
    link = EmulatedLink(1000.0)
    started = clock.now
    for _ in range(4):
        link.charge(250, started)
    assert clock.now == pytest.approx(101.0)


def test_an_idle_link_saves_nothing_up(clock: Clock) -> None:
    link = EmulatedLink(1000.0)
    link.charge(100, clock.now)
    clock.now += 50.0
    before = clock.now
    link.charge(100, before)
    assert clock.now == pytest.approx(before + 0.1)


def test_transfers_too_short_to_sleep_for_are_paid_together(clock: Clock) -> None:
    link = EmulatedLink(1e6)
    for _ in range(1000):
        link.charge(100, clock.now)  # 0.1 ms each
    assert clock.now == pytest.approx(100.1, abs=0.0006)


def test_links_are_read_in_bytes_a_second() -> None:
    assert parse_links("peer=3.2GB/s, host=400MB/s") == {"peer": 3.2e9, "host": 4e8}
    assert parse_links("host=5kB/s,disk=75MB/s") == {"host": 5e3, "disk": 75e6}
    assert parse_links("") == {}


@pytest.mark.parametrize(
    "text", ["peer", "peer=3", "peer=3GB", "tape=3GB/s", "peer=-1GB/s", "peer=0GB/s", "peer=1e3MB/s"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write peer="):
        parse_links(text)


def test_what_a_tier_of_whole_parts_loads_goes_over_the_link_that_others_use(clock: Clock) -> None:
    link, copied = EmulatedLink(1000.0), []

    class Mover:
        def copy(self, dst: object, src: object) -> None:
            copied.append((dst, src))

    class Tier:
        def load_part(self, part: object, blocks: object, mover: Mover) -> str:
            for _ in range(2):
                mover.copy([(0, 100)], [(512, 100)])
            return "carried"

    def load() -> object:
        return PacedBatch(cast(Any, Tier()), link).load_part(cast(Any, None), [], cast(Any, Mover()))

    assert load() == "carried"
    assert len(copied) == 2
    assert clock.now == pytest.approx(100.2)
    link.charge(300, clock.now)
    assert load() == "carried"
    assert clock.now == pytest.approx(100.7)
