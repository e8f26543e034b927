"""Pages whose bytes tell what they are, and a store with memory to write from and to read into."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from polder.arrays import BoolArray
from polder.diskstore.config import DiskConfig, StoreConfig
from polder.diskstore.io import Arena, IoEngine, OpenFile, open_page_file
from polder.diskstore.keys import Keys, key_array
from polder.diskstore.layout import usage_bytes
from polder.diskstore.model import DiskModel
from polder.diskstore.store import DiskStore
from polder.emulation.disks import EmulatedDisk
from tests.emulation.files import emulated_files

FAST = DiskModel(bytes_per_s=1e12, latency_s=0.0)
PAGE = 64 << 10
PARTS = 16
"""Of a page, where it has any."""
PART = PAGE // PARTS


def names(numbers: Sequence[int]) -> Keys:
    return key_array([b"page%12d" % number for number in numbers])


def content(number: int, version: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng([number, version]).integers(0, 256, PAGE, dtype=np.uint8)


class Shelf:
    """A store of numbered pages. `read` never looks at a page that the store did not vouch for."""

    def __init__(
        self,
        directories: Sequence[Path],
        limit_bytes: int = 16 << 20,
        *,
        engine: IoEngine | None = None,
        open_file: OpenFile = open_page_file,
        pages: int = 256,
        timeout_s: float = 20.0,
        namespace: str = "tests",
        parts: int = 1,
    ) -> None:
        for directory in directories:
            directory.mkdir(exist_ok=True)
        config = StoreConfig(
            disks=tuple(DiskConfig(directory=d, limit_bytes=limit_bytes) for d in directories),
            page_bytes=PAGE,
            parts=parts,
            namespace=namespace,
            timeout_s=timeout_s,
        )
        self.store = DiskStore(config, engine=engine, open_file=open_file)
        self.directories, self.limit_bytes = tuple(directories), limit_bytes
        self.source, self.target = Arena(pages, PAGE), Arena(pages, PAGE)

    def write(self, numbers: Sequence[int], version: int = 0, disks: Sequence[int] | None = None) -> BoolArray:
        for row, number in enumerate(numbers):
            self.source.bytes[row] = content(number, version)
        to = None if disks is None else np.array(disks)
        return self.store.write(names(numbers), self.source.addresses[: len(numbers)], to)

    def read(self, numbers: Sequence[int], disks: Sequence[int] | None = None) -> BoolArray:
        """Which are there. The bytes are in `target`."""
        self.target.bytes[: len(numbers)] = 0
        places = self.store.lookup(names(numbers))
        return self.store.read(
            places, self.target.addresses[: len(numbers)], None if disks is None else np.array(disks)
        )

    def read_parts(self, numbers: Sequence[int], parts: Sequence[int], disks: Sequence[int] | None = None) -> BoolArray:
        """Which are there. Part i is in the first bytes of page i of `target`."""
        self.target.bytes[: len(numbers)] = 0
        places = self.store.lookup(names(numbers))
        to = None if disks is None else np.array(disks)
        return self.store.read(places, self.target.addresses[: len(numbers)], to, np.array(parts, dtype=np.int64))

    def wrong_parts(self, numbers: Sequence[int], parts: Sequence[int], ok: BoolArray, version: int = 0) -> int:
        """Parts that the store vouched for though they, or the bytes behind them, are something else."""
        size, wrong = self.store.config.part_bytes, 0
        for row in np.flatnonzero(ok).tolist():
            part = content(numbers[row], version)[parts[row] * size :][:size]
            wrong += not np.array_equal(self.target.bytes[row, :size], part) or bool(
                self.target.bytes[row, size:].any()
            )
        return wrong

    def wrong(self, numbers: Sequence[int], ok: BoolArray, version: int = 0) -> int:
        """Pages that the store vouched for though they are something else."""
        return sum(
            bool(there) and not np.array_equal(self.target.bytes[row], content(number, version))
            for row, (number, there) in enumerate(zip(numbers, ok, strict=True))
        )

    def check(self) -> None:
        self.store.check_integrity()
        for directory in self.directories:
            assert usage_bytes(directory) <= self.limit_bytes


def shelf_of_parts(*directories: Path, engine: IoEngine | None = None, limit_bytes: int = 16 << 20) -> Shelf:
    return Shelf(directories, limit_bytes, engine=engine, parts=PARTS)


def two_disks(tmp_path: Path, timeout_s: float = 20.0) -> tuple[Shelf, EmulatedDisk]:
    """60 pages on a, which is emulated, 60 on b; 20 on both."""
    for name in "ab":
        (tmp_path / name).mkdir()
    emulated = EmulatedDisk(FAST)
    opener = emulated_files({tmp_path / "a": emulated})
    made = Shelf([tmp_path / "a", tmp_path / "b"], open_file=opener)  # a machine under load takes its time to write
    assert made.write(range(60), disks=[0] * 60).all()
    assert made.write(range(40, 100), disks=[1] * 60).all()
    made.store.close()
    made = Shelf([tmp_path / "a", tmp_path / "b"], open_file=opener, timeout_s=timeout_s)
    return made, emulated


_WRITER = """
import sys
from pathlib import Path
import numpy as np
from tests.diskstore.pages import Shelf, names
shelf = Shelf([Path(p) for p in sys.argv[3:]], 8 << 20, parts=int(sys.argv[2]))
chance = np.random.default_rng(int(sys.argv[1]))
print("up", flush=True)
while True:
    numbers = chance.integers(0, 300, 16).tolist()
    shelf.write(numbers)
    shelf.store.forget(names(numbers[:2]))
"""


def write_until_killed(directories: Sequence[Path], *, seed: int, parts: int, after_s: float) -> None:
    """Another process writes and forgets pages below 300, until it gets kill -9. None is left behind, whatever fails."""
    argv = [sys.executable, "-c", _WRITER, str(seed), str(parts), *map(str, directories)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        try:
            assert writer.stdout is not None
            assert writer.stdout.readline() == "up\n"
            time.sleep(after_s)
        finally:
            writer.kill()
