"""Disks in the fleet file: each model has its own directory and an equal part of every disk."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from polder.engines.vllm.settings import read_settings
from polder.errors import BudgetError, ConfigError
from polder.serve.disks import folder_of, make_folders
from polder.serve.fleet import load_fleet
from tests.serve.test_fleet import MIB, model, write
from tests.serve.test_tiers import FLEET

__all__ = ["model"]

USES = 'tiers = ["host", "disk"]'
GIB = 1 << 30


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[list[Path]]:
    paths = [tmp_path / "nvme0", tmp_path / "nvme1"]
    for path in paths:
        path.mkdir()
    yield paths
    for path in paths:
        path.chmod(0o700)


def fleet(folder: Path, model: Path, disks: list[str], a: str = USES, b: str = "") -> Any:
    memory = f'host = "100MiB"\ndisks = {disks}'
    return load_fleet(write(folder, FLEET.format(model=model, memory=memory, a=a, b=b)))


def test_models_with_the_tier_share_every_disk_equally(tmp_path: Path, model: Path, mounts: list[Path]) -> None:
    disks = [f"{mounts[0]}:10GiB", f"{mounts[1]}:3GiB"]
    first, second = fleet(tmp_path, model, disks, USES + '\ndisk_io = "aio"', USES + '\ndisk_writes = "7GiB"').models
    assert first.settings.disks == ((f"{mounts[0]}/a", 5 * GIB), (f"{mounts[1]}/a", 3 * GIB // 2))
    assert second.settings.disks == ((f"{mounts[0]}/b", 5 * GIB), (f"{mounts[1]}/b", 3 * GIB // 2))
    given, other = (m.environment(Path("/s")) for m in (first, second))
    assert (given["POLDER_DISK_WRITES"], given["POLDER_DISK_IO"]) == ("", "aio")
    assert (other["POLDER_DISK_WRITES"], other["POLDER_DISK_IO"]) == (str(7 * GIB), "")
    assert not any(list(path.iterdir()) for path in mounts), "to look at a file makes nothing"


def test_what_an_engine_reads_is_what_was_meant(tmp_path: Path, model: Path, mounts: list[Path]) -> None:
    first, second = fleet(tmp_path, model, [f"{mounts[0]}:10GiB", f"{mounts[1]}:3GiB"]).models
    settings = read_settings({}, "", first.environment(Path("/s")))
    assert settings is not None
    assert (settings.tiers, settings.disks) == (("host", "disk"), first.settings.disks)
    assert settings.disk_writes_bytes is None
    without = second.environment(Path("/s"))
    assert (without["POLDER_DISKS"], without["POLDER_DISK_WRITES"]) == ("", ""), "what the shell had set is undone"


def test_directories_are_made_on_disks_that_are_there(tmp_path: Path, model: Path, mounts: list[Path]) -> None:
    loaded = fleet(tmp_path, model, [f"{path}:1GiB" for path in mounts], USES, USES)
    for _ in range(2):  # also when they are there already
        make_folders(m.settings.disks for m in loaded.models)
    assert [sorted(p.name for p in path.iterdir()) for path in mounts] == [["a", "b"], ["a", "b"]]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_made_is_named(tmp_path: Path, model: Path, mounts: list[Path]) -> None:
    loaded = fleet(tmp_path, model, [f"{path}:1GiB" for path in mounts])
    mounts[1].chmod(0o500)
    with pytest.raises(ConfigError, match=r"cannot make .*nvme1/a: Permission denied; give its parent"):
        make_folders(m.settings.disks for m in loaded.models)


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"cannot make .*file/a: Not a directory"):
        make_folders([((f"{tmp_path}/file/a", MIB),)])


def test_names_become_folders_and_two_never_the_same() -> None:
    names = ["a/b", "a:b", "a.b", "a-b", "a_b", "A/b", "a/b/c", "a", "a/", "a:", "a2Fb", "a..b/../c"]
    folders = [folder_of(name) for name in names]
    assert len(set(folders)) == len(names)
    assert not any(set("/:,") & set(folder) for folder in folders)
    assert folder_of("meta/llama:8b") == "meta%2Fllama%3A8b"


def test_a_name_with_a_slash_reaches_the_engine_whole(tmp_path: Path, model: Path, mounts: list[Path]) -> None:
    text = FLEET.replace('name = "a"', 'name = "org/a:1"').format(
        model=model, memory=f'host = "100MiB"\ndisks = ["{mounts[0]}:1GiB"]', a=USES, b=""
    )
    only = load_fleet(write(tmp_path, text)).models[0]
    settings = read_settings({}, "", only.environment(Path("/s")))
    assert settings is not None
    assert settings.disks == ((f"{mounts[0]}/org%2Fa%3A1", GIB),)


@pytest.mark.parametrize(
    ("disks", "a", "error", "named"),
    [
        ([], USES, ConfigError, r"model a: .* memory\.disks"),
        (["{0}:1GiB"], "", ConfigError, r"memory\.disks"),
        (["{0}:1GiB"], 'tiers = ["disk"]', ConfigError, "model a: tiers"),
        (["nvme0:1GiB"], USES, ConfigError, "memory.disks: cannot read 'nvme0:1GiB'"),
        (["{0}"], USES, ConfigError, "memory.disks: cannot read '/.*nvme0'"),
        (["{0}:1Gbit"], USES, ConfigError, "memory.disks: .*nvme0: cannot read '1Gbit'"),
        (["{0}:1GiB", "{0}/sub:1GiB"], USES, ConfigError, "nvme0/sub and .*nvme0: one lies inside the other"),
        (["{0}:1GiB", "{0}/:2GiB"], USES, ConfigError, "nvme0/ is given twice as .*nvme0"),
        (["{0}:1GiB", "{0}:2GiB"], USES, ConfigError, "nvme0 is given twice"),
        (["{0}x:1GiB"], USES, ConfigError, "no directory .*nvme0x"),
        (["{0}:2MiB"], USES, BudgetError, "nvme0: 2 MiB in 1 equal parts"),
        (["{0}:1GiB"], USES + '\ndisk_writes = "much"', ConfigError, "model a: disk_writes: cannot read 'much'"),
        (["{0}:1GiB"], USES + '\ndisk_io = "mmap"', ConfigError, "model a: disk_io 'mmap'"),
        ([], 'disk_writes = "1GiB"', ConfigError, "model a: disk_writes"),
        ([], 'disk_io = "aio"', ConfigError, "model a: disk_io"),
    ],
)
def test_each_mistake_is_named(
    tmp_path: Path, model: Path, mounts: list[Path], disks: list[str], a: str, error: type[Exception], named: str
) -> None:
    (mounts[0] / "sub").mkdir()
    with pytest.raises(error, match=named):
        fleet(tmp_path, model, [disk.format(*mounts) for disk in disks], a)


def test_no_model_writes_into_the_directory_of_another_by_a_link(
    tmp_path: Path, model: Path, mounts: list[Path]
) -> None:
    disks = [f"{path}:1GiB" for path in mounts]
    (mounts[0] / "a").mkdir()
    (mounts[1] / "b").symlink_to(mounts[0] / "a")
    with pytest.raises(ConfigError, match=r"nvme0/a is the same directory as .*nvme1/b"):
        fleet(tmp_path, model, disks, USES, USES)
