"""A fleet's directory is private, found by other commands, and gone afterwards, also when the fleet was killed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from polder.cli.options import find_socket
from polder.errors import EnvironmentFault
from polder.serve.runtime import SOCKET_NAME, discover_sockets, runtime_dir


@pytest.fixture(autouse=True)
def base(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    return short_dir / "polder"


def test_it_is_private_and_gone_at_the_end(base: Path) -> None:
    with runtime_dir() as path:
        assert path.parent == base
        assert (base.stat().st_mode & 0o777, path.stat().st_mode & 0o777) == (0o700, 0o700)
        (path / "chat.log").touch()
    assert not base.exists()


def test_the_fleet_that_started_last_is_found_and_the_others_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert discover_sockets() == []
    with runtime_dir() as first, runtime_dir() as second:
        for age, path in enumerate((second, first)):
            (path / SOCKET_NAME).touch()
            os.utime(path / SOCKET_NAME, (age, age))
        assert find_socket(None) == first / SOCKET_NAME
        assert f"else --socket {second / SOCKET_NAME}" in capsys.readouterr().err
        (second / SOCKET_NAME).unlink()
        assert find_socket(None) == first / SOCKET_NAME
        assert capsys.readouterr().err == ""
    assert discover_sockets() == []


def test_what_a_killed_fleet_left_is_removed_and_a_living_one_is_not(base: Path) -> None:
    code = (
        "import time; from polder.serve.runtime import runtime_dir\n"
        "with runtime_dir() as path: print(path, flush=True); time.sleep(100)"
    )
    with runtime_dir() as living:
        killed = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert killed.stdout is not None
        left = Path(killed.stdout.readline().strip())
        killed.kill()
        killed.wait()
        killed.stdout.close()
        assert left.is_dir()
        with runtime_dir():
            assert not left.exists()
            assert living.is_dir()


def test_a_directory_open_to_others_is_refused(base: Path) -> None:
    base.mkdir(mode=0o755)
    with pytest.raises(EnvironmentFault, match="mode 0700"), runtime_dir():
        pass
