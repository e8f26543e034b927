"""The command line is public: verbs, flags and exit codes."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from rich.console import Console

from polder.cli.main import app
from polder.cli.top import render
from tests.broker.test_server import Running
from tests.serve.test_fleet import GOOD, model, write
from tests.serve.test_metrics import STATUS

__all__ = ["model"]

SURFACE = {
    "serve": {"fleet", "--check", "--socket", "--log-dir", "--json"},
    "broker": {"--socket", "--device", "--page", "--reserve-low", "--reserve-high", "--hold", "--deadline"},
    "top": {"--socket", "--once", "--json", "--interval"},
    "ctl resize": {"engine", "units", "--socket", "--json"},
    "ctl explain": {"--socket", "--json"},
    "doctor": {"--json"},
    "version": {"--json"},
}


def surface() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}

    def walk(command: object, path: str) -> None:
        for name, sub in getattr(command, "commands", {}).items():
            walk(sub, f"{path} {name}".strip())
        if not hasattr(command, "commands"):
            found[path] = {p.opts[0] for p in command.params}  # type: ignore[attr-defined]

    walk(typer.main.get_command(app), "")
    return found


def test_verbs_and_flags_are_those_that_were_published() -> None:
    assert {verb: flags for verb, flags in surface().items() if not verb.startswith("bench")} == SURFACE


def polder(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "polder.cli.main", *arguments], capture_output=True, text=True, timeout=60)


def test_a_usage_error_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = polder("serve", str(tmp_path / "none.toml"))
    assert done.returncode == 2
    assert done.stderr.startswith("polder: cannot read")
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_refused_before_anything_is_started(tmp_path: Path, model: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        path = write(tmp_path, f"[server]\nport = {port}\n" + GOOD.format(model=model))
        done = polder("serve", str(path))
    assert done.returncode == 3
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr


def test_check_starts_nothing_and_says_what_is_needed(tmp_path: Path, model: Path) -> None:
    done = polder("serve", str(write(tmp_path, GOOD.format(model=model))), "--check", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["least_bytes"] == {"a": 48 << 20}


def test_no_broker_is_exit_code_3(short_dir: Path) -> None:
    done = polder("top", "--once", "--socket", str(short_dir / "none"))
    assert done.returncode == 3
    assert "no broker answers" in done.stderr


def test_a_second_broker_is_refused(short_dir: Path) -> None:
    running = Running(short_dir / "b")
    try:
        done = polder("broker", "--socket", str(short_dir / "b"), "--device", "cpu:0=4MiB")
        assert done.returncode == 3
        assert "already listens" in done.stderr
        as_json = polder("top", "--json", "--socket", str(short_dir / "b"))
        assert json.loads(as_json.stdout)["devices"][0]["total_pages"] == 64
    finally:
        running.stop()


@pytest.mark.parametrize("device", ["cpu:0", "cpu:0=much", "gpu=1GiB"])
def test_a_bad_device_is_refused(short_dir: Path, device: str) -> None:
    assert polder("broker", "--socket", str(short_dir / "b"), "--device", device).returncode == 2


def test_top_shows_who_holds_what_and_why() -> None:
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render(STATUS))
    console.file.close()
    text = console.export_text()
    for words in ("320 MiB", "a/kv 192 MiB", "free 128 MiB", "3/10/19", "75%", "requests, within its share", "1 overdue"):
        assert words in text


def test_doctor_says_what_is_missing_or_ok() -> None:
    findings = json.loads(polder("doctor", "--json").stdout)
    assert {f["check"] for f in findings} >= {"python", "vllm", "plugin", "memfd", "pidfd", "gpu"}
    assert all(f["detail"] for f in findings)
