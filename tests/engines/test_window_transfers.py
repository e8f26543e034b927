"""Transfers of the tiers beside a window: they read and write the homes of its blocks."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from polder.engines.vllm.process import here
from polder.engines.vllm.tiers.worker import PolderWorker, TierJob
from polder.engines.vllm.window import worker as window_worker
from polder.memory import _libc
from polder.tiers.jobs import Job, JobResult, Part, Pieces
from tests.window.rank import Rank
from tests.window.test_stream_faults import LAST_STORE


class Tiers:
    """In the place of our TierWorker: a load has arrived when it is submitted, and its bytes are 0x5A."""

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def submit(self, job: Job, blocks: Sequence[Pieces], after: object = None) -> None:
        self.jobs.append(job)
        for address, size in (piece for block in blocks for piece in block if job.direction == "load"):
            ctypes.memset(address, 0x5A, size)

    def poll(self) -> list[JobResult]:
        return []


class Beside:
    """A rank with a window, and the tiers' worker over its blocks."""

    def __init__(self, rank: Rank) -> None:
        self.tiers = Tiers()
        group = [(base, rank.block_bytes, rank.block_bytes) for base in rank.window.homes.local]
        self.worker = PolderWorker(lambda *_: self.tiers, [group], lambda: None)  # type: ignore[arg-type,return-value]

    def submit(self, direction: Any, blocks: list[int]) -> None:
        """Job 5. Each block has two places, in two tiers: so there are twice as many rows as blocks."""
        count = len(blocks)
        parts = tuple(
            Part(
                tier=tier,
                rows=np.arange(tier * count, (tier + 1) * count),
                blocks=np.arange(count),
                slots=np.arange(count),
                ids=np.zeros((count, 2), np.uint64),
            )
            for tier in range(2)
        )
        there = TierJob(Job(number=1, direction=direction, parts=parts))
        here = SimpleNamespace(group_sizes=[count], block_ids=np.array(blocks))
        if direction == "load":
            assert self.worker.submit_load(5, there, here)
        else:
            assert self.worker.submit_store(5, here, there)


@pytest.fixture
def beside(monkeypatch: pytest.MonkeyPatch) -> Callable[[Rank], Beside]:
    def open_(rank: Rank) -> Beside:
        monkeypatch.setattr(here, "window", rank.window)
        return Beside(rank)

    return open_


def test_a_load_lands_after_what_the_pass_before_has_written_to_its_block(
    beside: Callable[[Rank], Beside], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _libc.copy_bytes

    def copy_slowly(*arguments: Any) -> None:
        time.sleep(0.02)
        real(*arguments)

    monkeypatch.setattr(window_worker, "INLINE_BYTES", 0)
    monkeypatch.setattr(_libc, "copy_bytes", copy_slowly)
    with Rank(4, 2).open() as rank:
        rank.run([], [rank.first])  # of a request that ends now
        beside(rank).submit("load", [rank.first])
        rank.stream.settle()
        assert (rank.store[:, 0] == 0x5A).all()


@pytest.mark.parametrize("direction", ["load", "store"])
def test_a_transfer_beside_blocks_that_did_not_get_home_fails_in_all_of_its_places(
    direction: str, beside: Callable[[Rank], Beside]
) -> None:
    with Rank(4, 2).open() as rank:
        rank.backend.fail_next("copy", LAST_STORE)
        rank.run([], [rank.first])
        found = beside(rank)
        found.submit(direction, [*rank.windowed[1:4], rank.regular[1]])
        assert not found.tiers.jobs
        assert [result.job_id for result in found.worker.get_finished()] == [5]
        (report,) = found.worker.take_reports()
        assert report.failed == dict.fromkeys(range(8), "error")
        assert found.worker.failed_loads == {5}
        assert rank.window.take_doubtful() == [rank.first]


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_after_a_spoiled_pass_blocks_are_loaded_and_not_stored(
    steps_in_flight: int, beside: Callable[[Rank], Beside]
) -> None:
    """With async scheduling one step more is launched before the core hears of it, from wrong tokens.

    What a step has computed is stored in the next one.
    """
    with Rank(4, 2, steps_in_flight=steps_in_flight).open() as rank:

        def jobs_begun(direction: str) -> int:
            found = beside(rank)
            found.submit(direction, [rank.first])
            return len(found.tiers.jobs)

        rank.window.end_step([rank.first])
        for _ in range(steps_in_flight):
            assert (jobs_begun("store"), jobs_begun("load")) == (0, 1)
            rank.window.end_step([])
        assert (jobs_begun("store"), jobs_begun("load")) == (1, 1)
