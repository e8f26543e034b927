"""What an engine makes of its disks before and beside its requests, without one: agreement between ranks, new weights."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm")

from polder.diskstore.io import Arena
from polder.emulation.factory import Emulation
from polder.engines.vllm.plans import DiskPlan
from polder.engines.vllm.process import here
from polder.engines.vllm.tiers.disk import OpenDisks, adopt, agree_on_slots, disk_plan, found, staged_pages
from polder.engines.vllm.tiers.worker import PolderWorker
from polder.engines.vllm.weights import taps
from polder.tiers.disk.memory import DiskMemory
from polder.tiers.slots import block_ids

PAGE = 64 << 10
LIMIT = 16 << 20
NOTHING = Emulation(links="", faults="")
KEYS = block_ids([b"%032d" % n for n in range(12)])


def plan_of(folder: Path, ranks: int) -> DiskPlan:
    disks = []
    for name in "ab":
        (folder / name).mkdir(exist_ok=True)
        disks.append((str(folder / name), LIMIT))
    return DiskPlan(
        disks=tuple(disks),
        page_bytes=PAGE,
        namespace="n",
        ranks=ranks,
        staged_pages=24,
        io="threads",
    )


def worker(plan: DiskPlan, rank: int, wanted: list[int]) -> PolderWorker:
    """One that has written the pages `wanted` in a former run."""
    former = OpenDisks(plan, rank, NOTHING)
    arena = Arena(len(wanted), PAGE)
    assert former.store.write(KEYS[wanted], arena.addresses).all()
    former.close()
    return made(plan, rank)


def made(plan: DiskPlan, rank: int) -> PolderWorker:
    region = np.zeros(8 * PAGE, dtype=np.uint8)
    memories: list[DiskMemory] = []

    def open_tiers(_: int, memory: DiskMemory | None) -> Any:
        assert memory is not None
        memories.append(memory)
        return SimpleNamespace(close=memory.close, region=region)

    return PolderWorker(
        open_tiers, [], lambda: None, disks=OpenDisks(plan, rank, NOTHING), host=(region.ctypes.data, PAGE)
    )


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[PolderWorker]]:
    plan = plan_of(tmp_path, 2)
    workers = [worker(plan, 0, [0, 1, 2, 3]), worker(plan, 1, [3, 1, 7])]
    yield workers
    for one in workers:
        one.shutdown()


def test_ranks_begin_with_what_all_of_them_have(ranks: list[PolderWorker], monkeypatch: pytest.MonkeyPatch) -> None:
    def rpc(function: Any, *arguments: Any) -> list[Any]:
        answers = []
        for one in ranks:
            monkeypatch.setattr(here, "tiers", one)
            answers.append(function(None, *arguments))
        return answers

    capacities = [slots for slots, _ in rpc(found)]
    slots = agree_on_slots(rpc, plan_like(ranks))
    assert slots.capacity == min(capacities)
    assert slots.slot_bytes == 2 * PAGE
    assert slots.unclaimed == 2
    assert (slots.claim(KEYS) >= 0).nonzero()[0].tolist() == [1, 3]
    for one in ranks:
        assert one.disks is not None
        assert one.disks.store.lookup(KEYS).present.any(axis=1).sum() == 2, "what only one rank has is of no use"


@pytest.mark.parametrize("bare", [0, 1])
@pytest.mark.parametrize("why", ["no pages", "no disks"])
def test_a_rank_that_has_nothing_stops_no_start(
    tmp_path: Path, bare: int, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(tmp_path, 2)
    for rank in range(2):
        worker(plan, rank, [0, 1, 2]).shutdown()
    for name in "ab":
        shutil.rmtree(tmp_path / name / f"rank{bare}")
        if why == "no disks":
            (tmp_path / name / f"rank{bare}").touch()
    workers = [made(plan, rank) for rank in range(2)]

    def rpc(function: Any, *arguments: Any) -> list[Any]:
        answers = []
        for one in workers:
            monkeypatch.setattr(here, "tiers", one)
            answers.append(function(None, *arguments))
        return answers

    slots = agree_on_slots(rpc, plan)
    assert slots.unclaimed == 0
    assert (slots.capacity > 0) == (why == "no pages")
    assert (slots.claim(KEYS) == -1).all()
    for one in workers:
        one.shutdown()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("call", ["stat", "mkdir"])
def test_a_disk_that_has_no_folder_for_a_rank_is_out_and_the_others_serve(
    tmp_path: Path, call: str, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plan = plan_of(tmp_path, 2)
    stock = getattr(Path, call)

    def refuse(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.parent == tmp_path / "b":  # as root may do everything, it is done here
            raise OSError(number, os.strerror(number), str(self))
        return stock(self, *arguments, **more)

    monkeypatch.setattr(Path, call, refuse)
    disks = OpenDisks(plan, 1, NOTHING)
    assert disks.store.states == ("ok", "out")
    assert f"{tmp_path}/b/rank1: {os.strerror(number)}" in caplog.text
    disks.close()


def plan_like(ranks: list[PolderWorker]) -> Any:
    return SimpleNamespace(page_bytes=PAGE, ranks=len(ranks))


def test_new_weights_stop_the_disks_and_leave_their_pages(
    ranks: list[PolderWorker], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = ranks[0]
    monkeypatch.setattr(here, "tiers", one)
    adopt(None, 8, KEYS[:2])
    monkeypatch.setattr(taps, "settings_of", lambda _: SimpleNamespace(weights="resident", disks=(("/mnt/a", 1),)))
    worker = SimpleNamespace(vllm_config=None)
    assert taps.update_weights(lambda self: "updated", worker) == "updated"
    memory = one._disk
    assert memory is not None
    assert memory.replicate(1).size_bytes == 0
    memory.drop()
    assert memory.state().gauges["disks_ok"] == 0
    part: Any = SimpleNamespace(ids=KEYS[:2], rows=np.arange(2))
    assert set(memory.load_part(part, [[], []], None).failed.values()) == {"error"}  # type: ignore[arg-type]
    assert one.disks is not None
    assert one.disks.store.lookup(KEYS[:2]).present.any(axis=1).all(), "the next run with the old weights finds them"


def test_without_disks_there_is_no_plan_and_a_page_holds_a_block(tmp_path: Path) -> None:
    settings: Any = SimpleNamespace(disks=(), disk_io="threads", links="", faults="")
    assert disk_plan(settings, shard_bytes=1000, namespace=1, ranks=1) is None
    settings.disks = (("/mnt/a", 1 << 30),)
    for shard, page in ((1000, PAGE), (PAGE, PAGE), (PAGE + 1, PAGE + 4096)):
        plan = disk_plan(settings, shard_bytes=shard, namespace=1, ranks=1)
        assert plan is not None
        assert plan.page_bytes == page
    other = disk_plan(settings, shard_bytes=1000, namespace=2, ranks=1)
    assert other is not None
    assert replace(other, namespace=plan.namespace) != other


def test_staging_memory_is_bounded_in_bytes_and_in_pages() -> None:
    assert staged_pages(256 << 10) * (256 << 10) == 96 << 20
    assert staged_pages(32 << 20) == 24
    assert staged_pages(64 << 10) == 768
