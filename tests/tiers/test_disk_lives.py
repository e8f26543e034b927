"""Random lives of the whole disk tier over real files: whatever happens, what a load vouches for is what was computed."""

from __future__ import annotations

import errno
import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from polder.diskstore.model import DiskModel
from polder.emulation.disks import EmulatedDisk
from polder.errors import ConfigError
from polder.tiers.jobs import Job
from polder.tiers.slots import block_ids
from tests.conftest import examples
from tests.emulation.files import emulated_files
from tests.tiers.disk_rig import DISK, Rig, content, names

FAST = DiskModel(bytes_per_s=1e12, latency_s=0.0)
CONVERSATIONS, LONGEST = 6, 14
prefixes = st.tuples(st.integers(0, CONVERSATIONS - 1), st.integers(1, LONGEST))


def prefix(which: tuple[int, int]) -> list[bytes]:
    return names(1000 * which[0], which[1])


class DiskTierLives(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.namespace = self.weights = 0
        self.disturbed = False
        """A miss may have its reason in what was done to the files, or in a disk that hung."""
        self.directories = [self.root / name for name in "abc"]
        self.begin()

    def begin(self) -> None:
        self.disks = {directory: EmulatedDisk(FAST) for directory in self.directories}
        self.rig = Rig(
            self.directories,
            host_slots=10,
            limit_bytes=(2 << 20) + 700_000,
            open_file=emulated_files(self.disks),
            timeout_s=0.05,
            arena_pages=9,
            namespace=f"weights {self.namespace}",
            weights=self.weights,
        )
        self.spilling: list[Job] = []

    def teardown(self) -> None:
        self.end()
        shutil.rmtree(self.root)

    def end(self) -> None:
        for disk in self.disks.values():
            disk.recover()
        self.rig.close()

    # ------------------------------------------------------------------ what may happen

    @rule(which=prefixes)
    def compute(self, which: tuple[int, int]) -> None:
        self.rig.ask(prefix(which))
        self.rig.compute(prefix(which))

    @rule()
    def plan_a_spill(self) -> None:
        job = self.rig.tiers.plan_spills()
        if job is not None:
            self.rig.worker.submit(job, [])
            self.spilling.append(job)

    @rule()
    def spills_end(self) -> None:
        self.rig.worker.wait_all()
        for finished in self.rig.worker.poll():
            self.rig.tiers.report(finished)
        self.spilling.clear()

    @rule(which=prefixes)
    def keep(self, which: tuple[int, int]) -> None:
        self.spills_end()
        self.rig.keep(prefix(which))

    @rule(which=prefixes)
    def load(self, which: tuple[int, int]) -> None:
        self.rig.ask(prefix(which))
        finished = self.rig.load(prefix(which))
        faulty = any(disk.refusal or disk._dead for disk in self.disks.values()) or self.disturbed or self.had_faults
        assert faulty or not finished.failed, "a miss without a fault"

    @property
    def had_faults(self) -> bool:
        stats = self.rig.store.stats()
        return any(s.state != "ok" or s.failed_reads or s.failed_writes for s in stats)

    @rule(disk=st.integers(0, 2), kind=st.sampled_from(["die", "hang", "full", "read-only"]), rarely=st.integers(0, 3))
    def a_disk_fails(self, disk: int, kind: str, rarely: int) -> None:
        if rarely:
            return
        mine = self.disks[self.directories[disk]]
        if kind == "die":
            mine.die()
        elif kind == "hang":
            mine.hang()
            self.disturbed = True
        else:
            mine.refuse_writes(errno.ENOSPC if kind == "full" else errno.EROFS)

    @rule()
    def disks_recover(self) -> None:
        for disk in self.disks.values():
            disk.recover()

    @rule(which=prefixes, other=st.integers(0, 2))
    def a_page_changes_on_disk(self, which: tuple[int, int], other: int) -> None:
        self.spills_end()
        places = self.rig.store.lookup(block_ids(prefix(which)))
        directory = self.directories[other]
        slots = places.slots[places.slots[:, other] >= 0, other]
        if len(slots):
            slab = np.memmap(directory / "slab", np.uint8).reshape(-1, 64 << 10)
            slab[slots[0], 12] ^= 1
            slab.flush()
            self.disturbed = True

    @rule()
    def restart(self) -> None:
        self.spills_end()
        held = self.rig.store.lookup(block_ids(self.all_keys())).present.any(axis=1)
        whole = not self.had_faults and not self.disturbed
        self.end()
        self.begin()
        found = np.array(self.rig.tiers.find(self.all_keys()))
        if whole:
            assert (found[held] == DISK).all(), "a page is lost by a restart"

    @rule()
    def crash(self) -> None:
        """The next run finds the files as they were at some moment in the middle of everything, each at its own."""
        moment = self.root / "crash"
        moment.mkdir()
        for directory in self.directories:
            shutil.copytree(directory, moment / directory.name)
        self.end()
        for directory in self.directories:
            shutil.rmtree(directory)
            (moment / directory.name).rename(directory)
        moment.rmdir()
        self.disturbed = True
        self.begin()

    @rule(rarely=st.integers(0, 7))
    def other_weights(self, rarely: int) -> None:
        """As after a restart with another model: the directories are refused, and have to be emptied."""
        if rarely:
            return
        self.spills_end()
        self.end()
        self.namespace += 1
        self.weights += 1
        with pytest.raises(ConfigError, match="namespace"):
            self.begin()
        shutil.rmtree(self.root)
        self.root.mkdir()
        self.disturbed = False
        self.begin()

    @rule(rarely=st.integers(0, 7))
    def drop_all(self, rarely: int) -> None:
        """Other bytes come under the same keys."""
        if rarely:
            return
        self.spills_end()
        self.rig.tiers.drop_all()
        self.weights += 1
        self.rig.weights = self.weights
        self.rig.spill()
        self.rig.tiers.unseal()

    # ------------------------------------------------------------------ what must hold

    @invariant()
    def books_add_up_and_directories_keep_their_limits(self) -> None:
        self.rig.check()

    @invariant()
    def nothing_was_evicted_behind_the_scheduler(self) -> None:
        assert self.rig.store.evicted == 0

    def all_keys(self) -> list[bytes]:
        return [key for conversation in range(CONVERSATIONS) for key in prefix((conversation, LONGEST))]


TestDiskTierLives = DiskTierLives.TestCase
TestDiskTierLives.settings = examples(30, steps=40, derandomize=True)


def test_content_tells_keys_and_weights_apart() -> None:
    one, other = names(0, 2)
    assert not np.array_equal(content(one), content(other))
    assert not np.array_equal(content(one), content(one, 1))
