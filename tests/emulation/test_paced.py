"""Copies over an emulated link: never faster than it, in order, and with the bytes there."""

from __future__ import annotations

import contextlib
import time

import numpy as np
import pytest

from polder.emulation.backends import PacedBackend
from polder.errors import EnvironmentFault
from polder.memory.copy import CopyEngine
from polder.memory.cpu import CpuBackend


def addresses(array: np.ndarray) -> np.ndarray:
    return np.array([array.ctypes.data], dtype=np.uint64)


def test_a_copy_ends_no_earlier_than_the_link_would_have_carried_it() -> None:
    src, dst = np.full(20_000, 7, np.uint8), np.zeros(20_000, np.uint8)
    with contextlib.closing(CopyEngine(PacedBackend(CpuBackend(page_bytes=4096), 1e6))) as copies:
        started = time.perf_counter()
        first = copies.submit(addresses(dst), addresses(src), 20_000)
        second = copies.submit(addresses(dst), addresses(src), 10_000)
        assert not copies.done(first)
        copies.wait(first)
        assert time.perf_counter() - started >= 0.02
        copies.wait(second)
        assert time.perf_counter() - started >= 0.03
        assert (dst == 7).all()
        assert copies.statistics().busy_seconds >= 0.03


def test_an_idle_link_saves_nothing_up() -> None:
    src, dst = np.zeros(10_000, np.uint8), np.zeros(10_000, np.uint8)
    with contextlib.closing(CopyEngine(PacedBackend(CpuBackend(page_bytes=4096), 1e6))) as copies:
        copies.wait(copies.submit(addresses(dst), addresses(src), 10_000))
        time.sleep(0.02)
        started = time.perf_counter()
        copies.wait(copies.submit(addresses(dst), addresses(src), 10_000))
        assert time.perf_counter() - started >= 0.01


def test_it_fails_on_order_too() -> None:
    backend = PacedBackend(CpuBackend(page_bytes=4096), 1e9, {"copy": {1}})
    nothing = np.empty(0, np.uint64)
    copies = CopyEngine(backend)
    with pytest.raises(EnvironmentFault, match="injected"):
        copies.wait(copies.submit(nothing, nothing, 0))
    copies.close()
