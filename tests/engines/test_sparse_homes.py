"""Units that lie on disks come back as they were written; what does not verify is left out, and its block is as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from polder.emulation.factory import Emulation
from polder.engines.vllm.plans import SparsePlan
from polder.engines.vllm.sparse.homes import Disks
from polder.errors import ConfigError

UNIT = (2, 16, 64)
"""8 KiB in float32."""
UNITS, BLOCKS = 301, 40


def disks(folder: Path, faults: str = "", unit_bytes: int = 8192) -> Disks:
    paths = [folder / f"disk{number}" for number in range(3)]
    for path in paths:
        path.mkdir(exist_ok=True)
    plan = SparsePlan(disks=tuple((str(path), 64 << 20) for path in paths), ranks=1)
    return Disks(plan, 0, unit_bytes, Emulation(links="", faults=faults))


def units(seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn((UNITS, *UNIT), generator=torch.Generator().manual_seed(seed)).to(dtype)


def read(home: object, found: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:  # type: ignore[type-arg]
    cache = torch.zeros((BLOCKS, *UNIT))
    there = home.read(found, cache, blocks)  # type: ignore[attr-defined]
    return there, cache


def test_units_of_each_layer_come_back_into_the_blocks_that_were_named(tmp_path: Path) -> None:
    store = disks(tmp_path)
    random = np.random.default_rng(1)
    written = [units(seed) for seed in range(3)]
    homes = [store.home(each) for each in written]
    for each, home in zip(written, homes, strict=True):
        found, blocks = random.permutation(UNITS)[:30], random.permutation(BLOCKS)[:30]
        there, cache = read(home, found, blocks)
        assert there.all()
        assert torch.equal(cache[torch.from_numpy(blocks)], each[torch.from_numpy(found)])
        assert not cache[torch.from_numpy(np.setdiff1d(np.arange(BLOCKS), blocks))].any()
    homes[0].drop()
    assert not read(homes[0], np.arange(4), np.arange(4))[0].any()
    assert read(homes[1], np.arange(4), np.arange(4))[0].all()
    store.store.close()


@pytest.mark.parametrize("fault", ["failed reads", "other bytes"])
def test_a_unit_that_does_not_verify_leaves_its_block_as_it_was(tmp_path: Path, fault: str) -> None:
    store = disks(tmp_path, "fail=0.3,seed=2" if fault == "failed reads" else "")
    written = units(5)
    home = store.home(written)
    if fault == "other bytes":
        largest = max(
            (path for path in (tmp_path / "disk1").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size
        )
        with largest.open("r+b") as file:
            file.seek(0, 2)
            size = file.tell()
            for at in range(0, size, 4096):
                file.seek(at)
                file.write(b"\x3f")
    found, blocks = np.arange(0, UNITS, 8)[:BLOCKS], np.arange(38)
    there, cache = read(home, found[:38], blocks)
    assert 0 < there.sum() < 38
    expected = torch.zeros_like(cache)
    expected[torch.from_numpy(blocks[there])] = written[torch.from_numpy(found[:38][there])]
    assert torch.equal(cache, expected)
    store.store.close()


def test_units_that_are_no_whole_sectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="block-size"):
        disks(tmp_path, unit_bytes=6000)
