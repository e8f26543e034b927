"""The reuse curve equals a naive LRU stack, and stays bounded."""

from __future__ import annotations

import random

import numpy as np

from polder.planner.reuse import ReuseTracker


def keys(session: int, count: int) -> list[bytes]:
    return [(session * 1000 + i + 1).to_bytes(8, "little") for i in range(count)]


def test_the_curve_equals_a_naive_stack() -> None:
    draw = random.Random(1)
    tracker = ReuseTracker(unit_blocks=4, max_units=50, block_tokens=32, halflife_s=1e12)
    stack: list[bytes] = []
    expected = np.zeros(51)
    for _ in range(300):
        furthest, missed = 0, False
        prompt = keys(draw.randrange(12), draw.randrange(1, 20))
        for key in prompt:
            if key in stack:
                furthest = max(furthest, stack.index(key) + 1)
                stack.remove(key)
                if not missed:
                    expected[-(-furthest // 4)] += 32
            else:
                missed = True
            stack.insert(0, key)
            del stack[200:]
        tracker.touch(prompt, 0.0)
    assert expected.sum() > 0
    curve = np.array(tracker.curve(0.0, 1.0))
    assert np.allclose(curve / curve[-1], np.cumsum(expected) / expected.sum())


def test_a_working_set_is_a_cliff_at_its_size() -> None:
    tracker = ReuseTracker(unit_blocks=8, max_units=40, block_tokens=16)
    for turn in range(30):
        for session in range(10):
            tracker.touch(keys(session, 16), turn * 10 + session)  # 160 blocks: 20 units
    curve = tracker.curve(300.0, 1e-3)
    assert curve[19] == 0.0
    assert curve[20] > 0.9 * curve[40] > 0.0


def test_no_reuse_is_worth_nothing() -> None:
    tracker = ReuseTracker(unit_blocks=8, max_units=10, block_tokens=16)
    for session in range(100):
        tracker.touch(keys(session, 8), float(session))
    assert tracker.curve(100.0, 1.0) == [0.0] * 11


def test_value_fades_when_reuse_stops() -> None:
    tracker = ReuseTracker(unit_blocks=8, max_units=10, block_tokens=16, halflife_s=10.0)
    for turn in range(5):
        tracker.touch(keys(0, 8), float(turn))
    before = tracker.curve(4.0, 1.0)[10]
    assert 0.4 * before < tracker.curve(14.0, 1.0)[10] < 0.6 * before


def test_memory_is_bounded_and_sampling_keeps_the_scale() -> None:
    tracker = ReuseTracker(unit_blocks=512, max_units=100, block_tokens=16, max_tracked=1024)
    for turn in range(40):
        for session in range(8):
            prompt = [random.Random(session * 100_003 + i).randbytes(8) for i in range(1500)]
            tracker.touch(prompt, float(turn))
        assert tracker.tracked <= 1024
    curve = tracker.curve(40.0, 1.0)  # 12,000 blocks are live: 23.4 units
    assert curve[18] < 0.2 * curve[100]
    assert curve[30] > 0.8 * curve[100]
