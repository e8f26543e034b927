"""Whole layouts on modelled disks: ours is within 2 % of the physical bound, and what it wins over others it wins by reading less.

Co-activated sets of 32,768 blocks of 4 KiB (tokens of one layer) on pages of 64 KiB. Times are modelled: no clock is read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from polder.bench.sparse.arms import ARMS, PARTS, ArmConfig, Known
from polder.bench.sparse.generator import PESSIMISTIC, Sticky, resident, sticky_clusters
from polder.bench.sparse.modelled import HOST_S_PER_REQUEST, Modelled, run_steps
from polder.diskstore.model import PM9A3, DiskModel, page_speeds
from polder.diskstore.schedule import greedy
from polder.swarm.activations import Profile

SEEN, LATER = 300, 30
BLOCK_BYTES, PAGE_BLOCKS = 4096, 16
FOUR, EIGHT = [PM9A3] * 4, [PM9A3] * 8
ONE_SLOW = [PM9A3.slowed(0.5), *EIGHT[1:]]


def read_from_disks(config: Sticky) -> tuple[Profile, Profile]:
    """Recorded steps and later ones, without what is always in DRAM."""
    (profile,) = sticky_clusters(config)
    there = np.where(resident(config), np.int64(-1), np.arange(config.blocks))
    profile = profile.mapped(there, size=config.blocks)
    return profile.part(0, SEEN), profile.part(SEEN, SEEN + LATER)


def config_for(seen: Profile, disks: list[DiskModel], *, page_blocks: int, block_bytes: int) -> ArmConfig:
    return ArmConfig(
        known=Known(profile=seen, page_blocks=page_blocks, block_bytes=block_bytes),
        speeds=page_speeds(disks, page_blocks * block_bytes),
    )


STICKY = Sticky(blocks=32768, steps=SEEN + LATER, seed=5)


@pytest.fixture(scope="module")
def sticky() -> tuple[Profile, Profile]:
    return read_from_disks(STICKY)


@pytest.mark.parametrize("disks", [FOUR, EIGHT, ONE_SLOW], ids=["4", "8", "8-one-slow"])
def test_ours_is_within_2_percent_of_the_bound_and_each_part_does_its_share(
    sticky: tuple[Profile, Profile], disks: list[DiskModel]
) -> None:
    seen, later = sticky
    config = config_for(seen, disks, page_blocks=PAGE_BLOCKS, block_bytes=BLOCK_BYTES)

    def run(arm: str, **more: Any) -> Modelled:
        return run_steps(ARMS[arm](config), later, disks, block_bytes=BLOCK_BYTES, **more)

    run_of = {part: run(arm) for part, arm in PARTS.items()}
    striped, packing, placement, ours, parts = (
        run_of[part].figures() for part in ("striped", "packing", "placement", "schedule", "parts")
    )
    papers = run("replicas", choose=greedy).figures()
    assert ours["over_bound"] <= 1.02
    assert ours["over_whole_page_bound"] <= 1.005
    assert ours["over_bound"] < papers["over_bound"] < placement["over_bound"]
    # Successive blocks striped over the disks are InfLLM's fixed blocks. Packing is what wins: 2.3 of it.
    assert striped["io_time_s"] >= 2.41 * ours["io_time_s"]
    assert ours["bandwidth_bytes_per_s"] >= 2.41 * striped["bandwidth_bytes_per_s"]
    assert striped["amplification"] > 2.2 * ours["amplification"]
    assert packing["amplification"] == ours["amplification"]
    assert parts["over_even"] <= 1.02
    assert parts["amplification"] == 1
    assert parts["over_bound"] <= 1.10
    assert ours["io_time_s"] >= 2 * parts["io_time_s"]
    stored = ARMS["polder-pages"](config).stored_bytes / ARMS["placement"](config).stored_bytes
    assert stored == pytest.approx(1.10, abs=0.001)


def test_in_the_pessimistic_corner_packing_wins_less_and_the_bound_is_kept() -> None:
    seen, later = read_from_disks(replace(PESSIMISTIC, steps=SEEN + LATER, seed=5))
    config = config_for(seen, EIGHT, page_blocks=PAGE_BLOCKS, block_bytes=BLOCK_BYTES)
    striped, ours = (
        run_steps(ARMS[name](config), later, EIGHT, block_bytes=BLOCK_BYTES)
        for name in ("fixed-blocks", "polder-pages")
    )
    assert ours.figures()["over_bound"] <= 1.02
    assert striped.seconds.sum() >= 2.2 * ours.seconds.sum()


def test_over_the_papers_baselines_wanted_parts_of_packed_pages_gain_on_average_what_the_paper_did() -> None:
    """Fixed blocks read six bytes for one that is wanted, a cluster on each disk waits for its fullest; single reads only lack
    neighbours that are read with them, so they are left behind by less."""
    seen, later = read_from_disks(replace(STICKY, blocks=8192))
    config = config_for(seen, EIGHT, page_blocks=PAGE_BLOCKS, block_bytes=BLOCK_BYTES)
    names = ("polder", "fixed-blocks", "cluster-per-disk", "no-cluster", "swarm", "polder-pages")
    run = {name: run_steps(ARMS[name](config), later, EIGHT, block_bytes=BLOCK_BYTES) for name in names}
    times = {name: one.seconds.sum() / run["polder"].seconds.sum() for name, one in run.items()}
    assert np.mean([times[name] for name in ("fixed-blocks", "cluster-per-disk", "no-cluster")]) >= 2.72
    assert min(times.values()) == times["polder"]
    assert run["no-cluster"].requests.sum() > 2 * run["polder"].requests.sum()
    assert run["polder-pages"].requests.sum() < run["polder"].requests.sum()


def test_where_requests_cost_the_host_more_is_read_over_until_its_time_is_the_disks(
    sticky: tuple[Profile, Profile],
) -> None:
    seen, later = sticky
    layout = ARMS["polder"](config_for(seen, EIGHT, page_blocks=PAGE_BLOCKS, block_bytes=BLOCK_BYTES))
    run = run_steps(layout, later, EIGHT, block_bytes=BLOCK_BYTES)
    plain = np.maximum(run.seconds, run.requests * HOST_S_PER_REQUEST)
    assert (run.seconds <= run.with_host_s).all()
    assert (run.with_host_s <= plain).all()
    assert run.with_host_s.sum() < 0.9 * plain.sum()


def test_with_blocks_of_64_kib_whole_clusters_on_a_disk_and_slow_disks_ignored_are_what_loses() -> None:
    """A block of 16 tokens of one layer is a page of its own: nothing is packed, all that is left to win is balance."""
    seen, later = read_from_disks(Sticky(blocks=4096, steps=SEEN + LATER, seed=5, window=64))
    for disks in (EIGHT, ONE_SLOW):
        config = config_for(seen, disks, page_blocks=1, block_bytes=65536)
        run = {name: run_steps(build(config), later, disks, block_bytes=65536) for name, build in ARMS.items()}
        assert all(np.array_equal(one.read_bytes, run["polder"].read_bytes) for one in run.values())
        over = {name: one.figures()["over_bound"] for name, one in run.items()}
        assert over["polder"] <= 1.02
        assert over["polder"] == over["polder-pages"]
        assert min(over.values()) >= min(over["polder"], over["swarm"])
        assert over["hash"] > 1.1
        assert over["cluster-per-disk"] > 2 * over["polder"]
        if disks is ONE_SLOW:
            assert min(over["raid0"], over["no-cluster"], over["fixed-blocks"]) > 1.5


def test_without_co_activation_ours_is_no_worse_than_hashing() -> None:
    rng = np.random.default_rng(0)
    profile = Profile.of([rng.choice(2048, 200, replace=False) for _ in range(230)], size=2048)
    seen, later = profile.part(0, 200), profile.part(200, 230)
    for disks in ([PM9A3], FOUR):
        config = replace(
            config_for(seen, disks, page_blocks=1, block_bytes=65536), replica_share=0.1 if len(disks) > 1 else 0.0
        )
        ours, hashed = (run_steps(ARMS[name](config), later, disks, block_bytes=65536) for name in ("polder", "hash"))
        assert ours.seconds.sum() <= hashed.seconds.sum() * (1 + 1e-9)
